"""Memory of one SFT step on a rank of one pipeline stage, allocation by allocation; training/sft.py is what it follows.

states -> batches -> [pass 1: ViT, embeddings] -> gradients of the embeddings -> pass 2 by the schedule -> optimizer
"""

from umer1.data.schema import PackedBatch
from umer1.plan.passes import StagePasses
from umer1.plan.schedule import one_f_one_b
from umer1.plan.setup import Setup, batch_bytes
from umer1.plan.timeline import Timeline


def sft_memory(setup: Setup, stage: int, batches: list[PackedBatch], dp_rank: int = 0) -> Timeline:
    """The timeline of a step over this data-parallel rank's micro-batches, states included."""
    layout, config = setup.layout, setup.config
    states = setup.states(stage, dp_rank)
    line = Timeline()
    line.hold("weights", states.parameters, "start")
    line.hold("FP8 weights", setup.fp8_weights(stage), "start")
    line.hold("gradients", states.gradients, "start")
    line.hold("optimizer states", states.optimizer, "start")
    kinds = sum(weight > 0 for weight in config.loss.weights()[:2])
    passes = StagePasses(setup, stage, line, kinds=kinds, cross_entropy=config.loss.weights()[2] > 0)
    for batch in batches:
        line.hold("batch", batch_bytes(batch, patches=passes.patches(batch) if stage == 0 else 0), "start")
    last = stage == layout.pp - 1
    if config.loss.cached_contrastive and kinds and len(batches) > 1:
        for batch in batches:
            passes.embed(batch)
        if last:
            contrastive(setup, line, batches, kinds)
    for work in one_f_one_b(len(batches), stage, layout.pp, layout.virtual):
        step = passes.forward if work.kind == "forward" else passes.backward
        step(batches[work.batch], work.chunk)
    passes.optimizer_step(states)
    return line


def contrastive(setup: Setup, line: Timeline, batches: list[PackedBatch], kinds: int) -> None:
    """InfoNCE over the embeddings of the global batch: one kind after the other, rows of this rank, all columns."""
    width = 4 * setup.model.hidden_size
    mine = sum(len(batch.disc_rows) for batch in batches)
    everyone = mine * setup.layout.dp
    line.touch("contrastive losses", contrastive=width * (2 * kinds * mine + 3 * everyone) + 4 * mine * everyone // 2)
    line.hold("embeddings", 2 * kinds * mine * width, "contrastive losses")
