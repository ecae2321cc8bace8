"""From settings to DDP-wrapped model chunks with a Hugging Face directory's weights in them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from umer1 import device
from umer1.data.mini_mmeb import MINI_BASE
from umer1.distributed.parallel import ParallelConfig, ParallelState
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.export import destination_problem
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import load_hf, unwrap


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which weights, which of them are trained, in which precision"""

    hf_model: str | None = None
    """Hugging Face Qwen2-VL directory to start from; default: the embedded tiny base."""
    train_vision: bool = False
    """Train the ViT too; frozen, it runs once a sample and step.  The merger and the decoder are always trained."""
    fp32: bool = False
    """fp32 weights and arithmetic (the default without a GPU)."""
    bf16: bool = False
    """bf16 weights with fp32 main copies in the optimizer (the default on a GPU)."""
    export_hf: str | None = None
    """Write the trained model here as a Hugging Face directory at the end."""

    def violations(self) -> list[str]:
        found = ["fp32 and bf16 are both set; choose one"] if self.fp32 and self.bf16 else []
        if self.export_hf and (problem := destination_problem(self.export_hf)):
            found.append(problem)  # said now, not after days of training
        return found

    @property
    def params_dtype(self) -> torch.dtype:
        if self.fp32 or self.bf16:
            return torch.float32 if self.fp32 else torch.bfloat16
        return device.default_dtype()

    @property
    def source(self) -> Path:
        """The directory that configuration, tokenizer and first weights come from."""
        return Path(self.hf_model) if self.hf_model else MINI_BASE


def finalize_gradients(models: list[torch.nn.Module], *args: Any, **options: Any) -> None:
    """megatron's reductions after a backward, and the sum over ranks that divided pictures between them."""
    finalize_model_grads(models, *args, **options)
    for core in map(unwrap, models):
        if core.pre_process:
            core.vision.sum_gradients()


def build_training_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    directory: HFDirectory,
    state: ParallelState,
    *,
    learnt_temperature: float | None = None,
    weights_follow: bool = False,
    fp8: FP8Config | None = None,
    working: Callable[[], None] = lambda: None,
) -> list[torch.nn.Module]:
    """This rank's chunks (one a virtual stage), weights loaded, parts frozen, wrapped in megatron's DDP.

    learnt_temperature: where a contrastive temperature that is trained starts.  weights_follow: the directory holds
    none, a checkpoint brings them.  working: called with each tensor that was read.
    """
    chunks = build_model(directory.config, parallel, state, params_dtype=model.params_dtype, fp8=fp8)
    if not weights_follow:
        load_hf(chunks, directory, state, working)
    for chunk in chunks:
        chunk.set_trainable(model.train_vision)
    if learnt_temperature is not None and chunks[-1].post_process:
        # fp32 whatever the model's dtype: bf16 steps of a logarithm would be coarser than its learning rate.
        scale = torch.tensor(-math.log(learnt_temperature), dtype=torch.float32, device=state.device)
        chunks[-1].log_scale = torch.nn.Parameter(scale)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=bool(parallel.overlap_grad_reduce),
        overlap_param_gather=bool(parallel.overlap_param_gather),
        fp8_param_gather=chunks[0].config.fp8_param,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        # Megatron divides by the token count that the losses return: 0, so by nothing.  See forward_step.py.
        chunk.config.finalize_model_grads_func = finalize_gradients
        ddp = DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        if not ddp_config.fp8_param_gather:  # torch does not broadcast FP8 weights; all ranks have read the same files
            ddp.broadcast_params()
        wrapped.append(ddp)
    if parallel.overlap_grad_reduce:
        config = chunks[0].config
        config.no_sync_func = [ddp.no_sync for ddp in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped
