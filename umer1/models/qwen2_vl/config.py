"""Qwen2-VL's hyper-parameters, read from a Hugging Face config.json.

Both published forms of the file are read: the flat one (text settings at the root, `rope_scaling`) and the nested one
(`text_config`, `rope_parameters`).  Absent fields get the defaults of transformers 5.17's configuration_qwen2_vl.py.
"""

import sys
from dataclasses import dataclass
from typing import Any

from umer1.errors import ConfigError

VISION_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "silu")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The ViT: `depth` blocks of width `embed_dim`, then 2 x 2 patches merged to the decoder's width."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    hidden_size: int = 3584  # what the merger gives: the decoder's width
    hidden_act: str = "quick_gelu"
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def ffn_hidden_size(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch: channels x temporal x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_dim(self) -> int:
        """Width of the merger's input: all patches of one merge window."""
        return self.embed_dim * self.spatial_merge_size**2

    def violations(self) -> list[str]:
        """What this model can't be built from, one sentence each."""
        found = _out_of_range("vision_config", self, VISION_SIZES)
        if found:
            return found
        if self.embed_dim % self.num_heads:
            found.append(f"vision_config.embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")
        elif self.head_dim % 4:
            found.append(
                f"vision_config.embed_dim / num_heads = {self.head_dim} must be a multiple of 4: 2-D rotary embedding "
                "turns pairs of dimensions for height and for width"
            )
        if self.hidden_act not in VISION_ACTIVATIONS:
            found.append(
                f"vision_config.hidden_act={self.hidden_act!r} is not supported; use one of "
                f"{', '.join(VISION_ACTIVATIONS)}"
            )
        return found


# Name -> the largest legal value.  Far above any model's, and what is computed of them still fits into 64 bits.
_WIDTH, _LAYERS = 1 << 18, 1000
VISION_SIZES = {"depth": _LAYERS, "embed_dim": _WIDTH, "num_heads": _WIDTH, "mlp_ratio": 1024, "patch_size": 1024}
VISION_SIZES |= {"temporal_patch_size": 64, "spatial_merge_size": 32, "in_channels": 64, "hidden_size": _WIDTH}
TEXT_SIZES = {"hidden_size": _WIDTH, "num_layers": _LAYERS, "num_attention_heads": _WIDTH, "num_query_groups": _WIDTH}
TEXT_SIZES |= {"ffn_hidden_size": 4 * _WIDTH, "vocab_size": 1 << 24}


def _out_of_range(where: str, config: Any, most: dict[str, int]) -> list[str]:
    prefix = where + "." if where else ""
    return [
        f"{prefix}{name}={getattr(config, name)} must be at least 1 and at most {limit:,}"
        for name, limit in most.items()
        if not 1 <= getattr(config, name) <= limit
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2VLConfig:
    """All that decides the weights' shapes and the forward pass; field names are megatron's."""

    vision: VisionConfig
    hidden_size: int = 8192
    num_layers: int = 80
    num_attention_heads: int = 64
    num_query_groups: int = 8
    ffn_hidden_size: int = 29568
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    # What the file asks for and this model does not have; each is a violation.
    unsupported: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Qwen2VLConfig":
        """From the content of config.json.  Raises ConfigError with every problem of the file."""
        reader = _Reader()
        root = reader.mapping(config, "config.json")
        text = reader.mapping(root["text_config"], "text_config") if root.get("text_config") is not None else root
        vision = reader.mapping(root.get("vision_config") or {}, "vision_config")
        rope = reader.mapping(text.get("rope_scaling") or text.get("rope_parameters") or {}, "rope_parameters")
        heads = reader.integer(text, "num_attention_heads", 64)
        groups = heads if text.get("num_key_value_heads", 8) is None else reader.integer(text, "num_key_value_heads", 8)
        built = cls(
            vision=_read_vision(reader, vision),
            hidden_size=reader.integer(text, "hidden_size", 8192),
            num_layers=reader.integer(text, "num_hidden_layers", 80),
            num_attention_heads=heads,
            num_query_groups=groups,
            ffn_hidden_size=reader.integer(text, "intermediate_size", 29568),
            vocab_size=reader.integer(text, "vocab_size", 152064),
            rms_norm_eps=reader.number(text, "rms_norm_eps", 1e-5),
            rope_theta=reader.number(rope if "rope_theta" in rope else text, "rope_theta", 1000000.0),
            mrope_section=reader.integers(rope, "mrope_section", (16, 24, 24)),
            tie_word_embeddings=any([reader.boolean(part, "tie_word_embeddings") for part in (root, text)]),
            initializer_range=reader.number(text, "initializer_range", 0.02),
            image_token_id=reader.integer(root, "image_token_id", 151655),
            video_token_id=reader.integer(root, "video_token_id", 151656),
            vision_start_token_id=reader.integer(root, "vision_start_token_id", 151652),
            vision_end_token_id=reader.integer(root, "vision_end_token_id", 151653),
            unsupported=tuple(_unsupported(root, text, rope)),
        )
        problems = list(dict.fromkeys(reader.problems)) or built.violations()
        if problems:
            raise ConfigError(problems)
        return built

    def violations(self) -> list[str]:
        """What this model can't be built from, one sentence each, with the legal values."""
        found = list(self.unsupported) + _out_of_range("", self, TEXT_SIZES) + self.vision.violations()
        if found:
            return found
        if self.hidden_size % self.num_attention_heads:
            found.append(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        elif self.head_dim % 2:
            found.append(f"hidden_size / num_attention_heads = {self.head_dim} must be even for rotary embedding")
        elif len(self.mrope_section) != 3:
            found.append(f"mrope_section={list(self.mrope_section)} must have three parts: for time, height and width")
        elif sum(self.mrope_section) != self.head_dim // 2 or min(self.mrope_section) < 0:
            found.append(
                f"mrope_section={list(self.mrope_section)} adds up to {sum(self.mrope_section)}; it must add up to "
                f"half the head size, {self.head_dim // 2}, without negative parts"
            )
        if self.num_attention_heads % self.num_query_groups:
            found.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_query_groups}"
            )
        if self.vision.hidden_size != self.hidden_size:
            found.append(
                f"vision_config.hidden_size={self.vision.hidden_size} must be the decoder's hidden_size="
                f"{self.hidden_size}: vision tokens take the place of word embeddings"
            )
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        found += [
            f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size} rows"
            for name in ids
            if not 0 <= getattr(self, name) < self.vocab_size
        ]
        return found

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rows held under tensor parallelism: the least multiple of its size."""
        return -(-self.vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


class _Reader:
    """Typed look-ups that collect what is wrong in place of raising at the first."""

    def __init__(self):
        self.problems: list[str] = []

    def mapping(self, value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.problems.append(f"{name} must be an object, not {type(value).__name__}")
        return {}

    def integer(self, values: dict, name: str, default: int) -> int:
        value = values.get(name, default)
        # A size may stand once for each of two equal axes: patch_size: [14, 14].
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.problems.append(f"{name}={value!r} must be a whole number")
        return default

    def boolean(self, values: dict, name: str) -> bool:
        value = values.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problems.append(f"{name}={value!r} must be true or false")
        return False

    def number(self, values: dict, name: str, default: float) -> float:
        value = values.get(name, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
            return value
        self.problems.append(f"{name}={value!r} must be a finite number above 0")
        return default

    def integers(self, values: dict, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = values.get(name, default)
        if isinstance(value, (list, tuple)) and value and all(type(part) is int for part in value):
            return tuple(value)
        self.problems.append(f"{name}={value!r} must be a list of whole numbers")
        return default


def _read_vision(reader: _Reader, vision: dict[str, Any]) -> VisionConfig:
    rope = reader.mapping(vision.get("rope_parameters") or {}, "vision_config.rope_parameters")
    return VisionConfig(
        depth=reader.integer(vision, "depth", 32),
        embed_dim=reader.integer(vision, "embed_dim", 1280),
        num_heads=reader.integer(vision, "num_heads", 16),
        mlp_ratio=reader.number(vision, "mlp_ratio", 4),
        patch_size=reader.integer(vision, "patch_size", 14),
        temporal_patch_size=reader.integer(vision, "temporal_patch_size", 2),
        spatial_merge_size=reader.integer(vision, "spatial_merge_size", 2),
        in_channels=reader.integer(vision, "in_channels", 3),
        hidden_size=reader.integer(vision, "hidden_size", 3584),
        hidden_act=str(vision.get("hidden_act", "quick_gelu")),
        rope_theta=reader.number(rope, "rope_theta", 10000.0),
    )


def _unsupported(root: dict, text: dict, rope: dict) -> list[str]:
    found = []
    if root.get("model_type", "qwen2_vl") != "qwen2_vl":
        found.append(f"model_type={root['model_type']!r} is not supported; use a qwen2_vl model")
    sliding = text.get("use_sliding_window") and text.get("sliding_window", 4096) is not None
    layer_types = text.get("layer_types") or []
    if not isinstance(layer_types, list):
        found.append(f"layer_types={layer_types!r} must be a list")
        layer_types = []
    first_window, layers = text.get("max_window_layers", 80), text.get("num_hidden_layers", 80)
    if not isinstance(first_window, int):
        found.append(f"max_window_layers={first_window!r} must be a whole number")
        first_window = 0
    windows = sliding and not layer_types and (not isinstance(layers, int) or first_window < layers)
    if "sliding_attention" in layer_types or windows:
        found.append("sliding-window attention is not supported; use_sliding_window must be false")
    if text.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act={text['hidden_act']!r} is not supported; the decoder's activation must be silu")
    if text.get("attention_dropout"):
        found.append(f"attention_dropout={text['attention_dropout']} is not supported; it must be 0.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        found.append(f"rope_type={kind!r} is not supported; use 'mrope' or 'default'")
    heads = text.get("num_attention_heads", 64)
    head_dim = text.get("head_dim")
    fits = not isinstance(heads, int) or (
        isinstance(head_dim, int) and head_dim * heads == text.get("hidden_size", 8192)
    )
    if head_dim is not None and not fits:
        found.append(f"head_dim={head_dim} must be hidden_size / num_attention_heads")
    return found
