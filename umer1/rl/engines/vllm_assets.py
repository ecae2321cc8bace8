"""The directory that vLLM is built on: config, tokenizer, and preprocessors that only cut and normalise."""

import json
from pathlib import Path
from typing import Any

import torch

from umer1 import device
from umer1.data.images import ImageConfig
from umer1.errors import UserError
from umer1.files import write_json
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.directory import INPUTS_NAME, HFDirectory, save_assets

_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on the CPU


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16", ..."""
    return str(dtype).removeprefix("torch.")


def check_head_size(config: Qwen2VLConfig) -> None:
    """Raises UserError for a model that vLLM's CPU build would only fail on when it generates."""
    if not device.has_cuda() and config.head_dim not in _CPU_HEAD_SIZES:
        raise UserError(
            f"vLLM on the CPU cannot run heads of size {config.head_dim} (hidden size / heads); legal are "
            f"{', '.join(map(str, _CPU_HEAD_SIZES))}"
        )


def check_positions(directory: HFDirectory, length: int, asked: str) -> None:
    """Raises UserError for sequences of `length` tokens, as the setting `asked` wants them, that vLLM would refuse."""
    settings = json.loads(directory.assets["config.json"])
    positions = (settings.get("text_config") or settings).get("max_position_embeddings", length)
    if length > positions:
        raise UserError(f"{asked} is more than the model's {positions} positions, which vLLM refuses; lower it")


def save_engine_assets(directory: HFDirectory, config: ImageConfig, destination: Path, *, dtype: str, max_tokens: int):
    """Write what vLLM reads.  Pictures and frames come resized and chosen: the processors here only cut and normalise.

    max_tokens: most tokens of a sequence; vLLM plans memory for pictures of at most that size.
    """
    save_assets(directory, destination, dtype=dtype)
    for name in ("processor_config.json", INPUTS_NAME):
        (destination / name).unlink(missing_ok=True)
    common: dict[str, Any] = dict(
        do_resize=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        do_convert_rgb=True,
        image_mean=list(config.mean),
        image_std=list(config.std),
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        size={
            "shortest_edge": config.factor**2,
            "longest_edge": min(config.max_pixels, max_tokens * config.factor**2),
        },
        processor_class="Qwen2VLProcessor",
    )
    write_json(destination / "preprocessor_config.json", common | dict(image_processor_type="Qwen2VLImageProcessor"))
    write_json(
        destination / "video_preprocessor_config.json",
        common | dict(video_processor_type="Qwen2VLVideoProcessor", do_sample_frames=False),
    )
