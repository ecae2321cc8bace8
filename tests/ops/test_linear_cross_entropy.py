"""Linear cross-entropy and log-probs against plain log_softmax in fp64: 500 random cases, ranks, memory, bad inputs."""

import gc
import math
import random
import weakref

import pytest
import torch
import torch.distributed as dist
from linear_cross_entropy_cases import check_case, leaves, make_case, plain
from torch.utils._python_dispatch import TorchDispatchMode

from umer1.errors import UserError
from umer1.ops import linear_softmax
from umer1.ops.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from umer1.testing import assert_close, run_distributed


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_random_cases(monkeypatch, tensor_cores):
    """tensor_cores: products from operands of the inputs' dtype, as on a GPU."""
    if tensor_cores:
        monkeypatch.setattr(linear_softmax, "operand_dtype", lambda hidden: hidden.dtype)
    start = random.SystemRandom().randrange(1 << 30)
    for seed in range(start, start + 500):
        check_case(make_case(seed), tensor_cores=tensor_cores)


def make(rows=11, width=16, tokens=37, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, tokens, (rows,), generator=generator)
    return hidden, weight, labels, torch.randn(rows, generator=generator, dtype=torch.float64)


def test_gradient_by_finite_differences():
    hidden, weight, labels, scale = make(rows=3, width=4, tokens=6)

    def logprobs(hidden, weight):
        return linear_logprobs(hidden, weight, labels, temperature=0.7, vocab_size=5)[0]

    labels %= 5
    assert torch.autograd.gradcheck(logprobs, leaves(hidden, weight))
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, row_weights=scale[:3], vocab_size=5)[0],
        leaves(hidden, weight),
    )


@pytest.mark.parametrize("keep", [True, False])
def test_cross_entropy_kept_and_made_again(keep):
    """Both forms equal torch's mean, and a gradient above the scalar scales what the forward made."""
    hidden, weight, labels, _ = make(tokens=1300)
    want_leaves, own = leaves(hidden, weight), leaves(hidden, weight)
    want = torch.nn.functional.cross_entropy(want_leaves[0] @ want_leaves[1].T, labels)
    (3 * want).backward()
    total, losses = linear_cross_entropy(*own, labels, block_bytes=None if keep else 1)
    assert ("Kept" in type(total.grad_fn).__name__) == keep and not losses.requires_grad
    (3 * total).backward(retain_graph=True)
    assert_close("loss", total, want, rtol=1e-12)
    for name, got, expected in zip(("hidden", "weight"), own, want_leaves, strict=True):
        assert_close(name, got.grad, expected.grad, rtol=1e-12)
    total.backward()
    assert_close("second backward", own[1].grad, want_leaves[1].grad * 4 / 3, rtol=1e-12)


def test_only_what_learns_gets_a_gradient():
    hidden, weight, labels, _ = make()
    for learns in (0, 1):
        for run in (lambda *x: linear_logprobs(*x)[0].sum(), lambda *x: linear_cross_entropy(*x)[0]):
            own = [hidden.clone(), weight.clone()]
            own[learns].requires_grad_()
            run(*own, labels).backward()
            assert own[learns].grad is not None and own[1 - learns].grad is None
    with torch.no_grad():
        total, _ = linear_cross_entropy(*leaves(hidden, weight), labels)
    assert not total.requires_grad and not linear_cross_entropy(hidden, weight, labels)[0].requires_grad


def test_no_rows_give_the_weight_a_gradient_of_zero():
    hidden, weight, labels, _ = make()
    for run in (
        lambda weight: linear_logprobs(hidden[:0], weight, labels[:0], entropy=True)[0].sum(),
        lambda weight: linear_cross_entropy(hidden[:0], weight, labels[:0])[0],
    ):
        own = weight.clone().requires_grad_()
        result = run(own)
        result.backward()
        assert result == 0 and own.grad is not None and own.grad.abs().sum() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_not_finite_stays_not_finite(bad, place):
    """Where plain torch's results are not finite, these are not; other rows are as they would be."""
    hidden, weight, labels, scale = make(tokens=1300)
    (hidden if place == "hidden" else weight)[4, 2] = bad
    want_leaves, own = leaves(hidden, weight), leaves(hidden, weight)
    want, want_entropy = plain(*want_leaves, labels, 1.0, 1300)
    (want * scale).sum().backward()
    got, entropy = linear_logprobs(*own, labels, entropy=True, block_bytes=1)
    (got * scale).sum().backward()
    total, losses = linear_cross_entropy(hidden, weight, labels)
    pairs = {
        "logprobs": (got, want),
        "entropy": (entropy, want_entropy),
        "losses": (losses, -want),
        "total": (total, -want.mean()),
        "d_hidden": (own[0].grad, want_leaves[0].grad),
        "d_weight": (own[1].grad, want_leaves[1].grad),
    }
    for name, (result, expected) in pairs.items():
        assert not (torch.isfinite(result) & ~torch.isfinite(expected)).any(), name
        both = torch.isfinite(expected) & torch.isfinite(result)
        assert_close(name, result[both], expected[both], rtol=1e-10)
    if place == "hidden":
        assert torch.isfinite(got).sum() == 10


def ranks_equal_one_process(cases: list[tuple[int, int | None, torch.dtype]]) -> bool:
    """This rank's shard of each vocabulary against the whole one; the last ranks may hold padding alone."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for tokens, block_bytes, dtype in cases:
        name = f"{tokens} tokens, blocks of {block_bytes}, {dtype}"
        tolerance = 1e-10 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-5
        hidden, weight, labels, scale = make(tokens=tokens, dtype=dtype)
        width = -(-tokens // world) + (1 if tokens > 2 else 0)  # padded further than needs be
        padded = torch.full((width * world, weight.shape[1]), 9.0, dtype=dtype)
        padded[:tokens] = weight
        mine = slice(rank * width, (rank + 1) * width)
        want_leaves = leaves(hidden.double(), padded.double())
        want, want_entropy = plain(*want_leaves, labels, 0.8, tokens)
        (want * scale).sum().backward()
        own = leaves(hidden, padded[mine])
        options = dict(temperature=0.8, vocab_size=tokens, group=dist.group.WORLD)
        got, entropy = linear_logprobs(*own, labels, entropy=True, block_bytes=block_bytes, **options)
        (got * scale).sum().backward()
        kept = leaves(hidden, padded[mine])
        total, losses = linear_cross_entropy(*kept, labels, row_weights=-scale, block_bytes=block_bytes, **options)
        total.backward()
        loose = 1e-10 if dtype == torch.float64 else 1e-5
        assert_close(f"log-probs, {name}", got, want, rtol=loose)
        assert_close(f"losses, {name}", losses, -want, rtol=loose)
        assert_close(f"entropy, {name}", entropy, want_entropy, rtol=loose, atol=loose)
        assert_close(f"total, {name}", total, (want * scale).sum(), rtol=10 * loose)
        for leaf in (own, kept):
            assert_close(f"hidden, {name}", leaf[0].grad, want_leaves[0].grad, rtol=tolerance)
            assert_close(f"weight, {name}", leaf[1].grad, want_leaves[1].grad[mine], rtol=tolerance, atol=1e-30)
        none, _ = linear_logprobs(own[0][:0], own[1], labels[:0], entropy=True, **options)
        none.sum().backward()
        if rank == 0:
            hidden[4, 2] = math.nan
        dist.broadcast(hidden, 0)
        broken, _ = linear_cross_entropy(hidden, padded[mine], labels, **options)
        assert torch.isnan(broken), name
    return True


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_over_ranks(world):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    cases = [(tokens, block, dtype) for tokens in (1, 5, 4001) for block in (1, None) for dtype in dtypes]
    assert run_distributed(ranks_equal_one_process, world, cases) == [True] * world


class Alive(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside the block."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.storages.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.storages.values()))
        return result


def most_alive(run, rows: int, tokens: int, width: int = 8) -> int:
    """Bytes at the peak of forward and backward."""
    hidden, weight, labels, _ = make(rows, width, tokens, torch.float32)
    own = leaves(hidden, weight)
    gc.collect()
    with Alive() as alive:
        run(*own, labels).backward()
    return alive.most


def test_memory_is_blocks_and_gradients():
    """At 8,192 tokens and 512 rows logits are 16 MiB: plain torch holds several, these a few blocks of 1 MiB."""
    rows, tokens, block = 512, 8192, 1 << 20
    eager = most_alive(lambda h, w, y: torch.nn.functional.cross_entropy(h @ w.T, y), rows, tokens)
    logprobs = most_alive(lambda h, w, y: linear_logprobs(h, w, y, block_bytes=block)[0].sum(), rows, tokens)
    loss = most_alive(lambda h, w, y: linear_cross_entropy(h, w, y, block_bytes=block)[0], rows, tokens)
    gradients = 4 * 8 * (2 * tokens + 4 * rows)
    assert eager >= 3 * rows * tokens * 4  # what the measure says of the plain way
    assert logprobs <= 3 * block + gradients and loss <= 3 * block + gradients
    assert eager >= 10 * max(logprobs, loss)


def test_what_is_refused():
    hidden, weight, labels, scale = make()
    for arguments, options, message in [
        ((hidden[0], weight, labels), {}, r"hidden \(16,\)"),
        ((hidden, weight[:, :5], labels), {}, r"weight \(37, 5\)"),
        ((hidden, weight[:0], labels), {}, r"weight \(0, 16\)"),
        ((hidden.float(), weight, labels), {}, "both must be the same of"),
        ((hidden.long(), weight.long(), labels), {}, "torch.bfloat16"),
        ((hidden, weight, labels[:5]), {}, r"expected int64 \[11\]"),
        ((hidden, weight.to("meta"), labels), {}, "weight on meta, labels on cpu: use one device"),
        ((hidden, weight, labels.to("meta")), {}, "weight on cpu, labels on meta: use one device"),
        ((hidden, weight, labels.int()), {}, r"expected int64 \[11\]"),
        ((hidden, weight, labels), {"temperature": 0.0}, "temperature=0.0"),
        ((hidden, weight, labels), {"temperature": math.nan}, "temperature=nan"),
        ((hidden, weight, labels), {"vocab_size": 38}, "use 1 to 37"),
        ((hidden, weight, labels), {"vocab_size": 0}, "vocab_size=0"),
        ((hidden, weight, torch.full_like(labels, 37)), {}, "label 37 is not in the vocabulary: use 0 to 36"),
        ((hidden, weight, torch.full_like(labels, -100)), {}, "label -100"),
    ]:
        for op in (linear_logprobs, linear_cross_entropy):
            with pytest.raises(ValueError, match=message):
                op(*arguments, **options)
    for op in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(ValueError, match="block_bytes=0"):
            op(hidden, weight, labels, block_bytes=0)
    for row_weights in (scale[:5], scale.clone().requires_grad_(), scale.to("meta")):
        with pytest.raises(ValueError, match="row_weights"):
            linear_cross_entropy(hidden, weight, labels, row_weights=row_weights)
    with pytest.raises(UserError, match="impl='triton' cannot run: logits of fp64 rows are fp64"):
        linear_logprobs(hidden, weight, labels, impl="triton")
    with pytest.raises(UserError, match="there is no cuda implementation; use auto or torch or triton"):
        linear_logprobs(hidden, weight, labels, impl="cuda")
