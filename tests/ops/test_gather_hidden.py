"""Gather of hidden states: plain torch and the compiled form against fp64, forward and both gradients by name."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from compiling import compiling

from umer1.errors import UserError
from umer1.ops import extension, gather_hidden_compiled
from umer1.ops.gather_hidden import check_gathers, find_rows, gather_hidden, gather_hidden_at
from umer1.testing import assert_close

IMPLS = ("torch", "auto")  # auto is the compiled form, C++ on the CPU
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert extension.load_extension() is None, f"{extension.load_extension()}; run: pip install --no-deps -e ."
    assert all(extension.extension_obstacle(torch.device(device)) is None for device in DEVICES)
    gather_hidden_compiled.register()


def plain(hidden, index, weight, eps, l2_normalize):
    """What a user would write, in the dtype of its arguments."""
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
    if weight is not None:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        rows = weight * (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(rows.dtype)
    if not l2_normalize:
        return rows
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return F.normalize(wide, dim=-1)


def magnitudes(hidden, index, weight, eps, l2_normalize, cotangent):
    """{name: the size of the terms} that make up each result: what round-off is relative to where they cancel."""

    def frozen(hidden, weight):
        rows = hidden.reshape(-1, hidden.shape[-1])[index]
        if weight is not None:
            rows = rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + eps).detach() * weight
        return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12).detach() if l2_normalize else rows

    return with_gradients(frozen, hidden.abs(), None if weight is None else weight.abs(), cotangent.abs())


def with_gradients(gather, hidden, weight, cotangent):
    """{name: value} of the result and of every gradient."""
    hidden = hidden.detach().clone().requires_grad_()
    weight = None if weight is None else weight.detach().clone().requires_grad_()
    out = gather(hidden, weight)
    out.backward(cotangent.to(out.dtype))
    found = {"out": out.detach(), "hidden": hidden.grad}
    return found if weight is None else found | {"norm_weight": weight.grad}


def random_case(seed: int):
    """(hidden, index, options): odd shapes, one long side at a time, all dtypes, strides and duplicates."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, columns = draw.choice([(1, 1), (7, 5000), (5000, 7), (4999, 1), (33, 257), (129, 64), (12, 1536), (301, 31)])
    rows, columns = draw.randint(1, rows), draw.randint(1, columns)
    shape = [rows, columns] if draw.random() < 0.6 else [rows, draw.randint(1, 3), columns]
    dtype = draw.choice(DTYPES)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** draw.uniform(-3, 3)
    if draw.random() < 0.2:
        hidden[draw.randrange(rows)] = 0
    hidden = hidden.to(dtype)
    if draw.random() < 0.3:  # other strides: [B, S, H] storage, or columns that do not lie side by side
        order = (1, 0, 2) if len(shape) == 3 else (1, 0)
        hidden = hidden.permute(order).contiguous().permute(order)
    count = draw.randint(1, 200)
    index = torch.randint(0, draw.choice([1, hidden[..., 0].numel()]), (count,), generator=generator)
    weight = None
    if draw.random() < 0.5:
        weight = (1 + 0.3 * torch.randn(columns, generator=generator, dtype=torch.float64)).to(dtype)
    options = dict(eps=draw.choice([1e-6, 1e-5]), l2_normalize=draw.random() < 0.6)
    return hidden, index, weight, options, generator


def check_case(seed: int, device: str) -> None:
    hidden, index, weight, options, generator = random_case(seed)
    cotangent = torch.randn(len(index), hidden.shape[-1], generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(device, hidden.dtype)  # the same numbers for every form
    hidden, index, weight = hidden.to(device), index.to(device), None if weight is None else weight.to(device)
    wide = None if weight is None else weight.double()
    exact = with_gradients(lambda h, w: plain(h, index, w, **options), hidden.double(), wide, cotangent)
    terms = magnitudes(hidden.double(), index, wide, cotangent=cotangent, **options)
    usual = with_gradients(lambda h, w: plain(h, index, w, **options), hidden, weight, cotangent)
    for impl in IMPLS:
        got = with_gradients(
            lambda h, w, impl=impl: gather_hidden(h, index, norm_weight=w, impl=impl, **options),
            hidden,
            weight,
            cotangent,
        )
        assert got.keys() == exact.keys()
        for name, value in got.items():
            if not usual[name].isfinite().all():  # the gradient is past what fp16 can hold
                assert hidden.dtype == torch.float16
                continue
            want, scale = exact[name], terms[name].norm().item()
            assert value.dtype == usual[name].dtype and value.shape == usual[name].shape
            error, allowed = ((other.double() - want).norm().item() for other in (value, usual[name]))
            # fp64 has no wider type to add up a row in, and its truth is plain torch in fp64 itself: two orders of one
            # sum, each rounding at log2(H) levels, and no error of plain torch that would allow for it.
            steps = 2 + (math.log2(hidden.shape[-1]) / 2 if hidden.dtype == torch.float64 else 0)
            floor = steps * torch.finfo(value.dtype).eps * scale + torch.finfo(value.dtype).smallest_normal
            assert error <= 2 * allowed + floor, (
                f"seed {seed} {device} {impl} {name}: {error:.2e} from fp64, plain torch {allowed:.2e}, "
                f"scale {scale:.2e}, {hidden.dtype} {tuple(hidden.shape)} -> {len(index)}, "
                f"norm {weight is not None}, {options}"
            )


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    first = random.SystemRandom().randrange(1 << 30)
    for seed in range(first, first + 500):
        check_case(seed, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [16, 17])
def test_long_runs_of_equal_indices_have_one_result(device, columns):
    """Runs within, at and over the edges of what one block adds up: fp32 sums, the same bits every time."""
    lengths = torch.tensor([1, 63, 64, 65, 1, 300, 127, 2])
    generator = torch.Generator().manual_seed(columns)
    index = torch.repeat_interleave(torch.tensor([9, 2, 7, 0, 1, 5, 3, 8]), lengths)
    index = index[torch.randperm(len(index), generator=generator)].to(device)
    hidden, weight = torch.randn(10, columns, generator=generator), torch.randn(columns, generator=generator)
    cotangent = torch.randn(len(index), columns, generator=generator)
    hidden, weight, cotangent = (part.to(device, torch.bfloat16) for part in (hidden, weight, cotangent))
    for factor, l2_normalize in ((None, False), (weight, True)):

        def gather(h, w, l2_normalize=l2_normalize):
            return gather_hidden(h, index, norm_weight=w, l2_normalize=l2_normalize)

        def exact(h, w, l2_normalize=l2_normalize):
            return plain(h, index, w, 1e-6, l2_normalize)

        first, again = (with_gradients(gather, hidden, factor, cotangent) for _ in range(2))
        wide = None if factor is None else factor.double()
        want = with_gradients(exact, hidden.double(), wide, cotangent)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name
            # bf16 rounding of the normalised rows, where there are norms; without, of the result alone.
            assert_close(name, value, want[name].cpu(), rtol=2**-6 if l2_normalize else 2**-8)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@pytest.mark.parametrize("impl", ["cuda", "torch"])
def test_cuda_lives_on_after_an_index_out_of_range(impl):
    hidden = torch.ones(3, 8, device="cuda")
    for index in ([0, 3], [-1, 0]):
        rows = gather_hidden(hidden, torch.tensor(index, device="cuda"), impl=impl)
        bad = torch.tensor([not 0 <= row < 3 for row in index], device="cuda")
        assert torch.equal(rows.isnan().all(1), bad)
        if impl == "cuda":
            with pytest.raises(IndexError, match="out of range"):
                check_gathers()
        check_gathers()
    assert gather_hidden(hidden, torch.tensor([2], device="cuda"), impl=impl).sum().item() == 8


def test_hand_computed():
    hidden = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.bfloat16)
    index = torch.tensor([2, 0, 0])
    for impl in IMPLS:
        assert torch.equal(gather_hidden(hidden, index, impl=impl), hidden[index])
        unit = gather_hidden(hidden, index, l2_normalize=True, impl=impl)
        assert unit.dtype == torch.float32
        assert_close("unit", unit, torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), rtol=1e-7)
        normed = gather_hidden(
            hidden.float(), index[1:], norm_weight=torch.tensor([1.0, 2.0]), eps=0.0, impl=impl
        )  # mean square 12.5
        assert_close("normed", normed, torch.tensor([[3.0, 8.0]] * 2) / 12.5**0.5, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_norm_rounds_as_transformers_does(impl):
    """bf16: the normalised row is rounded before it is multiplied by the weight, and again after."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    generator = torch.Generator().manual_seed(5)
    norm = Qwen2RMSNorm(96, eps=1e-6).bfloat16()
    norm.weight.data = torch.randn(96, generator=generator).bfloat16()
    hidden = (3 * torch.randn(400, 96, generator=generator)).bfloat16()
    got = gather_hidden(hidden, torch.arange(400), norm_weight=norm.weight.detach(), impl=impl)
    want = norm(hidden)
    # The fp32 sum of squares may round another way in its last bit: a few elements land on the other side of a tie.
    assert (got != want).float().mean() < 1e-3
    once = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + 1e-6) * norm.weight.float()
    assert (once.bfloat16() != want).float().mean() > 0.05


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normed,l2_normalize", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 5)])
def test_gradcheck(impl, normed, l2_normalize, shape):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True) if normed else None
    index = torch.tensor([4, 0, 4, 4, 1, 0])

    def gather(hidden, weight):
        return gather_hidden(hidden, index, norm_weight=weight, l2_normalize=l2_normalize, impl=impl)

    assert torch.autograd.gradcheck(gather, (hidden, weight))


@pytest.mark.parametrize("normed,l2_normalize", [(False, False), (True, False), (True, True)])
def test_opcheck(normed, l2_normalize):
    hidden = torch.randn(4, 2, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True) if normed else None
    index = torch.tensor([7, 0, 0, 3])
    torch.library.opcheck(torch.ops.umer1.gather_rows.default, (hidden, index, weight, 1e-6, l2_normalize, True, 0, 8))
    sorted_index, order = torch.sort(index, stable=True)
    rows = hidden.detach().flatten(0, 1)[index]
    weight = None if weight is None else weight.detach()
    torch.library.opcheck(
        torch.ops.umer1.scatter_rows.default,
        (torch.randn(4, 8), rows, sorted_index, order, weight, 1e-6, l2_normalize, 4, 2, 0),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_break(impl):
    weight = torch.randn(8, requires_grad=True)
    index = torch.tensor([5, 1, 5])

    def read(hidden, weight):
        return gather_hidden(2 * hidden, index, norm_weight=weight, l2_normalize=True, impl=impl).cumsum(0)

    hidden, cotangent = torch.randn(3, 2, 8), torch.randn(3, 8)
    want = with_gradients(read, hidden, weight, cotangent)
    with compiling():
        got = with_gradients(torch.compile(read, backend="aot_eager", fullgraph=True), hidden, weight, cotangent)
    for name, value in want.items():
        assert_close(name, got[name], value, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_shards_sum_to_the_whole(impl):
    """Each of three ranks owns a slice, one of them no row at all; results and gradients add up."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    index = torch.tensor([8, 0, 3, 3, 8, 5])
    cotangent = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    want = with_gradients(
        lambda h, w: gather_hidden(h, index, norm_weight=w, l2_normalize=True, impl=impl), hidden, weight, cotangent
    )
    parts = [
        with_gradients(
            lambda h, w, start=start: gather_hidden(
                h, index, norm_weight=w, l2_normalize=True, offset=start, total=9, impl=impl
            ),
            hidden[start:stop],
            weight,
            cotangent,
        )
        for start, stop in ((0, 4), (4, 4), (4, 9))
    ]
    assert_close("out", sum(part["out"] for part in parts), want["out"], rtol=1e-12)
    assert_close("hidden", torch.cat([part["hidden"] for part in parts]), want["hidden"], rtol=1e-12)
    assert_close("norm_weight", sum(part["norm_weight"] for part in parts), want["norm_weight"], rtol=1e-12)
    elsewhere = (index < 4)[:, None] != (parts[0]["out"] != 0)
    assert not elsewhere.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_elsewhere_leaves_no_trace(impl):
    """Row 0 is NaN and not asked for: nothing of it reaches rows that lie elsewhere, nor its gradient."""
    hidden = torch.tensor([[float("nan")] * 3, [1.0, 2.0, 2.0]], requires_grad=True)
    out = gather_hidden(hidden, torch.tensor([3, 1]), l2_normalize=True, total=4, impl=impl)
    assert_close("out", out, torch.tensor([[0.0, 0.0, 0.0], [1 / 3, 2 / 3, 2 / 3]]), rtol=1e-6)
    out.sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[0] == 0).all() and (hidden.grad[1] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(impl, bad):
    hidden = torch.ones(3, 5)
    hidden[1, 2] = bad
    index = torch.tensor([0, 1])
    for weight in (None, torch.ones(5)):
        for l2_normalize in (False, True):
            got = gather_hidden(hidden, index, norm_weight=weight, l2_normalize=l2_normalize, impl=impl)
            want = plain(hidden, index, weight, 1e-6, l2_normalize)
            assert torch.equal(got.isfinite(), want.isfinite())
            assert got[0].isfinite().all() and not got[1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_are_found_on_the_device(impl):
    hidden = torch.randn(7, 2, 4)
    ids = torch.tensor([[1, 9], [2, 3], [9, 9], [4, 5], [6, 9], [7, 8], [9, 1]])
    where = (ids.flatten() == 9).nonzero().flatten()
    for max_rows in (1, 4, 5, 8):
        rows, positions, count = gather_hidden_at(hidden, ids, 9, max_rows=max_rows, l2_normalize=True, impl=impl)
        kept = min(max_rows, 5)
        assert count.item() == 5 and positions.tolist() == where[:kept].tolist() + [-1] * (max_rows - kept)
        assert_close("rows", rows[:kept], F.normalize(hidden.flatten(0, 1)[where[:kept]], dim=-1), rtol=1e-6)
        assert (rows[kept:] == 0).all()
    positions, count = find_rows(ids, 77, 3)
    assert positions.tolist() == [-1] * 3 and count.item() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", [[0, 3], [-1], [1, 1 << 40]])
def test_an_index_out_of_range_is_an_error(impl, index):
    with pytest.raises(IndexError, match="out of range"):
        gather_hidden(torch.randn(3, 4), torch.tensor(index), impl=impl)
    check_gathers()


def test_the_operator_itself_refuses_what_the_door_does():
    """Compiled graphs call it without the door."""
    hidden, index = torch.randn(3, 1, 4), torch.tensor([0, 3])
    with pytest.raises(RuntimeError, match=r"index\[1\] = 3 is out of range"):
        torch.ops.umer1.gather_rows(hidden, index, None, 1e-6, False, False, 0, 3)
    with pytest.raises(RuntimeError, match="int64"):
        torch.ops.umer1.gather_rows(hidden, index.int(), None, 1e-6, False, False, 0, 3)
    with pytest.raises(RuntimeError, match="norm_weight"):
        torch.ops.umer1.gather_rows(hidden, index[:1], torch.randn(5), 1e-6, False, False, 0, 3)


def test_errors_say_what_is_wrong():
    hidden, index = torch.randn(3, 4), torch.tensor([1])
    wrong = [
        (dict(hidden=torch.randn(4)), "hidden has shape"),
        (dict(hidden=torch.randn(0, 4)), "none of them 0"),
        (dict(hidden=torch.randn(3, 0)), "none of them 0"),
        (dict(hidden=torch.ones(3, 4, dtype=torch.int64)), "torch.bfloat16"),
        (dict(index=index[:0]), "N of 1 or above"),
        (dict(index=index.int()), "int64"),
        (dict(index=index[None]), r"\(1, 1\)"),
        (dict(norm_weight=torch.ones(5)), "norm_weight"),
        (dict(norm_weight=torch.ones(4).bfloat16()), "norm_weight"),
        (dict(norm_weight=torch.ones(4), eps=-1.0), "eps=-1.0"),
        (dict(offset=1), "offset=1"),
        (dict(offset=1, total=3), "total=3"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            gather_hidden(**(dict(hidden=hidden, index=index) | change))
    with pytest.raises(ValueError, match="one id for each row"):
        gather_hidden_at(hidden, torch.ones(4, dtype=torch.int64), 1, max_rows=1)
    with pytest.raises(ValueError, match="max_rows=0"):
        gather_hidden_at(hidden, torch.ones(3, dtype=torch.int64), 1, max_rows=0)
    for impl, message in (("cuda", "the tensors are on cpu"), ("triton", "no triton"), ("fast", "must be one of")):
        with pytest.raises(UserError, match=message):
            gather_hidden(hidden, index, impl=impl)


def test_which_gpus_the_cuda_library_runs_on():
    assert extension.runs_on(90, [90]) and extension.runs_on(89, [80, 90]) and extension.runs_on(120, [90])
    assert not extension.runs_on(80, [90]) and not extension.runs_on(75, [80, 90])
