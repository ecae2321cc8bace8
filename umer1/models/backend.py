"""Which modules the transformers are built of: Transformer Engine's on CUDA when installed, megatron's local ones else.

Of fp32 weights always the local ones: Transformer Engine multiplies fp32 as TF32, and its attention kernels for packed
sequences take 16-bit types alone.  This is the one place that chooses.  FP8 (umer1/models/fp8.py) is settings of
TransformerConfig that only the layers of `get_gpt_layer_with_transformer_engine_spec` read.
"""

import copy
import functools
import logging
from typing import Literal

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from umer1 import device as devices
from umer1.distributed.parallel import launched_rank
from umer1.errors import UserError
from umer1.models.attention import PackedCoreAttention

logger = logging.getLogger(__name__)

CoreAttentionName = Literal["auto", "sdpa", "te"]


class _RMSNorm(torch.autograd.Function):
    """weight * (x / rms(x)).to(x.dtype), statistics in fp32: the order of rounding of transformers' Qwen2RMSNorm."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, scale, weight = ctx.saved_tensors
        normed = x.float() * scale
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            inner = (grad * weight).float()
            mean = (inner * normed).mean(-1, keepdim=True)
            grad_x = inner.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class RMSNorm(nn.Module):
    """RMS norm whose weight's gradient is summed over sequence-parallel ranks by megatron."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=devices.device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose parameters' gradients are summed over sequence-parallel ranks by megatron."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused):
        super().__init__(hidden_size, eps, dtype=config.params_dtype, device=devices.device())
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel


def uses_te_layers(dtype: torch.dtype) -> bool:
    """Whether layers with weights of `dtype` are Transformer Engine's."""
    return devices.has_te() and dtype != torch.float32


def _obstacle() -> str:
    obstacle = devices.te_obstacle()
    return f" ({obstacle})" if obstacle else ""


@functools.cache
def _tell_local(obstacle: str) -> None:
    if launched_rank() == 0:
        logger.warning("megatron-core's own layers in place of Transformer Engine's: %s", obstacle)


def uses_te_attention(core_attention: CoreAttentionName, dtype: torch.dtype) -> bool:
    """Whether the attention kernel is Transformer Engine's.  Raises UserError when it is asked for and can't be."""
    if core_attention == "te" and not uses_te_layers(dtype):
        raise UserError(
            f"core_attention=te needs a CUDA device, the package transformer_engine and weights of 16 bits, these are "
            f"{dtype}{_obstacle()}; use auto or sdpa"
        )
    return core_attention != "sdpa" and uses_te_layers(dtype)


def gradient_fusion_violations(asked: bool, dtype: torch.dtype) -> list[str]:
    """What this machine lacks for gradient_accumulation_fusion of weights of `dtype`."""
    if not asked or uses_te_layers(dtype) or devices.has_apex_gradient_kernel():
        return []
    return [
        "gradient_accumulation_fusion needs a CUDA device with the package transformer_engine and bf16 weights, or "
        f"with apex built with --cuda_ext{_obstacle()}; leave it away"
    ]


def for_own_linears(config: TransformerConfig) -> TransformerConfig:
    """`config` for megatron's linears outside transformer layers: they fuse gradients' accumulation by apex alone."""
    if config.gradient_accumulation_fusion and not devices.has_apex_gradient_kernel():
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False
    return config


def block_submodules(
    config: TransformerConfig, num_layers: int, *, causal: bool, final_norm: bool, core_attention: CoreAttentionName
) -> TransformerBlockSubmodules:
    """`num_layers` equal layers for megatron's TransformerBlock, and the norm after them if `final_norm`."""
    rms = config.normalization == "RMSNorm"
    norm = RMSNorm if rms else LayerNorm
    if devices.has_cuda() and not devices.has_te() and config.params_dtype != torch.float32:
        _tell_local(devices.te_obstacle())
    spec = _te_layer() if uses_te_layers(config.params_dtype) else _local_layer(norm, config.normalization)
    attention = spec.submodules.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    kernel = None
    if uses_te_attention(core_attention, config.params_dtype):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention as kernel
    attention.submodules.core_attention = functools.partial(PackedCoreAttention, kernel=kernel)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm if final_norm else None)


def _te_layer() -> ModuleSpec:
    # Norms are fused into the linear layers behind them.
    return get_gpt_layer_with_transformer_engine_spec()


def _local_layer(norm: type[nn.Module], normalization: str) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization=normalization)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    return spec
