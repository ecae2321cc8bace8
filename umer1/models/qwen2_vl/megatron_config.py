"""megatron's configurations of Qwen2-VL's two transformers."""

from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from umer1.distributed.parallel import ParallelConfig
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.config import Qwen2VLConfig


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the ViT's activation."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": gelu_tanh, "silu": F.silu}


def decoder_config(
    config: Qwen2VLConfig, parallel: ParallelConfig, dtype: torch.dtype, fp8: FP8Config | None = None
) -> TransformerConfig:
    """megatron's configuration of the decoder; the one of the two transformers that FP8 is for."""
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    virtual = parallel.virtual_pipeline_size(config.num_layers)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        # Packed micro-batches differ in length, so stages tell each other the shape before each tensor.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",  # no experts here; megatron asks for it beside variable_seq_lengths
        # Interleaved stages: two neighbours of a stage may be one and the same rank, and batched send/receive pairs
        # are then matched in the wrong order, silently.  Separate calls for each direction are right.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        **_common(parallel, dtype),
        **(fp8.transformer_settings() if fp8 else {}),
    )


def vision_config(config: Qwen2VLConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron's configuration of the ViT: whole on the first pipeline stage, without sequence parallelism."""
    vision = config.vision
    return TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.embed_dim,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=False,
        activation_func=ACTIVATIONS[vision.hidden_act],
        add_bias_linear=True,
        add_qkv_bias=True,
        **_common(parallel, dtype)
        | dict(tensor_model_parallel_size=parallel.vision_tensor_parallel_size)
        | _one_by_one(parallel),
    )


def _one_by_one(parallel: ParallelConfig) -> dict[str, Any]:
    """Full recomputation for the ViT: layer by layer, for the decoder's grouping need not fit its depth."""
    return dict(recompute_method="uniform", recompute_num_layers=1) if parallel.recompute_granularity == "full" else {}


def _common(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    full = parallel.recompute_granularity == "full"
    return dict(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=(parallel.recompute_method or "uniform") if full else None,
        recompute_num_layers=(parallel.recompute_num_layers or 1) if full else None,
        # The loss comes divided; megatron must add gradients up over micro-batches and ranks and divide nothing.
        calculate_per_token_loss=True,
        # Weights are always loaded, never drawn.  Zeros, and not the absence of initialisation: megatron marks a weight
        # as tensor-parallel while it initialises it, and the grad norm depends on the mark.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        embedding_init_method=torch.nn.init.zeros_,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=parallel.gradient_accumulation_fusion,
        persist_layer_norm=False,
    )
