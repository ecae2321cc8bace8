"""The one table of names between Hugging Face's Qwen2-VL and megatron's, read in both directions.

A layout says how one megatron tensor is cut over tensor-parallel ranks and how it is put together from the
Hugging Face tensors' shares of one rank.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from umer1.models.qwen2_vl.config import Qwen2VLConfig

Parts = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """axis: the dimension of each part that is cut evenly over ranks (None: every rank holds all of it).
    sections: a Hugging Face tensor is that many parts one below the other, each cut on its own.
    fuse: parts of one rank -> its megatron tensor; split: the inverse.  Both get the config.
    vocabulary: rows are cut at the padded size, and rows beyond the file's are padding.
    """

    axis: int | None = None
    sections: int = 1
    fuse: Callable[[Parts, Qwen2VLConfig], torch.Tensor] = lambda parts, config: parts[0]
    split: Callable[[torch.Tensor, Qwen2VLConfig], Parts] = lambda tensor, config: [tensor]
    vocabulary: bool = False


def _interleave(parts: Parts, head_dim: int) -> torch.Tensor:
    """q, k, v -> megatron's order: for each KV head its query heads, its key head, its value head."""
    q, k, v = parts
    groups = k.shape[0] // head_dim
    by_group = [x.reshape(groups, x.shape[0] // groups, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(by_group, dim=1).reshape(-1, *q.shape[1:])


def _deinterleave(fused: torch.Tensor, head_dim: int, queries_per_group: int) -> Parts:
    """The inverse of `_interleave`."""
    rows = [queries_per_group * head_dim, head_dim, head_dim]
    grouped = fused.reshape(-1, sum(rows), *fused.shape[1:])
    return [part.reshape(-1, *fused.shape[1:]) for part in grouped.split(rows, dim=1)]


def _patch_shape(config: Qwen2VLConfig) -> tuple[int, ...]:
    vision = config.vision
    return (vision.embed_dim, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)


REPLICATED = Layout()
COLUMN = Layout(axis=0)
ROW = Layout(axis=1)
VOCABULARY = Layout(axis=0, vocabulary=True)
GATE_UP = Layout(axis=0, fuse=lambda parts, config: torch.cat(parts), split=lambda t, config: list(t.chunk(2)))
QKV = Layout(
    axis=0,
    fuse=lambda parts, config: _interleave(parts, config.head_dim),
    split=lambda t, config: _deinterleave(t, config.head_dim, config.num_attention_heads // config.num_query_groups),
)
VISION_QKV = Layout(
    axis=0,
    sections=3,
    fuse=lambda parts, config: _interleave(parts, config.vision.head_dim),
    split=lambda t, config: _deinterleave(t, config.vision.head_dim, 1),
)
PATCH = Layout(  # Conv3d whose stride is its kernel = one matrix product over flattened patches
    fuse=lambda parts, config: parts[0].reshape(parts[0].shape[0], -1),
    split=lambda t, config: [t.reshape(_patch_shape(config))],
)

# megatron name -> (Hugging Face names, layout); {} is the layer.  "a|b": Transformer Engine's spec fuses the norm
# into the linear layer that follows and has the second name.
_A, _M = "self_attention", "mlp"
TABLE: dict[str, tuple[tuple[str, ...], Layout]] = {
    "vision.patch_embed.weight": (("visual.patch_embed.proj.weight",), PATCH),
    **{
        f"vision.decoder.layers.{{}}.{ours}": ((f"visual.blocks.{{}}.{theirs}",), layout)
        for x in ("weight", "bias")
        for ours, theirs, layout in (
            (f"input_layernorm.{x}|{_A}.linear_qkv.layer_norm_{x}", f"norm1.{x}", REPLICATED),
            (f"{_A}.linear_qkv.{x}", f"attn.qkv.{x}", VISION_QKV),
            (f"{_A}.linear_proj.{x}", f"attn.proj.{x}", ROW if x == "weight" else REPLICATED),
            (f"pre_mlp_layernorm.{x}|{_M}.linear_fc1.layer_norm_{x}", f"norm2.{x}", REPLICATED),
            (f"{_M}.linear_fc1.{x}", f"mlp.fc1.{x}", COLUMN),
            (f"{_M}.linear_fc2.{x}", f"mlp.fc2.{x}", ROW if x == "weight" else REPLICATED),
        )
    },
    **{
        f"vision.merger.{ours}.{x}": ((f"visual.merger.{theirs}.{x}",), layout)
        for x in ("weight", "bias")
        for ours, theirs, layout in (
            ("ln_q", "ln_q", REPLICATED),
            ("linear_fc1", "mlp.0", COLUMN),
            ("linear_fc2", "mlp.2", ROW if x == "weight" else REPLICATED),
        )
    },
    "embedding.word_embeddings.weight": (("model.embed_tokens.weight",), VOCABULARY),
    **{
        f"decoder.layers.{{}}.{ours}": (tuple(f"model.layers.{{}}.{name}" for name in theirs), layout)
        for ours, theirs, layout in (
            (f"input_layernorm.weight|{_A}.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), REPLICATED),
            (f"{_A}.linear_qkv.weight", tuple(f"self_attn.{n}_proj.weight" for n in "qkv"), QKV),
            (f"{_A}.linear_qkv.bias", tuple(f"self_attn.{n}_proj.bias" for n in "qkv"), QKV),
            (f"{_A}.linear_proj.weight", ("self_attn.o_proj.weight",), ROW),
            (
                f"pre_mlp_layernorm.weight|{_M}.linear_fc1.layer_norm_weight",
                ("post_attention_layernorm.weight",),
                REPLICATED,
            ),
            (f"{_M}.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GATE_UP),
            (f"{_M}.linear_fc2.weight", ("mlp.down_proj.weight",), ROW),
        )
    },
    "decoder.final_layernorm.weight": (("model.norm.weight",), REPLICATED),
    "output_layer.weight": (("lm_head.weight",), VOCABULARY),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One megatron tensor (`name` has the global layer number) and the Hugging Face tensors it is made of."""

    name: str
    hf: tuple[str, ...]
    layout: Layout


def rows(config: Qwen2VLConfig) -> Iterator[Row]:
    """The table written out for every layer of `config`; with tied embeddings the head has its row, for import."""
    for pattern, (hf, layout) in TABLE.items():
        name = pattern.split("|")[0]
        if name.startswith(("vision.decoder.layers.", "decoder.layers.")):
            layers = config.vision.depth if name.startswith("vision.") else config.num_layers
            for layer in range(layers):
                yield Row(name.format(layer), tuple(source.format(layer) for source in hf), layout)
        elif name == "output_layer.weight" and config.tie_word_embeddings:
            yield Row(name, ("model.embed_tokens.weight",), layout)
        else:
            yield Row(name, hf, layout)


def first_name(megatron_name: str) -> str:
    """The table's first name of a parameter: Transformer Engine's fused norms get the local modules' names."""
    for suffix, first in _FUSED.items():
        if megatron_name.endswith(suffix):
            return megatron_name[: -len(suffix)] + first
    return megatron_name


_FUSED = {
    alternative: pattern.split("|")[0].split(".layers.{}.")[1]
    for pattern in TABLE
    for alternative in pattern.split("|")[1:]
}


def hub_name(name: str) -> str:
    """A tensor's name as the Hub's Qwen2-VL files have it; transformers' newer prefixes are taken off."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def hf_shapes(config: Qwen2VLConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an export, in the table's order; a tied head is not among them."""
    hidden, ffn, vision = config.hidden_size, config.ffn_hidden_size, config.vision
    embed, kv_rows = vision.embed_dim, config.num_query_groups * config.head_dim
    vision_ffn, merged = vision.ffn_hidden_size, vision.merged_dim
    by_suffix = {
        "patch_embed.proj.weight": _patch_shape(config),
        "attn.qkv.weight": (3 * embed, embed),
        "attn.qkv.bias": (3 * embed,),
        "attn.proj.weight": (embed, embed),
        "mlp.fc1.weight": (vision_ffn, embed),
        "mlp.fc1.bias": (vision_ffn,),
        "mlp.fc2.weight": (embed, vision_ffn),
        "mlp.0.weight": (merged, merged),
        "mlp.0.bias": (merged,),
        "mlp.2.weight": (hidden, merged),
        "mlp.2.bias": (hidden,),
        "embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
        "self_attn.q_proj.weight": (config.num_attention_heads * config.head_dim, hidden),
        "self_attn.q_proj.bias": (config.num_attention_heads * config.head_dim,),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.k_proj.bias": (kv_rows,),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.bias": (kv_rows,),
        "self_attn.o_proj.weight": (hidden, config.num_attention_heads * config.head_dim),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }

    def shape(name: str) -> tuple[int, ...]:
        known = next((extents for suffix, extents in by_suffix.items() if name.endswith(suffix)), None)
        return known or ((embed,) if name.startswith("visual.") else (hidden,))  # norms, and biases after rows

    return {name: shape(name) for row in rows(config) for name in row.hf}
