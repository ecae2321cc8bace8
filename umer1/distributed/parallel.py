"""How a run is laid out over processes: the settings, their rules, and the process groups."""

import copy
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import umer1.megatron_import  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from umer1 import device as devices
from umer1.distributed import megatron_cpu
from umer1.errors import ConfigError, UserError

if TYPE_CHECKING:
    from umer1.models.qwen2_vl.config import Qwen2VLConfig


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How model and data are divided over processes."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights; must divide attention heads, KV heads and FFN width."""
    pipeline_model_parallel_size: int = 1
    """Ranks that the decoder's layers are cut into, in order; the ViT lives on the first."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per virtual stage of the interleaved schedule; unset: no interleaving."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline rank, fewer than the others' to make room for the ViT; unset: an equal split."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline rank, fewer than the others' to make room for the head; unset: an equal split."""
    context_parallel_size: int = 1
    """Ranks that one sequence is cut over: not supported, 1 is the only legal value."""
    sequence_parallel: bool = False
    """Cut norms and residuals over the tensor-parallel ranks along the sequence; needs tensor parallelism."""
    vision_data_parallel: bool = True
    """Under tensor parallelism each rank has the whole ViT and merger and sees its share of a micro-batch's pictures
    and frames; the features are gathered.  Off: the ViT's weights are cut, and each rank sees all pictures."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations computed again in the backward pass: full = whole layers, selective = attention alone."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recomputation: uniform = every group of recompute_num_layers, block = that many layers at
    the start of each stage."""
    recompute_num_layers: int | None = None
    """With full recomputation: layers per recomputed group (uniform) or recomputed layers (block); default 1."""
    use_distributed_optimizer: bool = True
    """Cut optimizer states over the data-parallel ranks."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients over data-parallel ranks while the backward pass runs.  Unset: on GPUs with
    use_distributed_optimizer and more than one data-parallel rank."""
    overlap_param_gather: bool | None = None
    """Gather updated weights while the next forward pass runs; needs use_distributed_optimizer, overlap_grad_reduce.
    Unset: as overlap_grad_reduce is by default."""
    gradient_accumulation_fusion: bool = False
    """Let products add weights' gradients to the fp32 buffer themselves, instead of by way of a bf16 tensor; needs a
    GPU with Transformer Engine, or apex built with --cuda_ext.  Never measured here, therefore off."""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    """CUDA graphs of the training step: not supported with packed micro-batches, none is the only legal value.  vLLM's
    rollouts are captured in graphs on GPUs in any case."""
    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that some rank did not join ends the run."""

    @property
    def vision_tensor_parallel_size(self) -> int:
        """Ranks that the ViT's and the merger's weights are cut over."""
        return 1 if self.vision_data_parallel else self.tensor_model_parallel_size

    @property
    def overlapped(self) -> str:
        """The data-parallel communication that something runs beside, in words."""
        found = ["gradients' reduction with the backward"] if self.overlap_grad_reduce else []
        found += ["weights' gather with the next forward"] if self.overlap_param_gather else []
        return ", ".join(found) or "nothing"

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Virtual stages per pipeline rank for a decoder of `num_layers`; None without interleaving."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage

    def resolve(self, world_size: int, *, gpu: bool) -> None:
        """Decide, in place, what is left to the hardware; what was given stays.

        On gloo overlapping gains nothing: the same cores reduce and compute.
        """
        model_size = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        pays = gpu and self.use_distributed_optimizer and world_size > model_size
        if self.overlap_grad_reduce is None:
            self.overlap_grad_reduce = pays
        if self.overlap_param_gather is None:
            self.overlap_param_gather = pays and self.overlap_grad_reduce

    def violations(self, model_config: "Qwen2VLConfig | None" = None, world_size: int | None = None) -> list[str]:
        """Every rule broken, with the legal values; rules about the model or the world need these given."""
        found = []
        if self.context_parallel_size != 1:
            found.append(
                f"context_parallel_size={self.context_parallel_size} is not supported; use 1, and tensor or pipeline "
                "parallelism for long inputs"
            )
        if sizes := self._size_violations():
            return found + sizes
        model_size = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        if world_size is not None and world_size % model_size:
            found.append(
                f"tensor_model_parallel_size={self.tensor_model_parallel_size} times pipeline_model_parallel_size="
                f"{self.pipeline_model_parallel_size} must divide the number of processes, {world_size}; start "
                f"{model_size} processes or a multiple (torchrun --nproc-per-node)"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            found.append("sequence_parallel needs tensor_model_parallel_size of 2 or more")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            found.append("overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce")
        if self.cuda_graph_impl != "none":
            found.append(
                f"cuda_graph_impl={self.cuda_graph_impl} is not supported: a graph is replayed with the shapes and "
                "lengths that it was captured with, and packed micro-batches differ in both; use none"
            )
        if self.recompute_granularity != "full":
            found += [
                f"{name}={value} needs recompute_granularity=full"
                for name in ("recompute_method", "recompute_num_layers")
                if (value := getattr(self, name)) is not None
            ]
        if model_config is not None:
            found += self._tensor_violations(model_config)
            found += self._pipeline_violations(model_config.num_layers) or self._recompute_violations(
                model_config.num_layers
            )
        return found

    def _size_violations(self) -> list[str]:
        found = []
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "distributed_timeout_minutes")
        optional = ("num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers")
        optional += ("decoder_last_pipeline_num_layers", "recompute_num_layers")
        for name in names + optional:
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}={value} must be at least 1")
        return found

    def _tensor_violations(self, model: "Qwen2VLConfig") -> list[str]:
        size = self.tensor_model_parallel_size
        parts = {
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "intermediate_size": model.ffn_hidden_size,
        }
        if not self.vision_data_parallel:
            parts |= {
                "vision num_heads": model.vision.num_heads,
                "vision FFN size": model.vision.ffn_hidden_size,
                "vision merger width": model.vision.merged_dim,
            }
        wrong = [f"{name}={value}" for name, value in parts.items() if value % size]
        if not wrong:
            return []
        common = math.gcd(*parts.values())
        legal = [str(n) for n in range(1, min(common, 64) + 1) if common % n == 0]
        return [f"tensor_model_parallel_size={size} does not divide {', '.join(wrong)}; use {' or '.join(legal)}"]

    def _pipeline_violations(self, layers: int) -> list[str]:
        stages, virtual = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        given = [n for n in (first, last) if n is not None]
        if stages == 1:
            names = ("num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers")
            names += ("decoder_last_pipeline_num_layers",)
            return [
                f"{name}={getattr(self, name)} needs pipeline_model_parallel_size of 2 or more"
                for name in names
                if getattr(self, name) is not None
            ]
        if given and virtual is not None:
            return ["an uneven split (decoder_first/last_pipeline_num_layers) can't be combined with virtual stages"]
        if given:
            left, stages_left = layers - sum(given), stages - len(given)
            if left < stages_left or (stages_left == 0 and left) or (stages_left and left % stages_left):
                return [
                    f"decoder_first_pipeline_num_layers={first} and decoder_last_pipeline_num_layers={last} leave "
                    f"{left} of {layers} layers to {stages_left} other stages; they must divide equally, 1 or more each"
                ]
            return []
        if layers % stages:
            legal = [str(n) for n in range(1, layers + 1) if layers % n == 0]
            return [
                f"pipeline_model_parallel_size={stages} does not divide the {layers} layers; use {' or '.join(legal)}, "
                "or set decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
            ]
        if virtual is not None and ((layers // stages) % virtual or layers // stages == virtual):
            per_stage = layers // stages
            legal = [str(n) for n in range(1, per_stage) if per_stage % n == 0]
            use = f"use {' or '.join(legal)}" if legal else "leave it unset"
            return [
                f"num_layers_per_virtual_pipeline_stage={virtual} must divide the {per_stage} layers of a stage into "
                f"two or more parts; {use}"
            ]
        return []

    def _recompute_violations(self, layers: int) -> list[str]:
        group = self.recompute_num_layers
        if self.recompute_granularity != "full" or group is None or self.recompute_method == "block":
            return []
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        given = [n for n in (first, last) if n is not None]
        others = self.pipeline_model_parallel_size - len(given)
        virtual = self.virtual_pipeline_size(layers) or 1
        sizes = given + ([(layers - sum(given)) // others // virtual] if others else [])
        if all(size % group == 0 for size in sizes):
            return []
        common = math.gcd(*sizes)
        legal = [str(n) for n in range(1, common + 1) if common % n == 0]
        return [
            f"recompute_num_layers={group} must divide the layers of each stage ({', '.join(map(str, sizes))}) with "
            f"recompute_method=uniform; use {' or '.join(legal)}, or recompute_method=block"
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelState:
    """This process's place in the layout, and the groups it belongs to."""

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    dp_size: int
    dp_rank: int
    vision_data_parallel: bool
    """Whether tensor-parallel ranks have whole ViTs and divide pictures (ParallelConfig)."""
    device: torch.device
    groups: ProcessGroupCollection
    """megatron's groups: .tp, .pp, .dp, .embd (first and last stage), .mp and the others."""

    @property
    def vision_groups(self) -> ProcessGroupCollection:
        """The groups that the ViT is built for: where it is whole on each rank, the rank alone is its group."""
        if not self.vision_data_parallel:
            return self.groups
        groups = copy.copy(self.groups)
        groups.tp = self.groups.cp  # contexts are never cut, so that this is a group of one
        return groups

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_global_rank(self.groups.pp, self.pp_size - 1)

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier()


def launched_rank() -> int:
    """Number of this process, known before any group exists (torchrun's RANK, else 0)."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of processes of this run, known before any group exists (torchrun's WORLD_SIZE, else 1)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def init_distributed(config: ParallelConfig, *, seed: int = 1234) -> Iterator[ParallelState]:
    """Join the process groups of `config` and seed every generator; leave them at the end.

    Works under torchrun, inside `umer1.testing.run_distributed` and in a plain process (world size 1).  A default
    group that exists already is used and left in place.  Raises ConfigError when the layout does not fit the world.
    """
    problems = config.violations(world_size=launched_world_size())
    if problems:
        raise ConfigError(problems)
    own_default = not dist.is_initialized()
    if config.tensor_model_parallel_size > 1:
        # One CUDA work queue: what a tensor-parallel layer's communication overlaps with is launched after it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if own_default:
        _init_default_group(timedelta(minutes=config.distributed_timeout_minutes))
    megatron_cpu.enable()
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
            create_gloo_process_groups=False,
        )
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield _current_state(config)
    finally:
        parallel_state.destroy_model_parallel()
        if own_default and dist.is_initialized():
            dist.destroy_process_group()


def _init_default_group(timeout: timedelta) -> None:
    device = devices.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = {"device_id": device} if device.type == "cuda" else {}
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            dist.init_process_group(devices.backend(), timeout=timeout, **place)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes could not find each other: {error}; start them with torchrun") from error
    else:
        dist.init_process_group(
            devices.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, **place
        )


def _current_state(config: ParallelConfig) -> ParallelState:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelState(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_size=groups.tp.size(),
        tp_rank=groups.tp.rank(),
        pp_size=groups.pp.size(),
        pp_rank=groups.pp.rank(),
        dp_size=groups.dp.size(),
        dp_rank=groups.dp.rank(),
        vision_data_parallel=config.vision_data_parallel and groups.tp.size() > 1,
        device=devices.device(),
        groups=groups,
    )
