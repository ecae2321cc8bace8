"""What the data tests share: one tiny directory, a processor on it, and a writer of records."""

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.images import ImageConfig
from umer1.data.processor import Processor
from umer1.models.qwen2_vl.directory import HFDirectory


@cache
def tiny_directory(embedding_tokens: bool = True) -> Path:
    """A tiny Qwen2-VL directory, made once for the whole test process."""
    holder = tempfile.TemporaryDirectory(prefix="umer1-tiny-")
    _KEPT.append(holder)
    return make_tiny_directory(holder.name, layers=1, vision_depth=1, embedding_tokens=embedding_tokens)


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


@cache
def tiny_hf() -> HFDirectory:
    return HFDirectory.open(tiny_directory())


def make_processor(max_length: int | None = None, **options) -> Processor:
    directory = tiny_hf()
    images = ImageConfig.from_settings(
        directory.config.vision, directory.image_settings, directory.video_settings, **options.pop("bounds", {})
    )
    return Processor(directory.tokenizer, directory.special, directory.config, images, max_length, **options)


def write_picture(root: Path, name: str, width: int = 56, height: int = 56, seed: int = 0) -> str:
    """A noise PNG at `root/name`; returns `name`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / name)
    return name


def record_side(text: str = "a red square", response: str | None = None, **media) -> dict:
    """A side as a data file has it; `text` holds its markers."""
    from umer1.data.prompts import assistant_text, user_text

    answer = assistant_text("two and two", "four") if response is None else response
    turns = [{"from": "human", "value": user_text(text)}, {"from": "gpt", "value": answer}]
    return {**media, "conversations": turns}


def record(index: int = 0, dataset: str = "toy") -> dict:
    return {"dataset_name": dataset, "qry": record_side(f"query {index}"), "pos": record_side(f"positive {index}")}


def write_records(path: Path, records: list, *, lines: bool = False) -> Path:
    """A JSON list, or JSONL when `lines`; strings among `records` are written as they stand."""
    texts = [item if isinstance(item, str) else json.dumps(item) for item in records]
    path.write_text("\n".join(texts) + "\n" if lines else "[" + ",\n".join(texts) + "]", encoding="utf-8")
    return path
