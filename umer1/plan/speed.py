"""FLOPs of a step by the formula of training/flops.py, and a time that rests on stated assumptions.

executed = model FLOPs + what memory costs: the first pass of cached contrastive, layers that are recomputed
seconds  = (executed + idle) / (devices x peak x assumed utilisation) x pipeline bubble (+ decoding, for GRPO)
decoding = tokens one after another, each reading weights and caches once at the assumed share of the bandwidth
"""

from dataclasses import dataclass

from umer1.data.schema import PackedBatch
from umer1.plan.layout import stage_layers
from umer1.plan.setup import Setup
from umer1.training.flops import forward_flops


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one step over all ranks."""

    model: float
    """Forward and backward of what the method asks for: what MFU counts."""
    executed: float
    """With recomputation and first passes."""
    idle: float
    """FLOPs that ranks could do while they wait for the one that has the largest share of a micro-batch's pictures."""
    tokens: int
    """Of all sequences that are trained on."""
    patches: int
    bubble: float
    """Factor by which pipeline stages that wait make the step longer."""


def step_work(
    setup: Setup,
    batches: list[PackedBatch],
    *,
    scoring_passes: int,
    updates: int = 1,
    mini_batches: int = 1,
    vision_once: float = 1.0,
) -> Work:
    """Of one data-parallel rank's micro-batches times DP.

    scoring_passes: forwards beside the ones that are learnt from: those that the method asks for (GRPO's old and
    reference log-probs).  updates: how often each micro-batch is learnt from.  mini_batches: parts of the step, each
    with an update of its own, before which the pipeline runs empty.  vision_once: share of the ViT's work that is done,
    where sequences share pictures.
    """
    config, layout = setup.config, setup.layout
    decoder = vision = logits = attention = waits = 0.0
    for batch in batches:
        parts = forward_flops(batch, setup.model)
        if parts[1]:
            frames = setup.frames(batch)
            waits += parts[1] * vision_once * (frames.ranks * max(frames.patches) / sum(frames.patches) - 1)
        decoder, vision, logits = decoder + parts[0], vision + parts[1] * vision_once, logits + parts[2]
        lengths = batch.cu_seqlens.diff().double()
        width = setup.model.num_attention_heads * setup.model.head_dim
        attention += setup.model.num_layers * 2.0 * width * float((lengths**2).sum())
    model = (3 * updates + scoring_passes) * (decoder + logits) + (3 if config.model.train_vision else 1) * vision
    again = {"full": decoder * recomputed_share(setup), "selective": attention}
    extra = again.get(config.parallel.recompute_granularity, 0.0)
    extra += logits  # made again in the backward
    extra *= updates
    if not scoring_passes and config.loss.cached_contrastive and len(batches) > 1:
        extra += decoder + (vision if config.model.train_vision else 0.0)
    turns = len(batches) // mini_batches * layout.virtual
    return Work(
        model=model * layout.dp,
        executed=(model + extra) * layout.dp,
        idle=waits * (3 if config.model.train_vision else 1) * layout.dp,
        tokens=sum(batch.num_real_tokens for batch in batches) * layout.dp,
        patches=sum(len(batch.pixel_values) for batch in batches) * layout.dp,
        bubble=(turns + layout.pp - 1) / turns,
    )


def recomputed_share(setup: Setup) -> float:
    """Of the decoder's layers under full recomputation: all, or the first ones of each stage."""
    parallel, layers = setup.parallel, setup.model.num_layers
    if parallel.recompute_method != "block":
        return 1.0
    chunks = [len(part) for stage in range(setup.layout.pp) for part in stage_layers(parallel, layers, stage)]
    return sum(min(parallel.recompute_num_layers or 1, count) for count in chunks) / layers


def host_seconds(setup: Setup, bandwidth: float) -> float:
    """Of an update in host memory: gradients copied there, AdamW's four reads and three writes of fp32, weights back.

    bandwidth: bytes/s that all of it is assumed to reach; the host's ranks update at the same time.
    """
    if not setup.config.optimizer.optimizer_cpu_offload:
        return 0.0
    updated = max(setup.states(stage).updated for stage in range(setup.layout.pp))
    return updated * (4 + 7 * 4 + setup.itemsize) / bandwidth


def train_seconds(setup: Setup, work: Work, utilisation: float) -> float | None:
    """None for a device without a known peak."""
    peak = setup.hardware.bf16_flops
    if peak is None:
        return None
    return (work.executed + work.idle) / (setup.world_size * peak * utilisation) * work.bubble
