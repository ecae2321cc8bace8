"""Model FLOPs of an SFT step, from the batch as it is: what MFU divides by the peak.

Counted: matrix products of decoder, ViT, merger and of the logits that are made; backward twice the forward.  Not
counted: recomputation and the first pass of cached contrastive, which are the price of memory and not the model's.
"""

import torch

from umer1.data.schema import PackedBatch
from umer1.models.qwen2_vl.config import Qwen2VLConfig

# Dense bf16 FLOP/s of the data sheets, by a word of the device's name; MFU is reported for these alone.
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, None when it is not known (a CPU, say)."""
    return next((peak for word, peak in PEAK_BF16.items() if word in device_name), None)


def attention_flops(lengths: torch.Tensor, width: int, causal: bool) -> float:
    """Forward FLOPs of q k^T and p v for segments of these lengths."""
    return 4.0 * width * float((lengths.double() ** 2).sum()) * (0.5 if causal else 1.0)


def forward_flops(batch: PackedBatch, config: Qwen2VLConfig) -> tuple[float, float, float]:
    """(decoder, ViT, logits) FLOPs of one forward over the batch; merger counted with the decoder (it is trained)."""
    hidden, head = config.hidden_size, config.head_dim
    query, key_value = config.num_attention_heads * head, config.num_query_groups * head
    per_token = 2.0 * hidden * (2 * query + 2 * key_value + 3 * config.ffn_hidden_size)
    lengths = batch.cu_seqlens.diff()
    decoder = config.num_layers * (len(batch.input_ids) * per_token + attention_flops(lengths, query, True))
    vision = config.vision
    patches = float(batch.grid_thw.prod(-1).sum()) if batch.grid_thw.numel() else 0.0
    width, merged = vision.embed_dim, vision.embed_dim * vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    decoder += 2.0 * patches / vision.spatial_merge_size**2 * merged * (merged + hidden)
    vit = 2.0 * patches * width * patch
    if patches:
        frames = torch.repeat_interleave(batch.grid_thw[:, 1] * batch.grid_thw[:, 2], batch.grid_thw[:, 0])
        block = patches * 2.0 * width * width * (4 + 2 * vision.mlp_ratio)
        vit += vision.depth * (block + attention_flops(frames, width, False))
    return decoder, vit, 2.0 * len(batch.supervised_rows) * hidden * config.vocab_size


def step_flops(batches: list[PackedBatch], config: Qwen2VLConfig, train_vision: bool) -> float:
    """FLOPs of one forward and backward over these micro-batches."""
    total = 0.0
    for batch in batches:
        decoder, vit, logits = forward_flops(batch, config)
        total += 3 * (decoder + logits) + (3 if train_vision else 1) * vit
    return total
