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
    def response(self) -> int:
        """Assumed tokens of a response; none where L_disc alone is trained, which leaves them out."""
        if self.policy:
            return self.settings.rollout_tokens
        return self.settings.response_tokens if self.setup.config.loss.weights()[1:] != (0.0, 0.0) else 0

    @property
    def side(self) -> Side:
        """A sequence as it is assumed."""
        return self.settings.side(response=self.response)

    @property
    def batch_step(self) -> int:
        """Legal global batches are its multiples: ranks, interleaved schedule, GRPO's mini-batches and sets ask so."""
        setup, config = self.setup, self.setup.config
        layout = setup.layout
        step = layout.dp * (layout.pp if layout.virtual > 1 and not self.policy else 1)
        if self.policy:
            compared = config.reward.pairs_compared(config.data.global_batch_size)
            step = math.lcm(layout.dp * config.policy.mini_batches, compared)
        return step

    def expected(self, data: DataConfig | None = None) -> list[PackedBatch] | list[PolicyWork]:
        """A step's micro-batches; data: other limits than the run's."""
        return self._made(self.side, 2 * self.pairs, data or self.setup.config.data)

    def _made(self, side: Side, prompts: int, data: DataConfig) -> list[PackedBatch] | list[PolicyWork]:
        setup = self.setup
        cut = dict(pad_to_multiple=setup.padding, multiple_of=setup.layout.pp if setup.layout.virtual > 1 else 1)
        if not self.policy:
            return imagine_pairs(setup.model, side, prompts // 2, data, **cut)
        asked = replace(side, response=0)
        lengths = [[side.response] * self.group] * prompts
        return imagine_rollouts(setup.model, [asked] * prompts, lengths, data, **cut)

    def fullest(self) -> list[PackedBatch] | list[PolicyWork]:
        """The expected step with the fullest micro-batches that the settings allow at its start.

        Sequences of seq_length tokens in the same mix of text, response and pictures; as many micro-batches as a
        stage holds at once, and one more.
        """
        setup, data, side = self.setup, self.setup.config.data, self.side
        least = 1 if self.policy else 2
        together = data.micro_batch_size * least
        if data.max_tokens_per_micro_batch is not None:
            together = max(min(together, data.max_tokens_per_micro_batch // data.seq_length), least)
        scale = data.seq_length / side.tokens(setup.model)
        patches, response = int(side.patches * scale), int(side.response * scale)
        if data.max_patches_per_micro_batch is not None:
            patches = min(patches, data.max_patches_per_micro_batch // together)
        if self.policy:
            response = min(response, setup.config.rollout.max_completion_length)
        merge = setup.model.vision.spatial_merge_size**2
        patches = patches // merge * merge
        text = max(data.seq_length - patches // merge - response, 1)
        works = self.expected()
        count = min(setup.layout.pp * setup.layout.virtual + 1, len(works))
        prompts = -(-count * together // self.group)
        return self._made(Side(text=text, response=response, patches=patches), prompts, data)[:count] + works[count:]

    def memory(self, works: list[PackedBatch] | list[PolicyWork]) -> list[Timeline]:
        """A step over these micro-batches, for each pipeline stage."""
        predict = grpo_memory if self.policy else sft_memory
        return [predict(self.setup, stage, works) for stage in range(self.setup.layout.pp)]

    def least_recomputation(self) -> int | None:
        """Fewest layers of a stage that must be recomputed (recompute_method=block) for the fullest step to fit.

        The plan has been up to 7% too low on CPU, so that much is left.  None: nothing limits it, or all are too few.
        """
        usable, works = self.setup.hardware.usable_bytes, self.fullest()
        layers = [len(part) for part in stage_layers(self.setup.parallel, self.setup.model.num_layers, 0)]

        def peak(count: int) -> int:
            block = dict(recompute_method="block", recompute_num_layers=count) if count else {}
            kind = dict(
                recompute_granularity="full" if count else None, recompute_method=None, recompute_num_layers=None
            )
            config = replace(self.setup.config, parallel=replace(self.setup.parallel, **kind | block))
            lines = Steps(replace(self.setup, config=config), self.settings).memory(works)
            return max(line.peak for line in lines)

        if usable is None or peak(max(layers)) > _FULL * usable:
            return None
        low, high = 0, max(layers)
        while low < high:
            count = (low + high) // 2
            low, high = (low, count) if peak(count) <= _FULL * usable else (count + 1, high)
        return low

    def largest_micro_batch(self) -> int | None:
        """Most pairs (GRPO: responses) of the assumed size that go together; 0: not one does.  None: no limit."""
        usable = self.setup.hardware.usable_bytes
        if usable is None:
            return None
        low, high = 0, self.pairs * (2 * self.group if self.policy else 1)
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
