"""What `examples/pretrain_sft.py` is configured by: the sections of their owners, and the rules between them."""

from dataclasses import dataclass, field

from umer1.data.loader import DataConfig
from umer1.distributed.parallel import ParallelConfig
from umer1.losses.contrastive import LossConfig
from umer1.training.build import ModelConfig
from umer1.training.checkpoint import CheckpointConfig
from umer1.training.metrics import LoggingConfig
from umer1.training.optimizer import OptimizerConfig


@dataclass(kw_only=True, slots=True)
class SFTConfig:
    """Stage 1, cold-start SFT."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def violations(self) -> list[str]:
        """Every broken rule that needs neither the model's files nor the number of processes."""
        parts = (self.model, self.data, self.loss, self.optimizer, self.checkpoint, self.logging)
        return [problem for part in parts for problem in part.violations()]
