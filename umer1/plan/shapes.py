"""Where the model's shape comes from: a published model by name, or a directory's config.json; never weights."""

import json
from pathlib import Path
from typing import Literal

from umer1.errors import ConfigError, UserError
from umer1.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig

ShapeName = Literal["qwen2-vl-2b", "qwen2-vl-7b"]

# config.json of Qwen2-VL-2B-Instruct and Qwen2-VL-7B-Instruct (docs/method.md, 1).
SHAPES: dict[str, Qwen2VLConfig] = {
    "qwen2-vl-2b": Qwen2VLConfig(
        vision=VisionConfig(hidden_size=1536),
        hidden_size=1536,
        num_layers=28,
        num_attention_heads=12,
        num_query_groups=2,
        ffn_hidden_size=8960,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    "qwen2-vl-7b": Qwen2VLConfig(
        vision=VisionConfig(hidden_size=3584),
        hidden_size=3584,
        num_layers=28,
        num_attention_heads=28,
        num_query_groups=4,
        ffn_hidden_size=18944,
        vocab_size=152064,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    ),
}


def find_shape(name: str | None, directory: str | None) -> Qwen2VLConfig:
    """The named shape, or that of `directory`/config.json.  Raises UserError."""
    if name is not None:
        return SHAPES[name]
    if directory is None:
        names = " or ".join(SHAPES)
        raise UserError(f"no model is named; give --shape {names}, or --hf-model DIR with a config.json, or --load RUN")
    path = Path(directory) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give --hf-model DIR with a config.json, or --shape {' or '.join(SHAPES)}"
        ) from None
    try:
        return Qwen2VLConfig.from_hf(content)
    except ConfigError as error:
        raise UserError(f"{path} describes a model that umer1 cannot run: {error}") from None
