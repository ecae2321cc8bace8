"""Memory of one GRPO step on a rank of one pipeline stage; training/grpo.py is what it follows.

states -> [rollouts by the engine] -> scoring -> reference in place -> update by the schedule -> optimizer
"""

from umer1.data.schema import PackedBatch
from umer1.models.qwen2_vl.frames import Frames
from umer1.plan.passes import StagePasses
from umer1.plan.schedule import one_f_one_b
from umer1.plan.setup import Setup, batch_bytes, num_patches
from umer1.plan.timeline import Timeline
from umer1.plan.workload import PolicyWork


class PolicyPasses(StagePasses):
    """The frozen ViT runs once for each prompt; each rollout takes a copy of its features through the merger."""

    logprobs = True

    def divided(self, batch: PackedBatch) -> Frames:
        """All pictures on one rank: ranks that divide them take as many micro-batches' prompts together as they are,
        and rollouts of one prompt need the features of one rank."""
        return Frames.of(batch.grid_thw, self.setup.model.vision, 0, 1)

    def seen_pixels(self, batch: PackedBatch) -> int:
        return 0  # they are the prompts', whose engine may ask for them again

    def kept_features(self, batch: PackedBatch) -> int:
        return self.features(batch) // self.setup.vision_ranks

    def look(self, work: PolicyWork) -> None:
        if work.new is not None:
            self.see(work.new)

    def see(self, batch: PackedBatch) -> None:
        if self.first and num_patches(batch) and id(batch) not in self.vision_features:
            pixels = self.patches(batch) * self.setup.model.vision.patch_dim * 4
            self.line.touch("the ViT's forward", vision=self.vision(batch).forward + 2 * self.features(batch) + pixels)
        super().see(batch)

    def kept(self, batch: PackedBatch, chunk: int) -> dict[str, int]:
        found = super().kept(batch, chunk)
        if self.first and chunk == 0 and not self.train_vision:
            found["activations"] += self.features(batch)
        return found

    def score(self, batch: PackedBatch, *, entropy: bool) -> None:
        """Forward alone, for log-probs and embeddings."""
        layer = self.decoder(batch)
        self.note_gather(batch)
        repeated = self.features(batch) + self.merger(batch) if self.first else 0
        self.line.touch("scoring", activations=repeated + layer.forward + layer.input)
        if self.last:
            head = self.head(batch)
            blocks = 2 if entropy else 1
            self.line.touch(
                "scoring", activations=repeated + 2 * self.hidden(batch), head=head.rows + blocks * head.forward
            )


def grpo_memory(setup: Setup, stage: int, works: list[PolicyWork], dp_rank: int = 0) -> Timeline:
    """The timeline of a step over this data-parallel rank's rollouts, without the rollout engine."""
    layout, config = setup.layout, setup.config
    states, line = setup.states(stage, dp_rank), Timeline()
    line.hold("weights", states.parameters, "start")
    line.hold("FP8 weights", setup.fp8_weights(stage), "start")
    line.hold("gradients", states.gradients, "start")
    line.hold("optimizer states", states.optimizer, "start")
    trained = states.trained * setup.itemsize
    if config.policy.beta > 0 and setup.device == "cpu":
        line.hold("reference weights", trained, "start")  # in host memory where there is a GPU
    passes = PolicyPasses(setup, stage, line, kinds=0, cross_entropy=True)
    batches = [work.batch for work in works]
    for batch in batches:
        line.hold("batch", batch_bytes(batch, patches=0), "scoring")
    tokens, rollouts = sum(len(batch.supervised_rows) for batch in batches), sum(len(b.disc_rows) for b in batches)
    line.hold("log-probs and embeddings", 4 * (2 * tokens + rollouts * setup.model.hidden_size), "scoring")
    for work in works:
        passes.look(work)
        passes.score(work.batch, entropy=True)
    everyone = 2 * rollouts * layout.dp * setup.model.hidden_size * 4
    line.touch("rewards", rewards=2 * everyone)
    line.hold("log-probs and embeddings", everyone + 8 * 4 * tokens, "rewards")
    if config.policy.beta > 0:
        line.hold("policy's weights aside", trained, "reference's log-probs")
        for batch in batches:
            passes.score(batch, entropy=False)
        line.drop("policy's weights aside")
    each = len(batches) // config.policy.mini_batches
    for start in range(0, len(batches), each):
        mine = batches[start : start + each]
        for turn in one_f_one_b(len(mine), stage, layout.pp, layout.virtual):
            step = passes.forward if turn.kind == "forward" else passes.backward
            step(mine[turn.batch], turn.chunk)
        passes.optimizer_step(states)
    return line
