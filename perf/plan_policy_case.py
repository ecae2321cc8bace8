"""GRPO steps whose memory is predicted and measured, on given responses: no rollout engine, as in perf/step_grpo.py."""

from dataclasses import dataclass, field
from typing import Any

from memory_meter import allocations
from plan_cases import row
from step_grpo import StepTrainer
from synthetic import directory_of, random_prompts

from umer1.data.loader import DataConfig
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.plan.grpo_memory import grpo_memory
from umer1.plan.hardware import HARDWARE
from umer1.plan.setup import Setup
from umer1.plan.workload import PolicyWork, Side, imagine_rollouts
from umer1.rl.config import RolloutConfig
from umer1.rl.types import Completion
from umer1.training.build import ModelConfig
from umer1.training.optimizer import OptimizerConfig
from umer1.training.policy_config import GRPOConfig


@dataclass(kw_only=True)
class PolicyCase:
    """A GRPO run in one process.  prompt: sizes as perf/synthetic.py takes them; both sides are of one size."""

    name: str
    world_size: int
    model: Qwen2VLConfig
    pairs: int
    group: int
    micro_batch: int
    response: int
    prompt: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=dict)

    def config(self) -> GRPOConfig:
        return GRPOConfig(
            model=ModelConfig(fp32=True),
            parallel=ParallelConfig(**self.parallel),
            data=DataConfig(global_batch_size=self.pairs, micro_batch_size=self.micro_batch),
            rollout=RolloutConfig(
                num_generations=self.group, max_completion_length=self.response, log_rollouts=0, rollout_engine="torch"
            ),
            optimizer=OptimizerConfig(train_iters=100, lr=1e-6, lr_warmup_iters=0, lr_decay_style="linear"),
        )

    def works(self, completions: list[Completion]) -> list[PolicyWork]:
        """The rollouts in the plan's words."""
        grid = self.prompt["grid"]
        # Two tokens around the picture belong to the prompt's text.
        side = Side(text=self.prompt["text"] + 2, response=0, patches=grid[0] * grid[1])
        lengths = [len(completion.token_ids) for completion in completions]
        grouped = [lengths[start : start + self.group] for start in range(0, len(lengths), self.group)]
        return imagine_rollouts(self.model, [side] * len(grouped), grouped, self.config().data)


def compare_policy(case: PolicyCase) -> dict[str, Any]:
    """On each rank: the peak of two steps as it was predicted and as it was."""
    with init_distributed(ParallelConfig(**case.parallel), seed=1) as state:
        prompts = random_prompts(directory_of(case.model), case.pairs, seed=1, **case.prompt)
        with allocations() as peak:
            trainer = StepTrainer(case.config(), case.model, prompts, state)
            for _ in range(2):
                trainer.train_step()
        works = case.works(trainer.completions)
        setup = Setup(model=case.model, config=case.config(), world_size=case.world_size, hardware=HARDWARE["cpu"])
        predicted = grpo_memory(setup, state.pp_rank, works, state.dp_rank)
        return row(state, predicted, peak, [work.batch for work in works])
