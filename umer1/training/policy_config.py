"""GRPO's settings, and the rules between them and the other sections."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.rl.config import RolloutConfig
from umer1.rl.scoring import RewardConfig
from umer1.rules import bound_problems, path_problems
from umer1.training.config import StageConfig
from umer1.training.optimizer import OptimizerConfig

_MOST_RESPONSES = 1 << 22  # of a step: far above what any run has


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """The objective, and how often one batch of rollouts is learnt from"""

    epsilon: float = 0.2
    """Clip of the probability ratio below 1."""
    epsilon_high: float | None = None
    """Clip of the probability ratio above 1; default: epsilon (upstream's script has 0.28)."""
    beta: float = 0.04
    """Weight of the KL penalty (k3) to the frozen model that the run started from; 0 keeps no such model."""
    loss_normalisation: Literal["response", "constant"] = "response"
    """Divide a response's sum over tokens by its own length (the paper), or by max_completion_length (upstream)."""
    importance_sampling_cap: float | None = None
    """Weigh each token by min(trainer's / engine's probability, cap) against their mismatch.  Unset: off; usual: 2."""
    inner_epochs: int = 1
    """Times that a step's rollouts are learnt from; log-probs of before are computed once."""
    mini_batches: int = 1
    """Optimizer steps that one pass over a step's rollouts is cut into; each takes every n-th pair of the batch."""
    dynamic_sampling: bool = False
    """Replace pairs whose rewards have no spread on either side by pairs of further rounds of rollouts."""
    dynamic_sampling_rounds: int = 3
    """Most rounds of rollouts of one step under dynamic_sampling; a batch still short of pairs is trained as it is."""

    def violations(self) -> list[str]:
        found = []
        if not 0 < self.epsilon < 1:
            found.append(f"epsilon={self.epsilon} must be between 0 and 1")
        if self.epsilon_high is not None and not 0 < self.epsilon_high < float("inf"):
            found.append(f"epsilon_high={self.epsilon_high} must be above 0")
        if not 0 <= self.beta < float("inf"):
            found.append(f"beta={self.beta} must be 0 (no KL penalty) or above")
        if self.importance_sampling_cap is not None and not self.importance_sampling_cap > 0:
            found.append(f"importance_sampling_cap={self.importance_sampling_cap} must be above 0; 2 is usual")
        found += bound_problems(self, 1, "inner_epochs", "mini_batches", "dynamic_sampling_rounds")
        return found


@dataclass(kw_only=True, slots=True)
class HeldoutConfig:
    """Held-out retrieval while training"""

    eval_data_path: str | None = None
    """Held-out pairs in the RL format; default: mini-MMEB's with its training pairs, else none."""
    eval_data_root: str | None = None
    """Folder that their media paths start at; default: the file's folder."""
    eval_interval: int = 10
    """Steps between evaluations; there is one before the first step and after the last."""

    def violations(self) -> list[str]:
        found = []
        if self.eval_interval < 1:
            found.append(f"eval_interval={self.eval_interval} must be 1 or above")
        if self.eval_data_root is not None and self.eval_data_path is None:
            found.append("eval_data_root is given without eval_data_path; give both")
        rule = "does not exist; give a file of pairs in the RL format"
        found += path_problems("eval_data_path", self.eval_data_path, Path.exists, rule)
        found += path_problems("eval_data_root", self.eval_data_root, Path.is_dir, "is not a directory")
        return found


def _optimizer() -> OptimizerConfig:
    """docs/method.md, 5: AdamW, lr 1e-6, linear decay, clip 1.0."""
    return OptimizerConfig(train_iters=350, lr=1e-6, lr_decay_style="linear", lr_warmup_fraction=0.0)


@dataclass(kw_only=True, slots=True)
class GRPOConfig(StageConfig):
    """Stage 2, GRPO."""

    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt: what the longest response leaves of the sequence."""
        return self.data.seq_length - self.rollout.max_completion_length

    def violations(self) -> list[str]:
        """Every broken rule that needs neither the model's files nor the number of processes."""
        found = StageConfig.violations(self)
        if self.fp8.fp8_param_gather:
            found.append("fp8_param_gather is for SFT: the rollout engine and the reference take weights in bf16")
        if self.prompt_length < 1:
            found.append(
                f"max_completion_length={self.rollout.max_completion_length} leaves no room for a prompt in "
                f"seq_length={self.data.seq_length}"
            )
        responses = 2 * self.data.global_batch_size * self.rollout.num_generations
        if responses > _MOST_RESPONSES:
            found.append(
                f"global_batch_size={self.data.global_batch_size} and num_generations={self.rollout.num_generations} "
                f"ask for {responses:,} responses a step; at most {_MOST_RESPONSES:,} are legal"
            )
        return found + self.reward.batch_violations(self.data.global_batch_size)

    def node_violations(self, processes: int) -> list[str]:
        """Every broken rule about the processes of one node."""
        tensor, servers = self.rollout.rollout_tensor_parallel_size, self.rollout.rollout_server is not None
        if servers or self.rollout.rollout_engine == "torch" or tensor < 1 or processes % tensor == 0:
            return []
        return [
            f"rollout_tensor_parallel_size={tensor} must divide the {processes} processes of a node: the GPUs of an "
            "engine are on one node"
        ]

    def layout_violations(self, model_config: Qwen2VLConfig, world_size: int) -> list[str]:
        """Every broken rule between the model, the layout and the number of processes."""
        found = StageConfig.layout_violations(self, model_config, world_size)
        if not found:
            pairs, parts, dp_size = self.data.global_batch_size, self.policy.mini_batches, self.dp_size(world_size)
            if parts > 0 and pairs // dp_size % parts:
                found.append(
                    f"mini_batches={parts} does not divide the {pairs // dp_size} pairs of each of {dp_size} "
                    f"data-parallel ranks (global_batch_size={pairs})"
                )
        tensor = self.rollout.rollout_tensor_parallel_size
        if tensor > 0 and world_size % tensor:
            found.append(f"rollout_tensor_parallel_size={tensor} must divide the number of processes, {world_size}")
        servers = len(self.rollout.servers())
        if servers and world_size % servers:
            found.append(f"rollout_server names {servers} servers; their number must divide the {world_size} processes")
        limit = 60.0 * self.parallel.distributed_timeout_minutes
        for name in ("rollout_timeout_seconds", "weight_sync_timeout_seconds"):
            if world_size > 1 and getattr(self.rollout, name) >= limit:
                found.append(
                    f"{name}={getattr(self.rollout, name):g} must be below distributed_timeout_minutes="
                    f"{self.parallel.distributed_timeout_minutes}: ranks that are done wait for the others"
                )
        return found
