"""Softmax over a linear head, one block of vocabulary columns at a time: the arithmetic of linear_cross_entropy.py.

R rows against a shard of V_local vocabulary columns, of which `columns` are real.  Blocks run over the vocabulary and
not over rows: each block of the weight's gradient is then one matrix product over all rows, rounded once, and ranks
of a vocab-parallel group exchange [R] statistics once instead of once per chunk.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

# Bytes of one block's logits.  GPU, by arithmetic: at 8,192 rows 8,192 columns in fp32, a product of many waves of
# tiles, and 5% of the logits in memory.  CPU, measured once at [2048, 256] x [256, 32768], one thread of a busy
# machine: 1.7 s and 115 MiB at 32 MiB, 1.9 s and 51 MiB at 4 MiB, 2.9 s and 341 MiB at 256 MiB.
BLOCK_BYTES = 1 << 28
CPU_BLOCK_BYTES = 1 << 25
# Fewer columns than this starve a matrix product, however many rows there are.
LEAST_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of the vocabulary, and where the labels of R rows lie in it."""

    columns: int  # real ones; the weight may have padded rows after them
    own: torch.Tensor  # int64 [R]: the label's column here; of no meaning where the label lies elsewhere
    here: torch.Tensor  # bool [R]: the label is one of this rank's columns
    legal: torch.Tensor  # bool [R]: the label is in the vocabulary at all
    group: dist.ProcessGroup | None  # None: this rank holds the whole vocabulary

    @classmethod
    def of(cls, labels: torch.Tensor, width: int, vocab_size: int, group: dist.ProcessGroup | None) -> "Shard":
        """width: V_local, the same on all ranks, which hold the vocabulary in rank order."""
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        start = 0 if group is None else dist.get_rank(group) * width
        columns = min(max(vocab_size - start, 0), width)
        own = labels - start
        legal = (labels >= 0) & (labels < vocab_size)
        return cls(columns, own, legal & (own >= 0) & (own < columns), legal, group)

    def blocks(self, column_bytes: int, block_bytes: int) -> list[slice]:
        """Slices of columns that take `block_bytes` together, or the least that is sensible."""
        size = max(block_bytes // max(column_bytes, 1), LEAST_COLUMNS)
        return [slice(start, min(start + size, self.columns)) for start in range(0, self.columns, size)]

    def labels_in(self, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [R, 1]: the label's column in the block, 0 for labels outside; bool [R, 1]: it is inside)."""
        inside = self.here & (self.own >= block.start) & (self.own < block.stop)
        return (self.own - block.start).masked_fill(~inside, 0)[:, None], inside[:, None]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of each row over the whole vocabulary, in accumulation precision: [R] each."""

    largest: torch.Tensor  # largest logit
    total: torch.Tensor  # sum of exp(logit - largest)
    chosen: torch.Tensor  # label's logit; NaN for a label outside the vocabulary
    moment: torch.Tensor | None  # sum of exp(logit - largest) * (logit - largest), where entropy is asked for

    def logprobs(self) -> torch.Tensor:
        return (self.chosen - self.largest) - self.total.log()

    def entropy(self) -> torch.Tensor:
        """In nats: log total - E[logit - largest]."""
        return self.total.log() - self.moment / self.total


def default_block_bytes(device: torch.device) -> int:
    return CPU_BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of one dtype, accumulated and returned in fp32 (fp64 of fp64), nothing rounded in between."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def operand_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the gradients' products are made from: the inputs' dtype for tensor cores; on CPU nothing is rounded to it,
    for `product` would only turn it back."""
    return hidden.dtype if hidden.device.type == "cuda" else accumulation_dtype(hidden.dtype)


def logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """[R, c] of rows [R, H] and columns [c, H], a new tensor that the caller may overwrite."""
    block = product(hidden, weight.t())
    return block if temperature == 1.0 else block.div_(temperature)


def statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shard: Shard,
    temperature: float,
    *,
    block_bytes: int,
    entropy: bool = False,
) -> tuple[Statistics, torch.Tensor | None]:
    """(statistics over all ranks' columns, exp(logit - largest) [R, columns] if all columns were one block)

    One matrix product, 2 R H V_local FLOPs.
    """
    dtype = accumulation_dtype(hidden.dtype)
    # The lowest finite number and not -inf: the first block's difference to it is finite, its weight 0.
    largest = torch.full((len(hidden),), torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
    total, chosen = torch.zeros_like(largest), torch.zeros_like(largest)
    moment = torch.zeros_like(largest) if entropy else None
    blocks = shard.blocks(dtype.itemsize * len(hidden), block_bytes)
    exponentials = None
    for block in blocks:
        values = logits(hidden, weight[block], temperature)
        index, inside = shard.labels_in(block)
        chosen += values.gather(1, index).where(inside, 0.0).squeeze(1)
        before, largest = largest, torch.maximum(largest, values.amax(1))
        fade = (before - largest).exp()
        values.sub_(largest[:, None])
        if entropy:
            exponentials = values.exp()
            moment = fade * (moment + total * (before - largest)) + values.mul_(exponentials).sum(1)
        else:
            exponentials = values.exp_()
        total = fade * total + exponentials.sum(1)
        del values
    if len(blocks) != 1:
        exponentials = None
    if shard.group is not None and len(hidden):
        local, largest = largest, largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.group)
        fade = (local - largest).exp()
        if entropy:
            moment = fade * (moment + total * (local - largest))
        sums = torch.stack([fade * total, chosen, *([moment] if entropy else [])])
        dist.all_reduce(sums, group=shard.group)
        total, chosen, *rest = sums.unbind()
        moment = rest[0] if entropy else None
        if exponentials is not None:
            exponentials.mul_(fade[:, None])
    return Statistics(largest, total, chosen.masked_fill(~shard.legal, torch.nan), moment), exponentials


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shard: Shard,
    temperature: float,
    found: Statistics,
    upstream: torch.Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    block_bytes: int,
    exponentials: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of sum_i upstream_i * -logprob_i: (hidden [R, H], complete on every rank; weight [V_local, H]).

    d / d logits = upstream_i * (softmax_i - onehot_i) / temperature.  The row's factor goes to the [R, H] side of each
    product, so that what is rounded to the inputs' dtype for the tensor cores is softmax - onehot itself.
    upstream: [R] in accumulation precision.  exponentials: as `statistics` gave them, overwritten; without them logits
    are made anew.  Two products, three with that.
    """
    dtype = accumulation_dtype(hidden.dtype)
    factor = upstream / temperature
    # At most 1: the rows times their factor stay in fp16's range, and the block takes `peak` back in fp32.
    peak = factor.abs().amax().clamp(min=torch.finfo(dtype).tiny) if len(hidden) else factor.sum()
    operand = operand_dtype(hidden)
    scaled = (hidden * (factor / peak)[:, None]).to(operand) if need_weight else None
    hidden_gradient = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None
    weight_gradient = torch.zeros_like(weight) if need_weight else None
    reciprocal = (1.0 / found.total)[:, None]
    # A block of the weight's gradient, [c, H] before it is rounded, is to be no larger than one of logits.
    for block in shard.blocks(dtype.itemsize * max(hidden.shape), block_bytes):
        if exponentials is None:
            values = logits(hidden, weight[block], temperature).sub_(found.largest[:, None]).exp_()
        else:
            values = exponentials[:, block]
        index, inside = shard.labels_in(block)
        values.scatter_add_(1, index, torch.where(inside, -found.total[:, None], 0.0))
        # Scaled and rounded in one pass.
        rounded = values if operand == dtype else torch.empty_like(values, dtype=operand)
        values = torch.mul(values, reciprocal, out=rounded)
        if need_hidden:
            hidden_gradient += product(values, weight[block].to(operand))
        if need_weight:
            weight_gradient[block] = product(values.t(), scaled).mul_(peak)
    if need_hidden:
        hidden_gradient *= factor[:, None]
        if shard.group is not None and len(hidden):
            dist.all_reduce(hidden_gradient, group=shard.group)
        hidden_gradient = hidden_gradient.to(hidden.dtype)
    return hidden_gradient, weight_gradient
