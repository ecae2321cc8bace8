"""Bytes that one transformer layer keeps for its backward pass, and what it takes beside them while it runs.

Counted tensor by tensor from the modules as they are (megatron-core 0.16.1's local layers with umer1's norms, rotation
and packed attention); perf/plan_memory.py compares the sums with what torch's allocator hands out.  `a` is the size of
one activation, widths are those of one tensor-parallel rank:

    h  hidden size         q  query heads x head size      k  KV heads x head size       f  FFN width

Megatron's gated MLP adds an offset of 0 to the linear half, a copy of f; Transformer Engine's layers keep the same
tensors otherwise: a norm's input and output, both of fc1's halves, and the attention's query, key, value and output.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from umer1.distributed.parallel import ParallelConfig
from umer1.models.attention import SDPAPlan
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.plan.fp8 import saved_change

Kernel = Literal["sdpa", "te"]


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of one layer for one micro-batch."""

    saved: int
    """Kept from forward to backward, the layer's input included."""
    forward: int
    """Most that a forward without graph takes beside its input."""
    backward: int
    """Most that a backward takes beside what was saved, the gradient that comes in included; may be below 0."""
    attention_dropped: int
    """What selective recomputation saves of `saved`."""
    input: int
    """The residual stream between two layers."""
    fp8_change: int = 0
    """What FP8 adds to `saved` (mostly takes from it), for its layers among those that stay in bf16."""


def attention_slots(cu_seqlens: torch.Tensor, *, causal: bool, kernel: Kernel) -> tuple[int, bool]:
    """(token slots that the kernel works on, whether they are a padded copy) of packed sequences."""
    if kernel == "te":
        return int(cu_seqlens[-1]), False
    plan = SDPAPlan(cu_seqlens, causal=causal)
    return sum(count * width for count, width in plan.shapes), plan.index is not None


def _attention(tokens: int, slots: int, padded: bool, q: float, k: float, heads: float, a: int) -> tuple[float, float]:
    """(bytes kept of the core attention, of them what goes when it is recomputed)"""
    statistics = 4 * heads * slots  # log-sum-exp
    if padded:  # padded copies of rotated query and key, of value and of the output, and the output cut to tokens
        kept = a * (slots * (2 * q + 2 * k) + tokens * q) + statistics
    else:  # rotated query and key; the value is a view of the whole projection; the output
        kept = a * tokens * (q + k + (q + 2 * k) + q) + statistics
    # Recomputed: the projection, query made contiguous, and the output stay.
    return kept, kept - a * tokens * (3 * q + 2 * k)


def decoder_layer(
    config: Qwen2VLConfig,
    parallel: ParallelConfig,
    cu_seqlens: torch.Tensor,
    *,
    itemsize: int,
    kernel: Kernel,
    fp8: FP8Config,
) -> LayerBytes:
    """Of the decoder; cu_seqlens bounds the packed sequences, padding included."""
    tp, a = parallel.tensor_model_parallel_size, itemsize
    tokens = int(cu_seqlens[-1])
    tokens += -tokens % tp if parallel.sequence_parallel else 0
    shard = tokens // tp if parallel.sequence_parallel else tokens  # of norms and residuals
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim / tp
    k, f = config.num_query_groups * config.head_dim / tp, config.ffn_hidden_size / tp
    slots, padded = attention_slots(cu_seqlens, causal=True, kernel=kernel)
    attention, dropped = _attention(tokens, slots, padded, q, k, config.num_attention_heads / tp, a)
    norms = shard * (4 * h * a + 2 * 4)  # two inputs, two outputs, their fp32 scales
    gathered = a * h * tokens if parallel.sequence_parallel else 0  # of a column-parallel layer's input
    saved = norms + attention + 5 * f * a * tokens
    forward = max(5 * f * a * tokens + 4 * h * a * shard, attention + (q + 2 * k + h) * a * tokens) + gathered
    weight = a * 2 * f * h
    backward = max(
        (2 * f * tokens + 2 * h * shard) * a,  # of silu(gate) * up: three gradients of f, the product is gone
        (-3 * f * tokens + 2 * h * shard) * a + weight,  # of fc1: its weight's gradient, and 2 f that come in
    )
    change = saved_change(fp8, norms=2 * h * shard, attention=q * tokens, product=f * tokens, itemsize=a)
    return LayerBytes(int(saved), int(forward), int(backward + gathered), int(dropped), a * h * shard, change)


def vision_layer(
    config: Qwen2VLConfig, parallel: ParallelConfig, grid_thw: torch.Tensor, *, itemsize: int, kernel: Kernel
) -> LayerBytes:
    """Of the ViT, which is never sequence-parallel; grid_thw int64 [V, 3] of the pictures that a rank sees."""
    vision, tp, a = config.vision, parallel.vision_tensor_parallel_size, itemsize
    frames = [height * width for times, height, width in grid_thw.tolist() for _ in range(times)]
    bounds = torch.tensor([0, *itertools.accumulate(frames)])
    patches, e = int(bounds[-1]), vision.embed_dim
    q, f = e / tp, vision.ffn_hidden_size / tp
    slots, padded = attention_slots(bounds, causal=False, kernel=kernel)
    attention, dropped = _attention(patches, slots, padded, q, q, vision.num_heads / tp, a)
    saved = patches * (4 * e * a + 4 * 4) + attention + 3 * f * a * patches
    forward = patches * a * max(3 * f + 5 * e, 6 * e + 3 * q) + (0 if 3 * f > 3 * q + e else attention)
    backward = patches * a * (2 * f + 2 * e)  # of x * sigmoid(1.702 x): three gradients of f, the product is gone
    return LayerBytes(int(saved), int(forward), int(backward), int(dropped), a * e * patches)
