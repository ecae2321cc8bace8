"""The contract between the losses and megatron's pipeline schedule: (iterator, model) -> (output, loss function).

Megatron is told that losses are sums (`calculate_per_token_loss`) and never divides: data-parallel gradients are
SUMMED, and every term below is divided by its own count over the global batch before backward.  There are three
counts (pairs, supervised tokens of the queries, supervised tokens of the positives), so no single divisor of
megatron's could be right.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from umer1.data.schema import PackedBatch
from umer1.losses.contrastive import MAX_LOGIT_SCALE, ContrastiveGradients, LossConfig, contrastive_gradients
from umer1.losses.language_model import cross_entropy_sums
from umer1.models.embedding import read_embedding
from umer1.models.qwen2_vl.weights import unwrap
from umer1.training.batches import emptied

NUM_STATISTICS = 4  # of local_infonce
COMPARING = "comparing embeddings with the other ranks"  # what SFTStep.apart is told


@dataclass(slots=True)
class Totals:
    """Counts over the global batch, the denominators of the losses."""

    pairs: int
    supervised_tokens: tuple[int, int]  # query side, positive side


@dataclass(slots=True)
class SFTStep:
    """What one optimizer step's micro-batches share."""

    config: LossConfig
    totals: Totals
    data_parallel_group: dist.ProcessGroup
    train_vision: bool
    gradients: dict[int, ContrastiveGradients] = field(default_factory=dict)  # id(batch) -> its share, once cached
    apart: Callable[[str], AbstractContextManager] = nullcontext  # around what waits for other ranks: Watch.apart

    @property
    def kinds(self) -> list[tuple[str, float]]:
        """The kinds of embeddings that carry a loss, with its weight."""
        disc, gen, _ = self.config.weights()
        return [(name, weight) for name, weight in (("disc", disc), ("gen", gen)) if weight > 0]


def run_model(batch: PackedBatch, model: torch.nn.Module, train_vision: bool) -> torch.Tensor:
    """One forward of one (virtual) stage.  A frozen ViT runs once for a batch; its output is kept in the batch."""
    vision: dict[str, Any] = {}
    core = unwrap(model)
    if core.pre_process and batch.grid_thw.numel():
        vision["grid_thw"] = batch.grid_thw
        if train_vision:
            vision["pixel_values"] = batch.pixel_values
        else:
            if batch.vision_features is None:
                with torch.no_grad():
                    batch.vision_features = core.vision_forward(batch.pixel_values, batch.grid_thw)
                batch.pixel_values = emptied(batch.pixel_values)  # nobody looks again, and a step's pixels are GBs
            vision["vision_features"] = batch.vision_features
    return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, **vision)


def read_kinds(hidden: torch.Tensor, batch: PackedBatch, step: SFTStep) -> torch.Tensor:
    """Embeddings of the kinds with a loss: fp32 [K, S, H], L2-normalised."""
    rows = {"disc": batch.disc_rows, "gen": batch.gen_rows}
    return torch.stack([read_embedding(hidden, rows[name]) for name, _ in step.kinds])


def current_log_scale(core: torch.nn.Module, config: LossConfig) -> torch.Tensor:
    """log(1 / temperature): the learnt parameter, clamped, or the constant."""
    if config.learnable_temperature:
        return core.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE))
    return torch.tensor(-math.log(config.contrastive_temperature), device=next(core.parameters()).device)


def micro_batch_gradients(embeddings: torch.Tensor, batch: PackedBatch, step: SFTStep, log_scale: torch.Tensor):
    """The contrastive losses of the pairs that all ranks hold in this micro-batch."""
    with step.apart(COMPARING):
        return contrastive_gradients(
            embeddings,
            batch.num_pairs,
            tuple(weight for _, weight in step.kinds),
            log_scale=log_scale,
            num_pairs=step.totals.pairs,
            group=step.data_parallel_group,
            target_ids=batch.target_ids if step.config.mask_equal_targets else None,
        )


def embed_step(iterator: Iterator[PackedBatch], model: torch.nn.Module, step: SFTStep):
    """First pass of cached contrastive: embeddings alone."""
    batch = next(iterator)
    hidden = run_model(batch, model, step.train_vision)

    def collect(hidden: torch.Tensor, non_loss_data: bool = True):
        return id(batch), read_kinds(hidden, batch, step)

    return hidden, collect


def loss_step(iterator: Iterator[PackedBatch], model: torch.nn.Module, step: SFTStep):
    """The pass with gradients."""
    batch = next(iterator)
    hidden = run_model(batch, model, step.train_vision)
    return hidden, partial(sft_loss, batch=batch, model=model, step=step)


def sft_loss(hidden: torch.Tensor, *, batch: PackedBatch, model: torch.nn.Module, step: SFTStep):
    """This micro-batch's share of the global loss, in the form megatron's schedule takes.

    hidden: [T, H].  Returns (scalar to run backward from, a token count megatron does not use, numbers): `numbers` is
    fp32 [K losses, 2 cross-entropies, K * 4 statistics], all of them shares that add up over micro-batches and ranks.
    The contrastive part of the scalar is <embedding, d L / d embedding>: its value means nothing, its gradient is L's.
    """
    core = unwrap(model)
    kinds, (_, _, ce_weight) = step.kinds, step.config.weights()
    scalar = hidden.new_zeros((), dtype=torch.float32)
    losses, statistics = hidden.new_zeros(0), hidden.new_zeros(0)
    if kinds:
        embeddings = read_kinds(hidden, batch, step)
        log_scale = current_log_scale(core, step.config)
        share = step.gradients.get(id(batch)) or micro_batch_gradients(embeddings, batch, step, log_scale)
        scalar = scalar + (embeddings * share.embeddings).sum()
        if step.config.learnable_temperature:
            scalar = scalar + log_scale * share.logit_scale
        losses, statistics = share.losses, share.statistics.flatten()
    cross_entropies = hidden.new_zeros(2, dtype=torch.float32)
    if ce_weight > 0:
        counts = torch.tensor(step.totals.supervised_tokens, device=hidden.device).clamp(min=1)
        cross_entropy, sums = core.through_head(
            cross_entropy_sums,
            hidden[batch.supervised_rows],
            batch.supervised_labels,
            batch.supervised_sides,
            ce_weight / counts,
        )
        scalar, cross_entropies = scalar + cross_entropy, sums / counts
    elif getattr(core.output_layer, "weight", None) is not None:
        # Overlapped gradient reduction waits for a gradient of every trained parameter.
        scalar = scalar + 0.0 * core.output_layer.weight.flatten()[0].float()
    numbers = torch.cat([losses.float(), cross_entropies, statistics.float()])
    return scalar, torch.zeros((), dtype=torch.int, device=hidden.device), numbers
