"""What a plan is made for: the model, the settings that decide memory and speed, the layout, and the device."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelConfig
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.frames import Frames
from umer1.plan.activations import Kernel
from umer1.plan.buffers import StateBytes, offloaded, state_bytes
from umer1.plan.fp8 import multiplies_in_fp8, weight_bytes
from umer1.plan.hardware import Hardware
from umer1.plan.layout import Layout
from umer1.plan.parameters import Parameter, stage_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One run, as far as memory and speed go."""

    model: Qwen2VLConfig
    config: Any
    """SFTConfig or GRPOConfig."""
    world_size: int
    hardware: Hardware

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def layout(self) -> Layout:
        return Layout.of(self.parallel, self.model.num_layers, self.world_size)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation; without --fp32 or --bf16 the device decides."""
        model = self.config.model
        if model.fp32 or model.bf16:
            return 4 if model.fp32 else 2
        return 2 if self.hardware.gpu else 4

    @property
    def device(self) -> str:
        return "cuda" if self.hardware.gpu else "cpu"

    @property
    def kernel(self) -> Kernel:
        """The attention kernel: Transformer Engine is taken to be installed where there is a GPU; not for fp32."""
        return "te" if self.hardware.gpu and self.itemsize == 2 else "sdpa"

    @property
    def padding(self) -> int:
        """What a micro-batch's tokens are a multiple of."""
        ranks = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return self.config.fp8.token_multiple(ranks)

    def chunks(self, stage: int) -> list[list[Parameter]]:
        """What a rank of pipeline stage `stage` holds of the model, a list a virtual stage."""
        return stage_parameters(self.model, self.parallel, stage, self.config.model.train_vision)

    def states(self, stage: int, dp_rank: int = 0) -> StateBytes:
        """What stays from step to step on a rank of pipeline stage `stage`."""
        fp8, num_layers = self.config.fp8, self.model.num_layers
        states = state_bytes(
            self.chunks(stage),
            self.parallel,
            stage=stage,
            dp=self.layout.dp,
            itemsize=self.itemsize,
            dp_rank=dp_rank,
            in_fp8=lambda parameter: fp8.fp8_param_gather and multiplies_in_fp8(fp8, parameter, num_layers),
        )
        return offloaded(states, device=self.device) if self.config.optimizer.optimizer_cpu_offload else states

    def fp8_weights(self, stage: int) -> int:
        """What FP8 copies of a rank's matrices take beside its weights, which may be such copies."""
        return weight_bytes(self.config.fp8, self.chunks(stage), self.model.num_layers)

    @property
    def vision_ranks(self) -> int:
        """Tensor-parallel ranks that divide pictures between them."""
        return self.parallel.tensor_model_parallel_size // self.parallel.vision_tensor_parallel_size

    def frames(self, batch: PackedBatch) -> Frames:
        """A micro-batch's frames as tensor-parallel ranks divide them; the rank is the one with most patches."""
        frames = Frames.of(batch.grid_thw, self.model.vision, 0, self.vision_ranks)
        return replace(frames, rank=frames.patches.index(max(frames.patches)))


def batch_bytes(batch: PackedBatch, *, patches: int) -> int:
    """A loaded micro-batch on the device: ids and three positions a token, rows and labels, pixels of `patches`."""
    tensors = [batch.input_ids, batch.position_ids, batch.disc_rows, batch.gen_rows]
    tensors += [batch.supervised_rows, batch.supervised_labels, batch.supervised_sides, batch.target_ids]
    pixels = patches * batch.pixel_values.shape[1] * batch.pixel_values.element_size()
    return pixels + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def num_patches(batch: PackedBatch) -> int:
    """Of all pictures and frames of the micro-batch."""
    return int(batch.grid_thw.prod(-1).sum()) if batch.grid_thw.numel() else 0


def gathered_tokens(batch: PackedBatch) -> int:
    """Of the micro-batch, padding included: what sequence parallelism divides."""
    return int(torch.as_tensor(batch.cu_seqlens)[-1])
