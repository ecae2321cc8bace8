"""Cross-entropy and log-probs of chosen tokens from hidden rows and the head's weight, never with all logits in memory.

With z = h W^T / temperature over the whole vocabulary of V tokens and y the row's label,

    logprob = z_y - log sum_v exp z_v,     loss = -logprob,     entropy = log sum_v exp z_v - sum_v p_v z_v,
    d loss / d z = softmax(z) - onehot(y)

The weight is cut over a tensor-parallel group by vocabulary (Megatron-LM, Shoeybi et al. 2019, section 3): every rank
has the same rows, its own V_local columns, and the same results.  Logits exist one block of columns at a time, in
fp32, and are made again for backward: 4 matrix products of 2 R H V_local FLOPs.  Where all of them are one block and
the weights of the losses are known before (linear_cross_entropy), the gradient is made in the forward: 3 products.
"""

import math
from types import ModuleType

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from umer1.ops import linear_softmax_torch
from umer1.ops.autograd import graph_is_kept
from umer1.ops.dispatch import Impl, choose, triton_obstacle
from umer1.ops.linear_softmax import Shard, accumulation_dtype, default_block_bytes, gradients, statistics

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _LogProbs(torch.autograd.Function):
    """(log-probs, entropy); backward makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, shard: Shard, temperature: float, entropy: bool, how: dict):
        found, _ = statistics(hidden, weight, shard, temperature, entropy=entropy, **how)
        ctx.save_for_backward(hidden, weight)
        ctx.found, ctx.shard, ctx.temperature, ctx.how = found, shard, temperature, how
        entropies = found.entropy() if entropy else None
        if entropy:
            ctx.mark_non_differentiable(entropies)
        return found.logprobs(), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        hidden, weight = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        made = gradients(
            hidden,
            weight,
            ctx.shard,
            ctx.temperature,
            ctx.found,
            -upstream,
            need_hidden=need_hidden,
            need_weight=need_weight,
            **ctx.how,
        )
        return *made, None, None, None, None


class _KeptCrossEntropy(torch.autograd.Function):
    """(weighted sum of the losses, losses) of logits that are one block; backward scales what the forward made."""

    @staticmethod
    def forward(ctx, hidden, weight, row_weights, shard: Shard, temperature: float, how: dict):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        found, kept = statistics(hidden, weight, shard, temperature, **how)
        losses = -found.logprobs()
        made = gradients(
            hidden,
            weight,
            shard,
            temperature,
            found,
            row_weights,
            need_hidden=need_hidden,
            need_weight=need_weight,
            kept=kept,
            **how,
        )
        ctx.save_for_backward(*made)  # so that they go with the graph, not with the next one
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, row_weights), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        # Without a second backward to come the gradients themselves are handed over: no second copy of [V, H].
        scale = torch.mul if graph_is_kept() else torch.Tensor.mul_
        return *(None if made is None else scale(made, upstream) for made in ctx.saved_tensors), None, None, None, None


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropy: bool = False,
    block_bytes: int | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log-probs [R], entropy [R] in nats or None): log softmax(h W^T / temperature) at each row's label.

    hidden: [R, H]; weight: [V_local, H], this rank's rows of the vocabulary; both fp16, bf16, fp32 or fp64, the same.
    labels: int64 [R] in [0, vocab_size).  vocab_size: V, the vocabulary's real size over all ranks, None for all of
    the weight; rows of the weight from there on are padding, take no part and get a gradient of zero.
    group: the ranks that share the vocabulary in rank order, with equal V_local.  All of them call this with the same
    rows and labels and run backward with the same gradient; the gradient of `hidden` comes complete on every rank.
    block_bytes: size of one block of logits, None for the device's default; one to three of them, gradients and a few
    [R, H] are the memory this takes.
    impl: who makes the passes over a block, torch or triton (CUDA, not fp64); the matrix products are torch's.

    Results are fp32 (fp64 of fp64), products accumulate in that and logits are never rounded to less; the entropy
    carries no gradient.  R may be 0: empty results, and a weight's gradient of zero.  NaN or infinity in a row makes
    its results NaN or infinite.  A label outside the vocabulary is a ValueError on CPU and NaN in that row on other
    devices, where looking at it would wait for the device.  No ignored label: leave such rows out.
    ValueError: shapes, dtypes, temperature not above 0, a vocabulary that the weight cannot hold.
    """
    shard = _check(hidden, weight, labels, temperature, vocab_size, group)
    how = _how(hidden, block_bytes, impl)
    return _LogProbs.apply(hidden, weight, shard, float(temperature), entropy, how)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    block_bytes: int | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_i row_weights_i * loss_i, a scalar to run backward from; the losses [R], which carry no gradient).

    row_weights: [R], constants, e.g. 1 / supervised tokens of the row's side; None: the mean over the rows.  They are
    asked for here, and not left to the caller's sum, so that the gradient can be made while the logits are there.
    Everything else is as in linear_logprobs.
    """
    shard = _check(hidden, weight, labels, temperature, vocab_size, group)
    how = _how(hidden, block_bytes, impl)
    dtype = accumulation_dtype(hidden.dtype)
    if row_weights is None:
        row_weights = torch.full(labels.shape, 1 / max(len(labels), 1), dtype=dtype, device=hidden.device)
    elif row_weights.shape != labels.shape or row_weights.requires_grad or row_weights.device != hidden.device:
        raise ValueError(
            f"row_weights {tuple(row_weights.shape)} on {row_weights.device} for {len(labels)} rows on "
            f"{hidden.device}: give [R] constants without gradient, on the same device"
        )
    row_weights = row_weights.to(dtype)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # By the weight's rows and not the real ones among them: all ranks must run their collectives in the same pass.
    if learns and len(labels) * len(weight) * dtype.itemsize <= how["block_bytes"]:
        return _KeptCrossEntropy.apply(hidden, weight, row_weights, shard, float(temperature), how)
    logprobs, _ = _LogProbs.apply(hidden, weight, shard, float(temperature), False, how)
    return -torch.dot(logprobs, row_weights), -logprobs.detach()


def _how(hidden: torch.Tensor, block_bytes: int | None, impl: Impl) -> dict:
    """What `statistics` and `gradients` both take: the size of a block, and who makes the passes over its logits."""
    block_bytes = default_block_bytes(hidden.device) if block_bytes is None else block_bytes
    if block_bytes < 1:
        raise ValueError(f"block_bytes={block_bytes} must be above 0, e.g. {default_block_bytes(hidden.device)}")
    obstacle = triton_obstacle(hidden.device)
    if hidden.dtype == torch.float64:
        obstacle = "logits of fp64 rows are fp64, which the Triton kernels do not take"
    obstacles = {"triton": obstacle, "torch": None}
    if hidden.device.type == "cpu":  # the interpreter is for tests that ask for it
        obstacles = {"torch": None, "triton": obstacle}
    passes: ModuleType = linear_softmax_torch
    if choose("linear_cross_entropy", impl, obstacles) == "triton":
        from umer1_kernels import linear_softmax as passes
    return {"block_bytes": block_bytes, "passes": passes}


def _check(hidden, weight, labels, temperature, vocab_size, group) -> Shard:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [R, H] and [V_local, H], "
            "H and V_local at least 1"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be the same of {names}")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden on {hidden.device}, weight on {weight.device}, labels on {labels.device}: use one device"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)}: expected int64 [{len(hidden)}]")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be above 0: log-probs at temperature 0 are 0 or -inf")
    held = len(weight) * (1 if group is None else dist.get_world_size(group))
    vocab_size = held if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= held:
        raise ValueError(f"vocab_size={vocab_size}: the ranks' weights hold {held} tokens; use 1 to {held}")
    shard = Shard.of(labels, len(weight), vocab_size, group)
    if labels.device.type == "cpu" and not bool(shard.legal.all()):
        wrong = labels[~shard.legal][0].item()
        raise ValueError(f"label {wrong} is not in the vocabulary: use 0 to {vocab_size - 1}, and leave out other rows")
    return shard
