"""InfoNCE in plain torch against the formula in fp64: hundreds of random problems, then what each promise says."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from infonce_reference import loss_and_gradients, reference_loss
from torch.utils._python_dispatch import TorchDispatchMode

from umer1.errors import UserError
from umer1.ops import infonce_share, infonce_small, infonce_torch
from umer1.ops.infonce import infonce, infonce_sums
from umer1.testing import assert_close

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def random_problem(seed: int, largest: int) -> tuple[dict, dict, str]:
    """(tensors, options, what they are): sizes mostly odd, every option on or off, sometimes equal rows."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 4]
    queries, keys = (1 + rng.randrange(largest) for _ in range(2))
    extra, width = rng.choice([0, 1, 1 + rng.randrange(largest)]), 1 + rng.randrange(3 if largest > 1000 else 70)
    with_labels = rng.random() < 0.7
    keys = keys if with_labels else queries
    tied, scale = rng.random() < 0.2, rng.choice([0.1, 1.0, 1.0, 3.0])

    def rows(count):
        values = torch.randn(count, width, generator=generator, dtype=torch.float64) * scale / width**0.5
        return (values.sign() if tied else values).to(dtype)

    tensors = {"query": rows(queries), "key": rows(keys)}
    if extra:
        tensors["negatives"] = rows(extra)
    temperature = rng.choice([0.02, 0.07, 0.5, 1.0])
    options = {}
    if rng.random() < 0.4:
        tensors["temperature"] = torch.tensor(temperature, dtype=torch.float64 if seed % 4 == 1 else torch.float32)
    else:
        options["temperature"] = temperature
    if with_labels:
        options["labels"] = torch.randint(0, keys, (queries,), generator=generator)
    if rng.random() < 0.4:
        kinds = 1 + rng.randrange(queries + 3)
        options["query_ids"] = torch.randint(0, kinds, (queries,), generator=generator)
        options["key_ids"] = torch.randint(0, kinds, (keys + extra,), generator=generator)
    about = f"seed={seed} {dtype} B={queries} N={keys} M={extra} D={width} {sorted(options)} {temperature}"
    return tensors, options, about


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want).norm().item()


def compare(seed: int, largest: int) -> None:
    """No further from fp64 than twice plain torch in the inputs' dtype, or than round-off where that happens to be 0.

    16-bit inputs are at least rounded once in the result; the floor is that rounding and the logits' round-off.  Where
    plain torch in fp16 overflows (a temperature's gradient does), the floor alone counts.
    """
    tensors, options, about = random_problem(seed, largest)
    want = loss_and_gradients(reference_loss, {name: value.double() for name, value in tensors.items()}, **options)
    plain = loss_and_gradients(reference_loss, tensors, **options)
    got = loss_and_gradients(infonce, tensors, **options)
    working = torch.float64 if tensors["query"].dtype == torch.float64 else torch.float32
    temperature = float(tensors.get("temperature", options.get("temperature")))
    largest_logit = max(row.double().norm(dim=1).max().item() for row in (tensors["query"], tensors["key"])) ** 2
    largest_logit /= temperature
    assert got["loss"].dtype == working
    for name, value in want.items():
        # In fp64 the reference is no more exact than what is tested: both round.
        terms, sides = value.norm().item() + tiny_scale(name, tensors), 2 if working == torch.float64 else 1
        floor = 4 * sides * EPSILON[working] * (1 + largest_logit) * terms
        floor += EPSILON[got[name].dtype] / 2 * value.norm().item()
        error = distance(plain[name], value)
        limit = max(2 * error, floor) if math.isfinite(error) else floor
        assert distance(got[name], value) <= limit, f"{name}: {distance(got[name], value):.3e} > {limit:.3e}; {about}"


def tiny_scale(name: str, tensors: dict) -> float:
    """What terms that cancel in a result are made of: a loss of 1 a row, slopes of 1 / 2B times the embeddings / t."""
    return 1.0 if name in ("loss", "d temperature") else max(rows.abs().max().item() for rows in tensors.values())


@pytest.mark.parametrize("part", range(5))
def test_random_problems(part, monkeypatch):
    """100 a part; tiles of 16 make most of them many tiles, some kept and some made again."""
    monkeypatch.setattr(infonce_torch, "CPU_TILE", 16)
    monkeypatch.setattr(infonce_share, "KEPT_BYTES", 8 * 16 * 16 * 4)
    first = int(torch.randint(2**31, ())) // 4 * 4
    for seed in range(first, first + 98):
        compare(seed, largest=70)
    monkeypatch.undo()
    for seed in (first + 98, first + 99):
        compare(seed, largest=[301, 601, 1301, 2501, 4999][part])


def test_hand_computed():
    """q = p = unit vectors: each direction of each pair costs log(1 + exp(-1 / t))."""
    eye = torch.eye(2)
    assert infonce(eye, eye, temperature=0.5).item() == pytest.approx(torch.tensor(-2.0).exp().log1p().item())
    assert infonce(eye[:1], eye[:1], temperature=0.5).item() == 0.0


def test_statistics_are_those_of_the_similarities():
    generator = torch.Generator().manual_seed(3)
    query, key, negatives = (torch.randn(size, 8, generator=generator, dtype=torch.float64) for size in (9, 9, 4))
    ids, column_ids = torch.arange(9) % 5, torch.arange(13) % 6
    for row_ids, all_ids in ((None, None), (ids, column_ids)):
        options = {"query_ids": row_ids, "key_ids": all_ids} if row_ids is not None else {}
        loss, statistics = infonce_sums(query, key, temperature=0.3, weight=0.5, negatives=negatives, **options)
        similarity = query @ torch.cat([key, negatives]).T
        others = ~torch.eye(9, 13, dtype=torch.bool)
        if row_ids is not None:
            others &= row_ids[:, None] != all_ids[None]
        hits = (similarity.diagonal()[:, None] > similarity.masked_fill(~others, -torch.inf)).all(1)
        want = [similarity.diagonal().sum(), hits.sum(), similarity[others].sum(), others.sum()]
        assert_close("statistics", statistics, torch.stack([value.double() for value in want]), rtol=1e-6)
        mean = reference_loss(query, key, temperature=0.3, negatives=negatives, **options)
        assert_close("loss", loss, mean * 9, rtol=1e-12)


def test_bf16_gradients_at_temperature_0_02_with_hard_negatives():
    """Within 0.3% of fp64 where plain bf16 is percents away: embeddings of one region, negatives close to positives."""
    seed = int(torch.randint(2**31, ()))
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 256, generator=generator)
    key = common + 0.5 * torch.randn(200, 256, generator=generator)
    query = key + 0.35 * torch.randn(200, 256, generator=generator)
    hard = key[:100] + 0.2 * torch.randn(100, 256, generator=generator)
    tensors = {"query": query, "key": key, "negatives": hard}
    tensors = {name: F.normalize(value, dim=1).bfloat16() for name, value in tensors.items()}
    want = loss_and_gradients(
        reference_loss, {name: value.double() for name, value in tensors.items()}, temperature=0.02
    )
    plain, got = (loss_and_gradients(form, tensors, temperature=0.02) for form in (reference_loss, infonce))
    assert want["loss"] > 0.1
    for name, value in want.items():
        error = distance(got[name], value) / value.norm().item()
        assert error < 0.003, f"{name}: {error:.2%}, seed={seed}"
    assert distance(plain["d query"], want["d query"]) > 0.01 * want["d query"].norm()  # the case is hard


class TensorCores(TorchDispatchMode):
    """Products of 16-bit operands into fp32 as a GPU makes them, and the names of the calls that do work."""

    NO_WORK = {
        "view",
        "t",
        "transpose",
        "permute",
        "diagonal",
        "unsqueeze",
        "slice",
        "detach",
        "empty_like",
        "new_empty",
    }

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name not in self.NO_WORK and not (name == "new_zeros" and 0 in args[1]):
            self.calls.append(name)
        if function is not torch.ops.aten.addmm.dtype_out:
            return function(*args, **kwargs)
        product = kwargs["alpha"] * (args[1].float() @ args[2].float())
        return kwargs["out"].copy_(args[0] + product if kwargs.get("beta", 1) else product)


def test_few_pairs_on_a_gpu_take_no_more_launches_than_plain_torch(monkeypatch):
    """And are as accurate as many: the form with 16-bit operands, on the CPU."""
    monkeypatch.setattr(infonce_small, "operand", lambda rows: rows)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    common, rows = torch.randn(1, 256, generator=generator), torch.randn(3, 200, 256, generator=generator)
    query, key = (F.normalize(common + part, dim=1).bfloat16() for part in (rows[0], 0.35 * rows[0] + rows[1]))
    labels = torch.arange(200)

    def plain(query, key):
        scores = (query @ key.T).float() / 0.02
        return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2

    def run(form, dtype):
        leaves = [query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()]
        with TensorCores() as cores:
            return torch.autograd.grad(form(*leaves), leaves), cores.calls

    got, calls = run(lambda query, key: infonce(query, key, temperature=0.02), torch.bfloat16)
    want, _ = run(lambda query, key: reference_loss(query, key, temperature=0.02), torch.float64)
    for name, value, expected in zip(("query", "key"), got, want, strict=True):
        error = distance(value, expected) / expected.norm().item()
        assert error < 0.003, f"{name}: {error:.2%}"
    _, theirs = run(plain, torch.bfloat16)
    # Four of plain torch's calls are two launches: both gradients of the labels begin with zeros, and both softmaxes
    # of the transposed scores with a copy.
    assert len(calls) <= len(theirs) + 4, (calls, theirs)


@pytest.mark.parametrize("where", ["query", "key", "negatives"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(where, value):
    """Loss and every gradient's element: not finite where plain torch's is not."""
    generator = torch.Generator().manual_seed(11)
    tensors = {name: torch.randn(7, 4, generator=generator) for name in ("query", "key", "negatives")}
    tensors[where][3, 1] = value
    plain, got = (loss_and_gradients(form, tensors, temperature=0.5) for form in (reference_loss, infonce))
    assert not plain["loss"].isfinite()
    for name, want in plain.items():
        assert not (got[name].isfinite() & ~want.isfinite()).any(), name


def test_backward_scales_and_may_run_again():
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(6, 4, generator=generator).requires_grad_() for _ in range(2))
    loss = infonce(query, key, temperature=0.5)
    once = torch.autograd.grad(loss, (query, key), retain_graph=True)
    again = torch.autograd.grad(loss * 3, (query, key), retain_graph=True)
    for first, second in zip(once, again, strict=True):
        assert_close("scaled by 3", second, 3 * first, rtol=1e-6)
    last = torch.autograd.grad(loss * 5, query)[0]
    assert_close("scaled by 5", last, 5 * once[0], rtol=1e-6)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, key)


def test_without_gradients_there_is_one_sweep(monkeypatch):
    monkeypatch.setattr(infonce_torch, "gradients", None)
    query = torch.eye(3).requires_grad_()
    with torch.no_grad():
        assert infonce(query, query, temperature=0.5) > 0
    assert infonce(query.detach(), query.detach(), temperature=0.5) > 0


ROWS = torch.ones(3, 2)
REFUSED = {
    "no rows": (dict(query=ROWS[:0], key=ROWS[:0]), ValueError, "is empty"),
    "no keys": (dict(key=ROWS[:0], labels=torch.zeros(3, dtype=torch.int64)), ValueError, "no key"),
    "no values": (dict(query=ROWS[:, :0], key=ROWS[:, :0]), ValueError, "rows of no values"),
    "widths": (dict(key=torch.ones(3, 5)), ValueError, r"key \(3, 5\)"),
    "dtypes": (dict(key=ROWS.double()), ValueError, "key is torch.float64"),
    "integers": (dict(query=ROWS.long(), key=ROWS.long()), ValueError, "one of fp16"),
    "three dimensions": (dict(query=ROWS[None], key=ROWS[None]), ValueError, "expected \\[rows, D\\]"),
    "labels are needed": (dict(key=torch.ones(4, 2)), ValueError, "need labels"),
    "label of no key": (dict(labels=torch.tensor([0, 1, 3])), ValueError, "labels from 0 to 3"),
    "labels' dtype": (dict(labels=torch.zeros(3)), ValueError, "expected int64"),
    "one kind of ids": (dict(query_ids=torch.arange(3)), ValueError, "both, or neither"),
    "ids of keys alone": (
        dict(query_ids=torch.arange(3), key_ids=torch.arange(3), negatives=ROWS),
        ValueError,
        r"expected int64 \[6\]",
    ),
    "temperature 0": (dict(temperature=0.0), ValueError, "temperature=0.0"),
    "temperature NaN": (dict(temperature=torch.tensor(float("nan"))), ValueError, "temperature=nan"),
    "temperatures": (dict(temperature=torch.ones(2)), ValueError, "0-dim"),
    "impl": (dict(impl="tritn"), UserError, "tritn"),
    "impl of another op": (dict(impl="cuda"), UserError, "no cuda implementation"),
    "columns": (dict(columns="tree"), UserError, "auto, gather, ring"),
    "triton in fp64": (dict(query=ROWS.double(), key=ROWS.double(), impl="triton"), UserError, "fp64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        infonce(**(dict(query=ROWS, key=ROWS, temperature=0.5) | options))


def test_logits_are_never_whole(monkeypatch):
    """No tensor of the operation is larger than a tile, an input, or what may be kept."""
    monkeypatch.setattr(infonce_torch, "CPU_TILE", 32)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                largest = max(largest, value.numel() if isinstance(value, torch.Tensor) else 0)
            return result

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(300, 8, generator=generator).requires_grad_() for _ in range(2))
    with Sizes():
        infonce(query, key, temperature=0.1).backward()
    assert largest == 300 * 8
