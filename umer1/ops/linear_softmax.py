"""Softmax over a linear head, one block of vocabulary columns at a time: the arithmetic of linear_cross_entropy.py.

R rows against a shard of V_local vocabulary columns, of which `columns` are real.  Blocks run over the vocabulary and
not over rows: each block of the weight's gradient is then one matrix product over all rows, rounded once, and ranks
of a vocab-parallel group exchange [R] statistics once instead of once per chunk.
"""

from dataclasses import dataclass
from types import ModuleType

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
    place: torch.Tensor  # int64 [R]: the label's column here, -1 where the label lies elsewhere
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
        return cls(columns, own.masked_fill(~(legal & (own >= 0) & (own < columns)), -1), legal, group)

    def blocks(self, column_bytes: int, block_bytes: int) -> list[slice]:
        """Slices of columns that take `block_bytes` together, or the least that is sensible."""
        size = max(block_bytes // max(column_bytes, 1), LEAST_COLUMNS)
        return [slice(start, min(start + size, self.columns)) for start in range(0, self.columns, size)]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of each row over the columns so far, in accumulation precision: [R] each, updated in place."""

    largest: torch.Tensor  # largest logit
    total: torch.Tensor  # sum of exp(logit - largest)
    chosen: torch.Tensor  # label's logit; in the end NaN for a label outside the vocabulary
    moment: torch.Tensor | None  # sum of exp(logit - largest) * (logit - largest), where entropy is asked for

    @classmethod
    def of_no_column(cls, hidden: torch.Tensor, entropy: bool) -> "Statistics":
        """Where the rows of hidden [R, H] start."""
        dtype = accumulation_dtype(hidden.dtype)
        zero = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        # The lowest finite number and not -inf: the first block's difference to it is finite, its weight 0.
        lowest = torch.full_like(zero, torch.finfo(dtype).min)
        return cls(lowest, zero, zero.clone(), zero.clone() if entropy else None)

    def logprobs(self) -> torch.Tensor:
        """[R]: log softmax at the label."""
        return (self.chosen - self.largest) - self.total.log()

    def entropy(self) -> torch.Tensor:
        """[R], in nats: log total - E[logit - largest]."""
        return self.total.log() - self.moment / self.total


def default_block_bytes(device: torch.device) -> int:
    """Bytes of a block of logits where the caller names none."""
    return CPU_BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
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


def statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shard: Shard,
    temperature: float,
    *,
    passes: ModuleType,
    block_bytes: int,
    entropy: bool = False,
) -> tuple[Statistics, tuple[torch.Tensor, torch.Tensor] | None]:
    """(statistics over all ranks' columns, what `gradients` takes over if all columns were one block)

    passes: linear_softmax_torch, or what has its interface.  One matrix product, 2 R H V_local FLOPs.
    """
    found, kept = Statistics.of_no_column(hidden, entropy), None
    blocks = shard.blocks(found.total.itemsize * len(hidden), block_bytes)
    for block in blocks:
        values = product(hidden, weight[block].t())
        passes.absorb(values, shard.place, block.start, temperature, found)
        if len(blocks) == 1:
            kept = values, found.largest if shard.group is None else found.largest.clone()
        del values  # before the next block's
    if shard.group is not None and len(hidden):
        _over_ranks(found, shard.group)
    found.chosen.masked_fill_(~shard.legal, torch.nan)
    return found, kept


def _over_ranks(found: Statistics, group: dist.ProcessGroup) -> None:
    local = found.largest.clone()
    dist.all_reduce(found.largest, op=dist.ReduceOp.MAX, group=group)
    fade = (local - found.largest).exp()
    if found.moment is not None:
        found.moment.add_(found.total * (local - found.largest)).mul_(fade)
    found.total.mul_(fade)
    parts = [part for part in (found.total, found.chosen, found.moment) if part is not None]
    sums = torch.stack(parts)
    dist.all_reduce(sums, group=group)
    for part, total in zip(parts, sums, strict=True):
        part.copy_(total)


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shard: Shard,
    temperature: float,
    found: Statistics,
    upstream: torch.Tensor,
    *,
    passes: ModuleType,
    need_hidden: bool,
    need_weight: bool,
    block_bytes: int,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of sum_i upstream_i * -logprob_i: (hidden [R, H], complete on every rank; weight [V_local, H]).

    d / d logits = upstream_i * (softmax_i - onehot_i) / temperature.  The row's factor goes to the [R, H] side of each
    product, so that what is rounded to the inputs' dtype for the tensor cores is softmax - onehot itself.
    upstream: [R] in accumulation precision.  kept: as `statistics` gave it, overwritten; without it logits are made
    anew.  Two products, three with that.
    """
    dtype = accumulation_dtype(hidden.dtype)
    factor = upstream / temperature
    # At most 1: the rows times their factor stay in fp16's range, and the block takes `peak` back in fp32.
    peak = factor.abs().amax().clamp(min=torch.finfo(dtype).tiny) if len(hidden) else factor.sum()
    operand = operand_dtype(hidden)
    scaled = (hidden * (factor / peak)[:, None]).to(operand) if need_weight else None
    hidden_gradient = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None
    weight_gradient = torch.zeros_like(weight) if need_weight else None
    # A block of the weight's gradient, [c, H] before it is rounded, is to be no larger than one of logits.
    for block in shard.blocks(dtype.itemsize * max(hidden.shape), block_bytes):
        if kept is None:
            values, relative_to = product(hidden, weight[block].t()), None
        else:
            values, relative_to = kept[0][:, block], kept[1]
        values = passes.slopes(values, shard.place, block.start, temperature, found, operand, relative_to)
        if need_hidden:
            hidden_gradient += product(values, weight[block].to(operand))
        if need_weight:
            weight_gradient[block] = product(values.t(), scaled).mul_(peak)
        del values  # before the next block's
    if need_hidden:
        hidden_gradient *= factor[:, None]
        if shard.group is not None and len(hidden):
            dist.all_reduce(hidden_gradient, group=shard.group)
        hidden_gradient = hidden_gradient.to(hidden.dtype)
    return hidden_gradient, weight_gradient
