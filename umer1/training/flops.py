"""Model FLOPs of an SFT step, from the batch as it is: what MFU divides by the peak and what pairs are balanced by.

Counted: matrix products of decoder, ViT, merger and of the logits that are made; backward twice the forward.  Not
counted: recomputation and the first pass of cached contrastive, which are the price of memory and not the model's.
"""

import torch

from umer1.data.packing import sequences_of
from umer1.data.processor import IGNORE
from umer1.data.schema import EncodedPair, PackedBatch
from umer1.models.qwen2_vl.config import Qwen2VLConfig

# Dense bf16 FLOP/s of the data sheets, by a word of the device's name; MFU is reported for these alone.
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, None when it is not known (a CPU, say)."""
    return next((peak for word, peak in PEAK_BF16.items() if word in device_name), None)


def attention_flops(lengths: torch.Tensor, width: int, causal: bool) -> float:
    """Forward FLOPs of q k^T and p v for segments of these lengths."""
    return 4.0 * width * float((lengths.double() ** 2).sum()) * (0.5 if causal else 1.0)


def sequence_flops(
    lengths: torch.Tensor, grid_thw: torch.Tensor, num_logits: int, config: Qwen2VLConfig
) -> tuple[float, float, float]:
    """(decoder, ViT, logits) FLOPs of one forward; merger counted with the decoder (it is trained).

    lengths: int [S], tokens of each sequence (causal attention within it).  grid_thw: int [V, 3], their images and
    videos in patches (attention within each step of a video).  num_logits: rows of which logits are made.
    Linear in tokens and patches but for attention, which is quadratic in a sequence's tokens and in a frame's patches.
    """
    hidden, head = config.hidden_size, config.head_dim
    query, key_value = config.num_attention_heads * head, config.num_query_groups * head
    per_token = 2.0 * hidden * (2 * query + 2 * key_value + 3 * config.ffn_hidden_size)
    decoder = config.num_layers * (float(lengths.sum()) * per_token + attention_flops(lengths, query, True))
    vision = config.vision
    patches = float(grid_thw.prod(-1).sum()) if grid_thw.numel() else 0.0
    width, merged = vision.embed_dim, vision.embed_dim * vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    decoder += 2.0 * patches / vision.spatial_merge_size**2 * merged * (merged + hidden)
    vit = 2.0 * patches * width * patch
    if patches:
        frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        block = patches * 2.0 * width * width * (4 + 2 * vision.mlp_ratio)
        vit += vision.depth * (block + attention_flops(frames, width, False))
    return decoder, vit, 2.0 * num_logits * hidden * config.vocab_size


def forward_flops(batch: PackedBatch, config: Qwen2VLConfig) -> tuple[float, float, float]:
    """`sequence_flops` of a batch, padding included."""
    return sequence_flops(batch.cu_seqlens.diff(), batch.grid_thw, len(batch.supervised_rows), config)


def training_flops(forward: tuple[float, float, float], train_vision: bool) -> float:
    """FLOPs of one forward and backward, of what one forward takes; a frozen ViT has no backward."""
    decoder, vit, logits = forward
    return 3 * (decoder + logits) + (3 if train_vision else 1) * vit


def step_flops(batches: list[PackedBatch], config: Qwen2VLConfig, train_vision: bool) -> float:
    """FLOPs of one forward and backward over these micro-batches."""
    return sum(training_flops(forward_flops(batch, config), train_vision) for batch in batches)


def pair_flops(pair: EncodedPair, config: Qwen2VLConfig, train_vision: bool) -> float:
    """A pair's share of `step_flops`: the modelled cost that pairs are shared out by."""
    sides = sequences_of(pair)
    lengths = torch.tensor([len(side) for side in sides])
    supervised = sum(int((side.labels != IGNORE).sum()) for side in (pair.query, pair.positive))
    grids = torch.cat([side.grid_thw for side in sides])
    return training_flops(sequence_flops(lengths, grids, supervised, config), train_vision)
