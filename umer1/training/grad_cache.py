"""One SFT forward and backward through megatron's schedule, with cached contrastive (GradCache, arXiv 2101.06983).

    embed -> contrastive_gradients -> backward

Pass 1 embeds every micro-batch without a graph; the losses and d L / d embedding are made over all of them and all
ranks; pass 2 runs each micro-batch again with its own share as a constant.  With one micro-batch a rank the share is
made inside the only pass.  tests/training/test_sft_parity.py, equal gradients for 8, 4, 2 and 1 pairs a micro-batch,
is the specification.
"""

from functools import partial

import torch

from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelState
from umer1.losses.contrastive import ContrastiveGradients, contrastive_gradients
from umer1.models.qwen2_vl.weights import unwrap
from umer1.training.forward_step import COMPARING, NUM_STATISTICS, SFTStep, current_log_scale, embed_step, loss_step
from umer1.training.schedule import run_schedule


def forward_backward(
    models: list[torch.nn.Module], batches: list[PackedBatch], step: SFTStep, state: ParallelState, several: bool
) -> torch.Tensor:
    """Leave the gradients of the global batch's loss in the models; this data-parallel rank's numbers are returned.

    several: whether any data-parallel rank has more than one micro-batch; the ranks take the same way together.
    Returns fp32 [K + 2 + 4K] as `sft_loss` has them, summed over micro-batches; zeros where the last stage is not.
    """
    if step.config.cached_contrastive and several and step.kinds:
        embeddings = dict(run_schedule(models, batches, partial(embed_step, step=step), forward_only=True))
        if embeddings:
            step.gradients = cached_gradients(embeddings, batches, step, unwrap(models[-1]))
    numbers = run_schedule(models, batches, partial(loss_step, step=step))
    if numbers:
        return torch.stack(numbers).sum(0)
    return torch.zeros(len(step.kinds) * (1 + NUM_STATISTICS) + 2, device=state.device)


def cached_gradients(
    embeddings: dict[int, torch.Tensor], batches: list[PackedBatch], step: SFTStep, core: torch.nn.Module
) -> dict[int, ContrastiveGradients]:
    """id(batch) -> its share of the gradients of the loss over all micro-batches and ranks.

    embeddings: id(batch) -> [K, S, D].  The losses and statistics go to the first micro-batch, the logit scale's
    gradient likewise: each is counted once.
    """
    roles = [_split_roles(embeddings[id(batch)], batch, dim=1) for batch in batches]
    order = torch.cat([torch.cat([role[part] for role in roles], dim=1) for part in range(3)], dim=1)
    target_ids = None
    if step.config.mask_equal_targets:
        target_ids = torch.cat(
            [batch.target_ids[: batch.num_pairs] for batch in batches]
            + [batch.target_ids[batch.num_pairs :] for batch in batches]
        )
    with torch.no_grad():
        log_scale = current_log_scale(core, step.config)
    with step.apart(COMPARING):
        whole = contrastive_gradients(
            order,
            sum(batch.num_pairs for batch in batches),
            tuple(weight for _, weight in step.kinds),
            log_scale=log_scale,
            num_pairs=step.totals.pairs,
            group=step.data_parallel_group,
            target_ids=target_ids,
        )
    sizes = [batch.num_pairs for batch in batches] * 2 + [batch.num_negatives for batch in batches]
    parts = whole.embeddings.split(sizes, dim=1)
    shares = {}
    for position, batch in enumerate(batches):
        own = torch.cat(parts[position :: len(batches)], dim=1)
        first = 1.0 if position == 0 else 0.0
        shares[id(batch)] = ContrastiveGradients(
            own, whole.logit_scale * first, whole.losses * first, whole.statistics * first
        )
    return shares


def _split_roles(rows: torch.Tensor, batch: PackedBatch, dim: int) -> tuple[torch.Tensor, ...]:
    return rows.split([batch.num_pairs, batch.num_pairs, batch.num_negatives], dim=dim)
