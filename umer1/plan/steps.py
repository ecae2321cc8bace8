"""Steps of a run as they are imagined: sides of the assumed size, cut into micro-batches by the run's settings."""

import math
from dataclasses import dataclass, replace

from umer1.data.loader import DataConfig
from umer1.data.schema import PackedBatch
from umer1.plan.grpo_memory import grpo_memory
from umer1.plan.layout import stage_layers
from umer1.plan.settings import PlanConfig
from umer1.plan.setup import Setup
from umer1.plan.sft_memory import sft_memory
from umer1.plan.timeline import Timeline
from umer1.plan.workload import PolicyWork, Side, imagine_pairs, imagine_rollouts
from umer1.training.policy_config import GRPOConfig

_FULL = 0.93  # of the usable memory, where the plan chooses


@dataclass(slots=True)
class Steps:
    """Steps of one data-parallel rank."""

    setup: Setup
    settings: PlanConfig

    @property
    def policy(self) -> bool:
        """GRPO: micro-batches are PolicyWork of rollouts, and not PackedBatch of pairs."""
        return isinstance(self.setup.config, GRPOConfig)

    @property
    def pairs(self) -> int:
        return self.setup.config.data.global_batch_size // self.setup.layout.dp

    @property
    def group(self) -> int:
        """Sequences of a prompt."""
        return self.setup.config.rollout.num_generations if self.policy else 1

    @property
    def prompts(self) -> int:
        """Sides of a rank's pairs in a mini-batch."""
        return 2 * self.pairs // self.mini_batches

    @property
    def mini_batches(self) -> int:
        """Parts of a step, each with micro-batches and an update of its own."""
        return self.setup.config.policy.mini_batches if self.policy else 1

    @property
    def response(self) -> int:
        """Assumed tokens of a response; none where L_disc alone is trained, which leaves them out."""
        if self.policy:
            return min(self.settings.rollout_tokens, self.setup.config.rollout.max_completion_length)
        return self.settings.response_tokens if self.setup.config.loss.weights()[1:] != (0.0, 0.0) else 0

    @property
    def side(self) -> Side:
        """A sequence as it is assumed; no longer than seq_length."""
        side = self.settings.side(response=self.response)
        most = self.setup.config.data.seq_length
        return side if side.tokens(self.setup.model) <= most else self._of_length(side, most)

    def _of_length(self, side: Side, tokens: int, most_patches: int | None = None) -> Side:
        """So many tokens in the same mix of text, response and pictures, as far as limits let it; text fills it up."""
        scale, merge = tokens / side.tokens(self.setup.model), self.setup.model.vision.spatial_merge_size**2
        patches, response = int(side.patches * scale), int(side.response * scale)
        if most_patches is not None:
            patches = min(patches, most_patches)
        if self.policy:
            response = min(response, self.setup.config.rollout.max_completion_length)
        patches = patches // merge * merge
        return Side(text=max(tokens - patches // merge - response, 1), response=response, patches=patches)

    @property
    def batch_step(self) -> int:
        """Legal global batches are its multiples: ranks, interleaved schedule, GRPO's mini-batches and sets ask so."""
        setup, config = self.setup, self.setup.config
        layout = setup.layout
        step = layout.dp * (layout.pp if layout.virtual > 1 and not self.policy else 1)
        if self.policy:
            compared = config.reward.pairs_compared(config.data.global_batch_size)
            step = math.lcm(layout.dp * self.mini_batches, compared)
        return step

    def expected(self, data: DataConfig | None = None) -> list[PackedBatch] | list[PolicyWork]:
        """A step's micro-batches, mini-batch by mini-batch; data: other limits than the run's."""
        data, layout = data or self.setup.config.data, self.setup.layout
        multiple_of = layout.pp if layout.virtual > 1 else 1
        parts = [self._made(self.side, self.prompts, data, multiple_of) for _ in range(self.mini_batches)]
        return [work for part in parts for work in part]

    def _made(
        self, side: Side, prompts: int, data: DataConfig, multiple_of: int = 1
    ) -> list[PackedBatch] | list[PolicyWork]:
        model, cut = self.setup.model, dict(pad_to_multiple=self.setup.padding, multiple_of=multiple_of)
        if not self.policy:
            return imagine_pairs(model, side, prompts // 2, data, **cut)
        asked = replace(side, response=0)
        return imagine_rollouts(model, [asked] * prompts, [[side.response] * self.group] * prompts, data, **cut)

    def fullest(self) -> list[PackedBatch] | list[PolicyWork]:
        """The expected step with the fullest micro-batches that the settings allow at its start.

        As many tokens as the settings let together, in sequences of one length; as many micro-batches as a stage holds
        at once, and one more.
        """
        setup, data, works = self.setup, self.setup.config.data, self.expected()
        least = 1 if self.policy else 2  # what goes together whatever the budget
        together, length, most_patches = data.micro_batch_size * least, data.seq_length, None
        together = min(together, self.prompts * self.group)
        if (budget := data.max_tokens_per_micro_batch) is not None:
            together = max(min(together, -(-budget // (least * length)) * least), least)
            length = min(length, budget // together) if together > least else length
        if data.max_patches_per_micro_batch is not None:
            most_patches = data.max_patches_per_micro_batch // together
        count = min(setup.layout.pp * setup.layout.virtual + 1, len(works) // self.mini_batches)
        prompts = min(-(-count * together // self.group), self.prompts)
        made = self._made(self._of_length(self.side, length, most_patches), prompts, data)[:count]
        return made + works[len(made) :]

    def memory(self, works: list[PackedBatch] | list[PolicyWork]) -> list[Timeline]:
        """A step over these micro-batches, for each pipeline stage."""
        predict = grpo_memory if self.policy else sft_memory
        return [predict(self.setup, stage, works) for stage in range(self.setup.layout.pp)]

    def least_recomputation(self) -> int | None:
        """Fewest layers of a stage that must be recomputed (recompute_method=block) for the fullest step to fit.

        The plan has been up to 7% too low on CPU, so that much is left.  None: nothing limits it, or all are too few.
        """
        usable, works, parallel = self.setup.hardware.usable_bytes, self.fullest(), self.setup.parallel
        stages = [stage_layers(parallel, self.setup.model.num_layers, stage) for stage in range(self.setup.layout.pp)]
        most = max(len(part) for parts in stages for part in parts)

        def peak(count: int) -> int:
            block = dict(recompute_method="block", recompute_num_layers=count) if count else {}
            kind = dict(
                recompute_granularity="full" if count else None, recompute_method=None, recompute_num_layers=None
            )
            config = replace(self.setup.config, parallel=replace(parallel, **kind | block))
            lines = Steps(replace(self.setup, config=config), self.settings).memory(works)
            return max(line.peak for line in lines)

        if usable is None or peak(most) > _FULL * usable:
            return None
        low, high = 0, most
        while low < high:
            count = (low + high) // 2
            low, high = (low, count) if peak(count) <= _FULL * usable else (count + 1, high)
        return low

    def largest_micro_batch(self) -> int | None:
        """Most pairs (GRPO: responses) of the assumed size that go together; 0: not one does.  None: no limit."""
        usable = self.setup.hardware.usable_bytes
        if usable is None:
            return None
        low, high = 0, self.prompts * self.group // (1 if self.policy else 2)
        while low < high:
            size = (low + high + 1) // 2
            limits = dict(micro_batch_size=size, max_tokens_per_micro_batch=None, max_patches_per_micro_batch=None)
            works = self.expected(replace(self.setup.config.data, **limits))
            if all(line.peak <= usable for line in self.memory(works)):
                low = size
            else:
                high = size - 1
        return low


def packed_of(work: PackedBatch | PolicyWork) -> PackedBatch:
    """The tokens that go through the model together."""
    return work.batch if isinstance(work, PolicyWork) else work
