"""Symmetric InfoNCE over all data-parallel ranks, and its gradient with respect to this rank's embeddings.

The loss of the global batch of G pairs with M hard negatives, at temperature t (docs/method.md, 4):

    L = 1/(2G) sum_i [ -log softmax_j(q_i . [p; n]_j / t)_i  -  log softmax_j(p_i . q_j / t)_i ]

Every rank computes the rows of its own pairs against the columns of all ranks (umer1/ops/infonce.py).  The columns'
gradients are summed over the ranks, so the gradient at an embedding is that of the whole L: nothing is scaled by the
world size, and nothing is detached.  `contrastive_gradients` returns it directly, which is what gradient caching needs
and, with one micro-batch, what spares the second pass.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from umer1.ops.infonce import infonce_sums

MAX_LOGIT_SCALE = 100.0  # of a learnt temperature, as CLIP has it


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The three losses: discriminative InfoNCE, generative InfoNCE, cross-entropy of both sides"""

    variant: str = "umer1"
    """umer1 (disc + gen + cross-entropy) or dume (the discriminative InfoNCE alone, the paper's baseline)."""
    contrastive_temperature: float = 0.02
    """Temperature of both InfoNCE losses (initial value when it is learnt)."""
    learnable_temperature: bool = False
    """Learn the temperature (one logit scale for both losses, at most 100)."""
    disc_weight: float = 1.0
    """Weight of the discriminative InfoNCE."""
    gen_weight: float = 1.0
    """Weight of the generative InfoNCE."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy of each side."""
    cached_contrastive: bool = True
    """Every pair of the global batch is a negative of every other, whatever the number of micro-batches (two passes);
    without it, pairs of one micro-batch over all ranks only."""
    mask_equal_targets: bool = False
    """Leave columns out whose target equals the row's own (same text and media): they are no negatives."""

    def violations(self) -> list[str]:
        problems = []
        if self.variant not in ("umer1", "dume"):
            problems.append(f"variant={self.variant!r} is not legal; use umer1 or dume")
        if not (math.isfinite(self.contrastive_temperature) and self.contrastive_temperature > 0):
            problems.append(f"contrastive_temperature={self.contrastive_temperature} must be above 0, e.g. 0.02")
        for name in ("disc_weight", "gen_weight", "ce_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                problems.append(f"{name}={getattr(self, name)} must be 0 or above")
        if self.learnable_temperature and self.contrastive_temperature < 1 / MAX_LOGIT_SCALE:
            problems.append(
                f"contrastive_temperature={self.contrastive_temperature} starts below the limit of a learnt one; "
                f"use {1 / MAX_LOGIT_SCALE} or above, or --no-learnable-temperature"
            )
        if self.weights() == (0.0, 0.0, 0.0):
            problems.append("all loss weights are 0; give at least one of disc_weight, gen_weight, ce_weight")
        return problems

    def weights(self) -> tuple[float, float, float]:
        """(disc, gen, ce) with the variant applied."""
        if self.variant == "dume":
            return self.disc_weight, 0.0, 0.0
        return self.disc_weight, self.gen_weight, self.ce_weight


def infonce_reference(
    query: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor | None = None,
    *,
    temperature: float,
    target_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss as the formula above says it, for one process: query, positive [G, D]; negative [M, D]; ids [G + M]."""
    columns = positive if negative is None else torch.cat([positive, negative])
    forward, backward = query @ columns.T / temperature, positive @ query.T / temperature
    labels = torch.arange(len(query), device=query.device)
    if target_ids is not None:
        equal = target_ids[: len(query), None] == target_ids[None]
        equal = equal & (labels[:, None] != torch.arange(len(target_ids), device=query.device)[None])
        forward = forward.masked_fill(equal, -math.inf)
        backward = backward.masked_fill(equal[:, : len(query)], -math.inf)
    loss = torch.nn.functional.cross_entropy(forward, labels) + torch.nn.functional.cross_entropy(backward, labels)
    return loss / 2


def local_infonce(
    query: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    *,
    logit_scale: torch.Tensor | float,
    num_pairs: int,
    group: dist.ProcessGroup | None,
    target_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of L: the sum over the ranks of `group` is the loss of the global batch.

    query, positive: [B, D]; negative: [m, D] (m may differ by rank); L2-normalised, fp32 or fp64.
    num_pairs: G, the pairs that the loss is averaged over.  target_ids: int64 [B + m] to mask equal targets, or None.
    Returns (loss, statistics fp32 [4]: sum of positive similarities, recall@1 hits, sum and count of negatives).
    """
    return infonce_sums(
        query,
        positive,
        temperature=1 / logit_scale,
        weight=1 / (2 * num_pairs),
        negatives=negative,
        query_ids=None if target_ids is None else target_ids[: len(query)],
        key_ids=target_ids,
        group=group,
    )


@dataclass(slots=True)
class ContrastiveGradients:
    """The contrastive losses of this rank's embeddings, ready for a backward that does not see the other ranks."""

    embeddings: torch.Tensor  # d L / d embedding, the input's shape
    logit_scale: torch.Tensor  # d L / d log(logit scale), this rank's share
    losses: torch.Tensor  # fp32 [K], this rank's share of each loss, unweighted
    statistics: torch.Tensor  # fp32 [K, 4], see local_infonce


def contrastive_gradients(
    embeddings: torch.Tensor,
    num_pairs_local: int,
    weights: tuple[float, ...],
    *,
    log_scale: torch.Tensor,
    num_pairs: int,
    group: dist.ProcessGroup | None,
    target_ids: torch.Tensor | None = None,
) -> ContrastiveGradients:
    """Losses and gradients for K kinds of embeddings (disc, gen) of the same sequences.

    embeddings: [K, S, D], S = B queries, B positives, then negatives, L2-normalised; no gradient flows out of it here.
    weights: K loss weights.  log_scale: scalar, log(1 / temperature).
    """
    leaf = embeddings.detach().requires_grad_()
    scale_leaf = log_scale.detach().to(leaf.dtype).requires_grad_()
    scale = scale_leaf.exp()
    losses, statistics = [], []
    for kind in leaf:
        query, positive, negative = kind.split([num_pairs_local] * 2 + [kind.shape[0] - 2 * num_pairs_local])
        loss, numbers = local_infonce(
            query, positive, negative, logit_scale=scale, num_pairs=num_pairs, group=group, target_ids=target_ids
        )
        losses.append(loss)
        statistics.append(numbers)
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    embedding_gradient, scale_gradient = torch.autograd.grad(total, (leaf, scale_leaf))
    return ContrastiveGradients(
        embedding_gradient, scale_gradient, torch.stack(losses).detach().float(), torch.stack(statistics)
    )
