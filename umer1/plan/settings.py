"""The settings of a plan: those of training as they stand, and what only a plan asks."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from umer1.errors import UserError
from umer1.models.fp8 import FP8Config
from umer1.plan.hardware import HARDWARE, find_hardware
from umer1.plan.shapes import ShapeName
from umer1.plan.workload import Side
from umer1.rules import bound_problems
from umer1.training.config import SFTConfig
from umer1.training.policy_config import GRPOConfig

_MOST_PROCESSES = 1 << 18


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """The cluster, and what is assumed about data and speed"""

    world_size: int = 8
    """Processes of the run, one a device."""
    gpus_per_node: int = 8
    """Devices of one node: ranks are counted node by node."""
    hardware: str = "h100"
    """h100, h200, b200, a100 or cpu: memory and peak rate of one device."""
    shape: ShapeName | None = None
    """The model by name, in place of --hf-model's config.json."""
    text_tokens: int = 160
    """Assumed tokens of a side's prompt, pictures left out."""
    response_tokens: int = 520
    """Assumed tokens of a side's response: the published SFT file has about 2,080 characters a side."""
    patches_per_side: int = 1564
    """Assumed patches of a side's pictures: one of 640 x 480 pixels."""
    rollout_tokens: int = 403
    """Assumed tokens of a GRPO response: the mean that UME-R1-2B is reported with."""
    assumed_utilisation: float = 0.4
    """Assumed share of the device's peak that all executed matrix products reach together."""
    assumed_host_bandwidth: float = 40e9
    """Assumed bytes/s of a rank's optimizer in host memory, copies to and from the device included."""
    assumed_bandwidth: float = 0.5
    """Assumed share of the memory's bandwidth that decoding reaches."""

    def violations(self) -> list[str]:
        found = []
        found += bound_problems(self, 1, "world_size", "gpus_per_node", "text_tokens", "rollout_tokens")
        found += bound_problems(self, 0, "response_tokens", "patches_per_side")
        if self.world_size > _MOST_PROCESSES:
            found.append(f"world_size={self.world_size} must be at most {_MOST_PROCESSES:,}")
        if self.patches_per_side % 4:
            found.append(f"patches_per_side={self.patches_per_side} must be a multiple of 4: 2 x 2 make a token")
        for name in ("assumed_utilisation", "assumed_bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                found.append(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        if not self.assumed_host_bandwidth > 0:
            found.append(f"assumed_host_bandwidth={self.assumed_host_bandwidth} must be above 0")
        try:
            find_hardware(self.hardware)
        except UserError as error:
            found.append(str(error).removeprefix("--"))
        return found

    @property
    def on_gpus(self) -> bool:
        """What decides the settings that are left to the hardware."""
        return self.hardware.lower() != "cpu"

    @property
    def processes_of_node(self) -> int:
        return min(self.gpus_per_node, self.world_size)

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.world_size / self.gpus_per_node)

    def device_violations(self, fp8: FP8Config) -> list[str]:
        """What the named device lacks for FP8, which the training program would be told by its own."""
        if fp8.fp8_format is None or self.hardware.lower() not in HARDWARE:
            return []
        device = find_hardware(self.hardware)
        if device.capability is None:
            return [f"fp8_format needs a GPU; hardware={self.hardware} has none"]
        return fp8.device_violations(device.name, device.capability)

    def side(self, *, response: int) -> Side:
        """A side as it is assumed."""
        return Side(text=self.text_tokens, response=response, patches=self.patches_per_side)


def without_files(config: Any) -> Any:
    """The same settings with nothing said about data, checkpoints and exports: a plan looks at no such path."""
    fields = {
        "model": replace(config.model, export_hf=None),
        "data": replace(config.data, data_path=None, data_root=None),
        "checkpoint": replace(config.checkpoint, save=None, load=None, ckpt_step=None, finetune=False),
    }
    if isinstance(config, GRPOConfig):
        fields["heldout"] = replace(config.heldout, eval_data_path=None, eval_data_root=None)
    return replace(config, **fields)


@dataclass(kw_only=True, slots=True)
class SFTDryRunConfig(SFTConfig):
    """Settings of SFT and of its plan."""

    plan: PlanConfig = field(default_factory=PlanConfig)

    def violations(self) -> list[str]:
        return SFTConfig.violations(self) + self.plan.device_violations(self.fp8)


@dataclass(kw_only=True, slots=True)
class GRPODryRunConfig(GRPOConfig):
    """Settings of GRPO and of its plan."""

    plan: PlanConfig = field(default_factory=PlanConfig)

    def violations(self) -> list[str]:
        return GRPOConfig.violations(self) + self.plan.device_violations(self.fp8)


@dataclass(kw_only=True, slots=True)
class SFTPlanConfig(SFTDryRunConfig):
    """The same, without a look at paths."""

    def violations(self) -> list[str]:
        return SFTDryRunConfig.violations(without_files(self))


@dataclass(kw_only=True, slots=True)
class GRPOPlanConfig(GRPODryRunConfig):
    """The same, without a look at paths."""

    def violations(self) -> list[str]:
        return GRPODryRunConfig.violations(without_files(self))


def training_part(config: SFTDryRunConfig | GRPODryRunConfig) -> SFTConfig | GRPOConfig:
    """What the training program would have read."""
    training_class = SFTConfig if isinstance(config, SFTConfig) else GRPOConfig
    return training_class(**{item.name: getattr(config, item.name) for item in fields(training_class)})
