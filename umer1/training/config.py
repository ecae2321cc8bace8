"""What the training programs are configured by: the sections of their owners, and the rules between them.

GRPO's own are in policy_config.py.
"""

from dataclasses import dataclass, field, fields

from umer1.data.loader import DataConfig
from umer1.distributed.parallel import ParallelConfig
from umer1.losses.contrastive import LossConfig
from umer1.models.backend import gradient_fusion_violations
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.training.build import ModelConfig
from umer1.training.checkpoint import CheckpointConfig
from umer1.training.metrics import LoggingConfig
from umer1.training.optimizer import OptimizerConfig
from umer1.training.watch_config import WatchConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The run as a whole"""

    seed: int = 1234
    """Order of the data and every other random choice."""

    def violations(self) -> list[str]:
        return [] if 0 <= self.seed < 2**31 else [f"seed={self.seed} must lie between 0 and {2**31 - 1}"]


def machine_violations(config: "StageConfig") -> list[str]:
    """What this process's machine lacks; all of it at once."""
    fusion = gradient_fusion_violations(config.parallel.gradient_accumulation_fusion, config.model.params_dtype)
    return config.fp8.machine_violations() + fusion


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What both stages are configured by."""

    model: ModelConfig = field(default_factory=ModelConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def violations(self) -> list[str]:
        """Every broken rule that needs neither the model's files nor the number of processes."""
        parts = [getattr(self, item.name) for item in fields(self) if item.name != "parallel"]
        found = [problem for part in parts for problem in part.violations()]
        if self.model.hf_model is not None and self.checkpoint.load is not None:
            found.append(
                f"hf_model={self.model.hf_model} and load={self.checkpoint.load} both say where the weights come from; "
                "keep one (`--load none` overrides a configuration file)"
            )
        return found + self._fp8_violations() + self._offload_violations()

    def layout_violations(self, model_config: Qwen2VLConfig, world_size: int) -> list[str]:
        """Every broken rule between the model, the layout and the number of processes."""
        found = self.parallel.violations(model_config, world_size)
        if found:  # there is no telling the data-parallel ranks
            return found + self.watch.violations(world_size)
        ranks, stages = self.parallel.tensor_model_parallel_size, self.parallel.pipeline_model_parallel_size
        found = self.fp8.model_violations(model_config, ranks, stages) + self.data.violations(self.dp_size(world_size))
        return found + self.watch.violations(world_size)

    def node_violations(self, processes: int) -> list[str]:
        """Every broken rule about the processes of one node."""
        return []

    def dp_size(self, world_size: int) -> int:
        """Data-parallel ranks of a legal layout."""
        return world_size // (self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size)

    def _offload_violations(self) -> list[str]:
        if not self.optimizer.optimizer_cpu_offload:
            return []
        found = []
        if self.model.fp32:
            found.append("optimizer_cpu_offload moves the fp32 copies of bf16 weights, and fp32 has none; use bf16")
        if not self.parallel.use_distributed_optimizer:
            found.append("optimizer_cpu_offload needs use_distributed_optimizer, also for one rank")
        return found

    def _fp8_violations(self) -> list[str]:
        found = []
        if self.fp8.fp8_format is None:
            return found
        if self.model.fp32:
            found.append("fp8_format and fp32 are both set; FP8 multiplies bf16 weights: leave fp32 away")
        if self.fp8.fp8_param_gather:
            if self.optimizer.optimizer_cpu_offload:
                found.append("fp8_param_gather does not go with optimizer_cpu_offload; leave one of them away")
            if not self.parallel.use_distributed_optimizer:
                found.append("fp8_param_gather needs use_distributed_optimizer, which casts its weights to FP8")
        return found


@dataclass(kw_only=True, slots=True)
class SFTConfig(StageConfig):
    """Stage 1, cold-start SFT."""

    loss: LossConfig = field(default_factory=LossConfig)

    def violations(self) -> list[str]:
        """Every broken rule that needs neither the model's files nor the number of processes."""
        found = StageConfig.violations(self)
        if self.optimizer.optimizer_cpu_offload and self.loss.learnable_temperature:
            found.append("optimizer_cpu_offload does not go with learnable_temperature, whose fp32 weight has no copy")
        budgets = (self.data.max_tokens_per_micro_batch, self.data.max_patches_per_micro_batch)
        if not self.loss.cached_contrastive and budgets != (None, None):
            found.append(
                "no-cached-contrastive compares the pairs of one micro-batch over all ranks, which must hold equally "
                "many: leave max_tokens_per_micro_batch and max_patches_per_micro_batch unset, or use "
                "--cached-contrastive"
            )
        return found

    def layout_violations(self, model_config: Qwen2VLConfig, world_size: int) -> list[str]:
        """Every broken rule between the model, the layout and the number of processes."""
        found = StageConfig.layout_violations(self, model_config, world_size)
        if found or not self.parallel.num_layers_per_virtual_pipeline_stage:
            return found
        pairs, dp_size = self.data.global_batch_size, self.dp_size(world_size)
        stages = self.parallel.pipeline_model_parallel_size
        if pairs // dp_size % stages:
            found.append(
                f"global_batch_size={pairs} gives each of {dp_size} data-parallel ranks {pairs // dp_size} pairs; the "
                f"interleaved schedule needs a multiple of the {stages} pipeline stages, e.g. "
                f"{(pairs // dp_size // stages + 1) * stages * dp_size}"
            )
        return found
