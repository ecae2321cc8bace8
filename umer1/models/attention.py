"""Attention over packed sequences, for training and for generation with a cache of keys and values.

Sequences of different length stand one after the other in T token slots (`cu_seqlens` bounds them).  What all layers
share - rotary angles, how sequences are cut into SDPA calls, where keys go in the cache - is worked out once per
forward pass and travels through megatron's `packed_seq_params`.  Rotation happens here and not in megatron's
SelfAttention: its packed path starts each sequence's angles at position 0 in the fused kernel and asks the host for
lengths in each layer otherwise, and both are of no use to M-RoPE.

The kernel is torch's scaled_dot_product_attention, or Transformer Engine's on CUDA; generation always uses the former.
"""

import copy
from dataclasses import dataclass

import umer1.megatron_import  # noqa: F401

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

# Causal sequences are right-padded to the longest of their bucket; a bucket's shortest is at least this part of it.
BUCKET_RATIO = 0.6


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron's packed parameters with what this module's attention needs beside them."""

    cos: torch.Tensor | None = None
    """float32 [T, 1, head_dim]."""
    sin: torch.Tensor | None = None
    """float32 [T, 1, head_dim / 2]: both halves turn by the same angles."""
    plan: "SDPAPlan | DecodePlan | None" = None
    """How SDPA is called; None when Transformer Engine's kernel is used."""
    cache: "KVCache | None" = None
    slots: tuple[torch.Tensor, torch.Tensor] | None = None
    """(sequence, position) in the cache of each token."""


def packed_sequences(cu_seqlens: torch.Tensor, max_seqlen: int, angles: torch.Tensor, **fields) -> PackedSequences:
    """Parameters for segments bounded by `cu_seqlens` int32 [S + 1]; `angles` float32 [T, head_dim / 2]."""
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        cos=torch.cat([angles, angles], dim=-1).cos().unsqueeze(1),
        sin=angles.sin().unsqueeze(1),
        **fields,
    )


class Rotate(torch.autograd.Function):
    """Rotary embedding in fp32 of [T, heads, d]: the pair (x_i, x_{i + d/2}) turns by angle i; rounded once."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _rotate(grad, *ctx.saved_tensors, -1.0), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    wide = x if x.dtype == torch.float64 else x.float()
    turned = wide * cos
    turned[..., :half].addcmul_(wide[..., half:], sin, value=-direction)
    turned[..., half:].addcmul_(wide[..., :half], sin, value=direction)
    return turned.to(x.dtype)


class _Pad(torch.autograd.Function):
    """[T, ...] -> [padded T, ...] by `index`; `inverse` leads each token to its padded slot.

    A plain gather's backward adds up with atomics; here every token has one slot that counts, so the backward is a
    gather as well.  Slots of padding repeat a real token: their keys come after every real query and their queries'
    outputs are dropped, so they get no gradient.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """[padded T, ...] -> [T, ...] by `inverse`; slots of padding get gradient 0."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.slots = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, inverse, grad), None


class SDPAPlan:
    """Packed sequences as a few batched SDPA calls.

    Causal: sequences are sorted into buckets of similar length and right-padded within a bucket (what comes later
    can't disturb a causal row).  Not causal: only sequences of equal length share a call.
    """

    def __init__(self, cu_seqlens: torch.Tensor, *, causal: bool):
        self.causal = causal
        starts = cu_seqlens[:-1].long().cpu()
        lengths = cu_seqlens[1:].long().cpu() - starts
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        buckets = _buckets(lengths.tolist(), BUCKET_RATIO if causal else 1.0)
        self.shapes = [(len(rows), width) for rows, width in buckets]
        self.index = self.inverse = None
        self.tokens = total = int(lengths.sum())
        if len(buckets) == 1 and total == self.shapes[0][0] * self.shapes[0][1]:
            return
        index, inverse, base = [], torch.empty(total, dtype=torch.long), 0
        for rows, width in buckets:
            first, size = starts[rows, None], lengths[rows, None]
            offsets = torch.arange(width).expand(len(rows), -1)
            slots = first + offsets.minimum(size - 1)
            real = offsets < size
            inverse[slots[real]] = base + real.flatten().nonzero().flatten()
            index.append(slots.flatten())
            base += slots.numel()
        self.index = torch.cat(index).to(cu_seqlens.device)
        self.inverse = inverse.to(cu_seqlens.device)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[T, heads, d], [T, KV heads, d] twice -> [T, heads * d]."""
        if query.shape[0] != self.tokens:
            raise ValueError(f"cu_seqlens bounds {self.tokens} tokens, but there are {query.shape[0]}")
        if self.index is not None:
            query, key, value = (_Pad.apply(x, self.index, self.inverse) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        outputs, base = [], 0
        for count, width in self.shapes:
            rows = slice(base, base + count * width)
            base += count * width
            q, k, v = (x[rows].unflatten(0, (count, width)).transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=scale, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2).reshape(count * width, -1))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output if self.inverse is None else _Unpad.apply(output, self.inverse)


def _buckets(lengths: list[int], ratio: float) -> list[tuple[list[int], int]]:
    """(sequences, longest length) per bucket; a bucket's lengths are at least `ratio` of its longest."""
    if len(set(lengths)) == 1:
        return [(list(range(len(lengths))), lengths[0])]
    buckets: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not buckets or lengths[row] < ratio * buckets[-1][1]:
            buckets.append(([], lengths[row]))
        buckets[-1][0].append(row)
    return buckets


class KVCache:
    """Keys and values of N live sequences for the layers of one model chunk.

    Allocated once for `capacity` tokens a sequence.  The first forward pass with an empty cache is the prefill: segment
    i of the packed batch is sequence i.  Every later pass feeds one token for each sequence, in order.
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (num_sequences, capacity, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.lengths = torch.zeros(num_sequences, dtype=torch.long, device=device)
        self.capacity = capacity
        # The longest sequence, as a Python number so that no step waits for the device.
        self.longest = 0

    @property
    def num_sequences(self) -> int:
        return self.lengths.numel()

    def part(self, start: int, stop: int) -> "KVCache":
        """An empty cache for sequences [start, stop) on this one's memory, to prefill a few prompts at a time."""
        part = copy.copy(self)
        part.keys = [layer[start:stop] for layer in self.keys]
        part.values = [layer[start:stop] for layer in self.values]
        part.lengths, part.longest = torch.zeros_like(self.lengths[start:stop]), 0
        return part

    def extend(self, part: "KVCache", start: int) -> None:
        """Count what the prefill of `part(start, ...)` wrote."""
        self.lengths[start : start + part.num_sequences] = part.lengths
        self.longest = max(self.longest, part.longest)

    def replicate(self, count: int) -> None:
        """`count` copies of each sequence, side by side: 0 0 0 1 1 1 ..."""
        self.select(torch.arange(self.num_sequences, device=self.lengths.device).repeat_interleave(count))

    def select(self, rows: torch.Tensor) -> None:
        """Keep sequences `rows` int64 [M], in that order; a row may stand more than once."""
        rows = rows.to(self.lengths.device)
        self.lengths = self.lengths.index_select(0, rows)
        for layers in (self.keys, self.values):
            for number, old in enumerate(layers):
                new = old.new_zeros(rows.numel(), *old.shape[1:])
                new[:, : self.longest] = old[:, : self.longest].index_select(0, rows)
                layers[number] = new
        self.longest = int(self.lengths.max()) if rows.numel() else 0

    def plan(self, cu_seqlens: torch.Tensor, max_seqlen: int, tokens: int) -> "SDPAPlan | DecodePlan":
        """How the next forward pass of `tokens` tokens attends.  ValueError when it does not fit the cache."""
        if self.longest:
            if tokens != self.num_sequences:
                raise ValueError(f"{tokens} tokens for {self.num_sequences} cached sequences; feed one for each")
            if self.longest == self.capacity:
                raise ValueError(f"the cache is full: capacity {self.capacity} tokens a sequence")
            return DecodePlan(self)
        if cu_seqlens.numel() - 1 != self.num_sequences:
            raise ValueError(f"{cu_seqlens.numel() - 1} prompts for a cache of {self.num_sequences} sequences")
        if max_seqlen > self.capacity:
            raise ValueError(f"a prompt of {max_seqlen} tokens is longer than the cache's capacity {self.capacity}")
        return SDPAPlan(cu_seqlens, causal=True)

    def slots(self, cu_seqlens: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequence, position) int64 [tokens] each, of the tokens of the next forward pass."""
        device = self.lengths.device
        if self.longest:
            return torch.arange(tokens, device=device), self.lengths
        bounds = cu_seqlens.long().to(device)
        rows = torch.repeat_interleave(torch.arange(self.num_sequences, device=device), bounds.diff())
        return rows, torch.arange(tokens, device=device) - bounds[rows]

    def advance(self, cu_seqlens: torch.Tensor, max_seqlen: int) -> None:
        """Count the tokens of a finished forward pass."""
        if self.longest:
            self.lengths = self.lengths + 1
            self.longest += 1
        else:
            self.lengths = cu_seqlens.long().to(self.lengths.device).diff()
            self.longest = max_seqlen


class DecodePlan:
    """One query a sequence against all its cached keys."""

    def __init__(self, cache: KVCache):
        self.width = cache.longest + 1
        positions = torch.arange(self.width, device=cache.lengths.device)
        # [N, 1, 1, width]: the cached keys and the new one.
        self.mask = (positions <= cache.lengths[:, None])[:, None, None]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[N, heads, d] against the cache's [N, capacity, KV heads, d] -> [N, heads * d]."""
        key, value = (x[:, : self.width].transpose(1, 2) for x in (key, value))
        # The heads that share a KV head stand side by side: they become the rows of one small attention.
        grouped = query.unflatten(1, (key.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask, scale=scale).flatten(1)


class PackedCoreAttention(nn.Module):
    """megatron's core attention for packed sequences: rotation, then the kernel chosen at construction.

    `kernel` is None for SDPA or a megatron core-attention class (Transformer Engine's) that takes the same arguments.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *, kernel=None, **own
    ):
        super().__init__()
        self.scale = own.get("softmax_scale")
        self.kernel = None
        if kernel is not None:
            self.kernel = kernel(config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, **own)
        # Set by the model: this layer's place in the chunk, and so in a cache.
        self.cache_layer = 0

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **rest,
    ) -> torch.Tensor:
        """[T, heads, d] and [T, KV heads, d] twice -> [T, heads * d]; causal or not as the plan says."""
        packed = packed_seq_params
        query, key = (Rotate.apply(x, packed.cos, packed.sin) for x in (query, key))
        if packed.plan is None:
            return self.kernel(query, key, value, attention_mask, packed_seq_params=packed, **rest)
        if packed.cache is None:
            return packed.plan.attend(query, key, value, self.scale)
        return self._attend_cached(query, key, value, packed)

    def _attend_cached(self, query, key, value, packed: PackedSequences) -> torch.Tensor:
        rows, positions = packed.slots
        keys, values = packed.cache.keys[self.cache_layer], packed.cache.values[self.cache_layer]
        real = rows.numel()  # tokens after these fill up the sequence-parallel ranks
        keys[rows, positions], values[rows, positions] = key[:real], value[:real]
        if isinstance(packed.plan, DecodePlan):
            output = packed.plan.attend(query[:real], keys, values, self.scale)
        else:
            output = packed.plan.attend(query[:real], key[:real], value[:real], self.scale)
        return F.pad(output, (0, 0, 0, query.shape[0] - real))
