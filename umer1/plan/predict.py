"""The plan itself: memory of each stage, speed, and the largest micro-batch that fits."""

from dataclasses import dataclass
from typing import Any

from umer1.distributed.parallel import ParallelConfig
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.plan.hardware import find_hardware
from umer1.plan.host import host_bytes
from umer1.plan.parameters import stage_parameters
from umer1.plan.rollouts import Rollouts, plan_rollouts
from umer1.plan.settings import PlanConfig
from umer1.plan.setup import Setup
from umer1.plan.speed import Work, host_seconds, step_work, train_seconds
from umer1.plan.steps import Steps, packed_of
from umer1.plan.timeline import Timeline
from umer1.plan.workload import Side


@dataclass(frozen=True, slots=True)
class Plan:
    """What `umer1 plan` says."""

    setup: Setup
    settings: PlanConfig
    trained: int
    """Parameters of the whole model that training moves, replicas not counted."""
    frozen: int
    expected: list[Timeline]
    """One a pipeline stage: a step of sides as they are assumed."""
    fullest: list[Timeline]
    """The same with the fullest micro-batches that the settings allow (Steps.fullest)."""
    expected_tokens: list[int]
    """Of each micro-batch of a rank."""
    fullest_tokens: int
    negatives: int | None
    """In-batch negatives of a query; None for GRPO."""
    side: Side
    """A sequence as it is assumed (Steps.side)."""
    work: Work
    train_seconds: float | None
    rollouts: Rollouts | None
    largest_micro_batch: int | None
    """Pairs (GRPO: responses) of the assumed size; None: nothing limits them."""
    least_recomputation: int | None
    """Layers of a stage (Steps.least_recomputation)."""
    batch_step: int
    """Legal global batches are its multiples."""

    @property
    def seconds(self) -> float | None:
        """Of a step, as far as it is estimated: without rollouts that servers make."""
        if self.train_seconds is None:
            return None
        return self.train_seconds + ((self.rollouts.seconds or 0.0) if self.rollouts else 0.0)

    @property
    def peak_bytes(self) -> int:
        """Most that the tensors of any rank take in a training step."""
        return max(line.peak for line in (*self.expected, *self.fullest))

    @property
    def rollout_bytes(self) -> int:
        """While responses are made: the trainer's states and the engine's share of the device."""
        stages = range(self.setup.layout.pp)
        taken = self.rollouts.device_bytes if self.rollouts else 0
        setup = self.setup
        return max(setup.states(stage).total + setup.fp8_weights(stage) for stage in stages) + taken

    @property
    def host(self) -> dict[str, int]:
        """What -> bytes in host memory, for a rank of the stage that takes most."""
        return max(
            (host_bytes(self.setup, stage) for stage in range(self.setup.layout.pp)), key=lambda p: sum(p.values())
        )

    def problems(self) -> list[str]:
        """Why the run would not fit, with what to change."""
        hardware, found = self.setup.hardware, []
        if hardware.usable_bytes is None:
            return found
        gib = 2**30
        if self.peak_bytes > hardware.usable_bytes:
            largest = self.largest_micro_batch
            advice = (
                "cut weights and optimizer further (tensor or pipeline parallelism, more data-parallel ranks), or "
                "recompute (--recompute-granularity full)"
                if not largest
                else f"at most {largest} of the assumed size fit together: lower --micro-batch-size or "
                "--max-tokens-per-micro-batch, or recompute"
            )
            found.append(
                f"a training step takes {self.peak_bytes / gib:.1f} GiB; a {hardware.name} has "
                f"{hardware.usable_bytes / gib:.1f} GiB for tensors; {advice}"
            )
        if self.rollouts and self.rollout_bytes > hardware.memory_bytes - hardware.reserve_bytes:
            found.append(
                "while responses are made the trainer's states and the engine take "
                f"{self.rollout_bytes / gib:.1f} GiB; lower --rollout-gpu-memory-utilization or cut those states more"
            )
        if self.rollouts and self.rollouts.engine == "vllm" and not self.rollouts.full_sequences:
            share = self.setup.config.rollout.rollout_gpu_memory_utilization
            found.append(
                f"rollout_gpu_memory_utilization={share} leaves room for "
                f"{self.rollouts.cache_tokens:,} tokens of keys and values, less than one sequence of "
                f"seq_length={self.setup.config.data.seq_length}"
            )
        return found


def make_plan(config: Any, model: Qwen2VLConfig, settings: PlanConfig) -> Plan:
    """config: SFTConfig or GRPOConfig without violations for settings.world_size."""
    setup = Setup(model=model, config=config, world_size=settings.world_size, hardware=find_hardware(settings.hardware))
    steps = Steps(setup, settings)
    learnt = config.policy.inner_epochs if steps.policy else 1  # times that a micro-batch is learnt from
    whole = stage_parameters(model, ParallelConfig(), 0, config.model.train_vision)[0]
    expected, fullest = steps.expected(), steps.fullest()
    group = steps.group
    work = step_work(
        setup,
        [packed_of(each) for each in expected],
        scoring_passes=(1 + (config.policy.beta > 0)) if steps.policy else 0,
        updates=learnt,
        mini_batches=steps.mini_batches,
        vision_once=1 / group,
    )
    computing, made = train_seconds(setup, work, settings.assumed_utilisation), None
    on_host = learnt * steps.mini_batches * host_seconds(setup, settings.assumed_host_bandwidth)
    if steps.policy:
        made = plan_rollouts(setup, settings, steps.side, 2 * config.data.global_batch_size)
    negatives = None
    if not steps.policy:
        together = max(batch.num_pairs for batch in expected) * setup.layout.dp
        negatives = (config.data.global_batch_size if config.loss.cached_contrastive else together) - 1
    return Plan(
        setup=setup,
        settings=settings,
        trained=sum(parameter.numel for parameter in whole if parameter.trained),
        frozen=sum(parameter.numel for parameter in whole if not parameter.trained),
        expected=steps.memory(expected),
        fullest=steps.memory(fullest),
        expected_tokens=[len(packed_of(each).input_ids) for each in expected],
        fullest_tokens=len(packed_of(fullest[0]).input_ids),
        negatives=negatives,
        side=steps.side,
        work=work,
        train_seconds=None if computing is None else computing + on_host,
        rollouts=made,
        largest_micro_batch=steps.largest_micro_batch(),
        least_recomputation=steps.least_recomputation(),
        batch_step=steps.batch_step,
    )
