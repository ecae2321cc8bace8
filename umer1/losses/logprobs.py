"""Log-probs of chosen tokens from hidden rows, without the logits of more than one chunk in memory.

At a vocabulary of 152K and fp32, the logits of 10,000 response tokens are 6 GB, and a softmax kept for backward is as
much again.  Here rows go through the head in chunks, each under activation recomputation: forward keeps nothing but
the rows themselves, backward makes a chunk's logits anew and drops them.  The log-probs are those of the whole real
vocabulary at the temperature of sampling, nothing banned, so that the engine's and the trainer's can be compared.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

LogitsFn = Callable[[torch.Tensor], torch.Tensor]


class _VocabParallelLogProbs(torch.autograd.Function):
    """(logits [r, V / tp], labels [r]) -> (log-probs [r], probabilities [r, V / tp], not differentiable)."""

    @staticmethod
    def forward(ctx, logits, labels, temperature: float, group: dist.ProcessGroup | None):
        width = logits.shape[1]
        shared = group is not None and dist.get_world_size(group) > 1 and labels.numel() > 0
        own = labels - (dist.get_rank(group) * width if shared else 0)
        elsewhere = (own < 0) | (own >= width)
        own = own.masked_fill(elsewhere, 0)
        # The copy: everything below works in place in it.
        scaled = torch.div(logits.double() if logits.dtype == torch.float64 else logits.float(), temperature)
        largest = scaled.amax(1)
        if shared:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scaled.sub_(largest[:, None])
        chosen = scaled.gather(1, own[:, None]).squeeze(1).masked_fill(elsewhere, 0.0)
        probabilities = scaled.exp_()
        total = probabilities.sum(1)
        if shared:
            both = torch.stack([chosen, total])
            dist.all_reduce(both, group=group)
            chosen, total = both.unbind()
        probabilities.div_(total[:, None])
        ctx.save_for_backward(probabilities, own, elsewhere)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(probabilities)
        return chosen - total.log(), probabilities

    @staticmethod
    def backward(ctx, gradient, _):
        probabilities, own, elsewhere = ctx.saved_tensors
        scale = gradient / ctx.temperature
        result = probabilities * -scale[:, None]
        result.scatter_add_(1, own[:, None], scale.masked_fill(elsewhere, 0.0)[:, None])
        return result.to(ctx.dtype), None, None, None


def chosen_logprobs(
    hidden_rows: torch.Tensor,
    labels: torch.Tensor,
    logits_fn: LogitsFn,
    *,
    temperature: float,
    chunk_rows: int = 1024,
    entropy: bool = True,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log-probs [R], entropy [R] or None): log softmax(logits / temperature) at each row's label, and its entropy.

    hidden_rows: [R, H], the rows whose NEXT token is the label; labels: int64 [R] in the whole vocabulary; R may be 0.
    logits_fn: [r, H] -> [r, V / tp], vocab-parallel over `group` in rank order (`Qwen2VL.logits`); padded columns hold
    the lowest finite number.  It has to give the same result each time and its rows' gradient complete on every rank
    of `group`, all of which call this with the same rows; then so is the gradient of `hidden_rows`.
    Both results are fp32 (fp64 when the logits are); entropy, in nats, carries no gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: log-probs at temperature 0 are 0 or -inf")

    def chunk(rows: torch.Tensor, chosen: torch.Tensor):
        logprobs, probabilities = _VocabParallelLogProbs.apply(logits_fn(rows), chosen, temperature, group)
        if not entropy:
            return logprobs, None
        # After the last tensor that backward needs: recomputation ends before it comes here.
        with torch.no_grad():
            entropies = torch.special.entr(probabilities).sum(1)
            if group is not None and dist.get_world_size(group) > 1 and len(rows):
                dist.all_reduce(entropies, group=group)
        return logprobs, entropies

    # One (empty) chunk for no rows: the head's weights get a gradient of zero, not none.
    parts = []
    for start in range(0, max(len(labels), 1), chunk_rows):
        rows, chosen = hidden_rows[start : start + chunk_rows], labels[start : start + chunk_rows]
        parts.append(checkpoint(chunk, rows, chosen, use_reentrant=False, preserve_rng_state=False))
    logprobs = torch.cat([part for part, _ in parts])
    return logprobs, torch.cat([part for _, part in parts]) if entropy else None
