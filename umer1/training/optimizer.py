"""Megatron's optimizer and learning-rate schedule, and the step that refuses a non-finite gradient on all ranks."""

import math
from dataclasses import dataclass

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from umer1.distributed.optimizer_offload import gradients_apart, move_to_host


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule"""

    train_iters: int = 5000
    """Optimizer steps in all."""
    lr: float = 5e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "cosine"
    """cosine, linear or constant."""
    lr_warmup_iters: int | None = None
    """Steps of linear warm-up; when it is not given, lr_warmup_fraction decides."""
    lr_warmup_fraction: float = 0.03
    """Share of train_iters that is warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms are left out."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    optimizer_cpu_offload: bool = False
    """Keep AdamW's moments and the fp32 main weights of bf16 ones in host memory and update them there."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    max_consecutive_skips: int = 5
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""

    @property
    def warmup_steps(self) -> int:
        if self.lr_warmup_iters is not None:
            return self.lr_warmup_iters
        return math.ceil(self.lr_warmup_fraction * self.train_iters)

    def violations(self) -> list[str]:
        problems = []
        if self.train_iters < 1:
            problems.append(f"train_iters={self.train_iters} must be 1 or above")
        if self.lr_decay_style not in ("cosine", "linear", "constant"):
            problems.append(f"lr_decay_style={self.lr_decay_style!r} is not legal; use cosine, linear or constant")
        if not (math.isfinite(self.lr) and self.lr > 0):
            problems.append(f"lr={self.lr} must be above 0")
        elif not 0 <= self.min_lr <= self.lr:
            problems.append(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        if not 0 <= self.lr_warmup_fraction <= 1:
            problems.append(f"lr_warmup_fraction={self.lr_warmup_fraction} must lie between 0 and 1")
        elif self.train_iters >= 1 and not 0 <= self.warmup_steps <= self.train_iters:
            problems.append(
                f"lr_warmup_iters={self.warmup_steps} must lie between 0 and train_iters={self.train_iters}"
            )
        for name in ("weight_decay", "clip_grad"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                problems.append(f"{name}={getattr(self, name)} must be 0 or above")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if not self.adam_eps > 0:
            problems.append(f"adam_eps={self.adam_eps} must be above 0")
        if self.max_consecutive_skips < 1:
            problems.append(f"max_consecutive_skips={self.max_consecutive_skips} must be 1 or above")
        return problems


def build_optimizer(config: OptimizerConfig, models: list[torch.nn.Module], *, use_distributed_optimizer: bool):
    """Megatron's AdamW over DDP-wrapped chunks (fp32 main weights for bf16 parameters), and its scheduler."""
    dtype = next(models[0].parameters()).dtype
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=models[0].ddp_config.overlap_param_gather,
        # Says how FP8 weights are laid out; there are none without this.
        fp8_recipe=models[0].config.fp8_recipe if models[0].ddp_config.fp8_param_gather else None,
    )
    if config.optimizer_cpu_offload:
        for model in models:  # room for the main weights, which megatron makes on the device
            model.offload_grad_buffers()
    # The standard overrides take biases and norms out of weight decay.
    overrides = get_standard_config_overrides(megatron_config)
    optimizer = get_megatron_optimizer(
        megatron_config, models, config_overrides=overrides, use_gloo_process_groups=False
    )
    if config.optimizer_cpu_offload:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            move_to_host(part)
        for model in models:
            model.restore_grad_buffers()
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(config.train_iters, config.warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        # A decay of the weight decay itself is of no use here, but the scheduler is where megatron reads its value.
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def step_if_finite(optimizer, clip_grad: float, loss_is_finite: bool) -> tuple[bool, float]:
    """(whether the parameters moved, global gradient norm); the same answer on every rank.

    The norm is reduced over all ranks that hold a part of the gradient, so a NaN anywhere is a NaN everywhere.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (loss_is_finite and math.isfinite(norm)):
        return False, norm
    if clip_grad > 0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            parameters = part.get_parameters()
            if parameters:
                megatron_optimizer.clip_grad_by_total_norm_fp32(
                    parameters, clip_grad, norm, use_decoupled_grad=gradients_apart(part)
                )
    optimizer.step_with_ready_grads()
    return True, norm
