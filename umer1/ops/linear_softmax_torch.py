"""The two passes over a block of logits of linear_softmax.py, in plain torch.

`absorb` and `slopes` are an interface: umer1_kernels.linear_softmax offers both with these signatures.
"""

import torch


def absorb(values: torch.Tensor, place: torch.Tensor, start: int, temperature: float, found) -> None:
    """Add a block of columns to the statistics.

    values: [R, c] products of rows and columns, logits times the temperature, in accumulation precision; overwritten,
        unless entropy is asked for by what `slopes` may be given.
    place: int64 [R], the label's column; start: the block's first.
    found: umer1.ops.linear_softmax.Statistics, updated.
    """
    if temperature != 1.0:
        values.div_(temperature)
    index, inside = _labels_in(place, start, values.shape[1])
    found.chosen.add_(values.gather(1, index).where(inside, 0.0).squeeze(1))
    before = found.largest.clone()
    torch.maximum(before, values.amax(1), out=found.largest)
    difference = before - found.largest
    fade = difference.exp()
    values.sub_(found.largest[:, None])
    exponentials = values.exp_() if found.moment is None else values.exp()
    if found.moment is not None:
        found.moment.add_(found.total * difference).mul_(fade).add_(values.mul_(exponentials).sum(1))
    found.total.mul_(fade).add_(exponentials.sum(1))


def slopes(
    values: torch.Tensor,
    place: torch.Tensor,
    start: int,
    temperature: float,
    found,
    dtype: torch.dtype,
    relative_to: torch.Tensor | None,
) -> torch.Tensor:
    """softmax - onehot of a block in `dtype`.

    values, place, start, temperature: as in `absorb`; values are overwritten.  found: over the whole vocabulary.
    relative_to: None, or where values are what `absorb` left, the rows' largest logits [R] at that time.
    """
    if relative_to is None:
        if temperature != 1.0:
            values.div_(temperature)
        values.sub_(found.largest[:, None]).exp_()
    elif relative_to is not found.largest:
        values.mul_((relative_to - found.largest).exp()[:, None])
    index, inside = _labels_in(place, start, values.shape[1])
    values.scatter_add_(1, index, torch.where(inside, -found.total[:, None], 0.0))
    # Scaled and rounded in one pass.
    rounded = values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)
    return torch.mul(values, (1.0 / found.total)[:, None], out=rounded)


def _labels_in(place: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [R, 1]: the label's column in the block, 0 for labels outside; bool [R, 1]: it is inside)."""
    local = place - start
    inside = (local >= 0) & (local < size)
    return local.masked_fill(~inside, 0)[:, None], inside[:, None]
