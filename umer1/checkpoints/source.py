"""A model from any of its forms: a Hugging Face directory, one checkpoint, or a save directory with checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from umer1.checkpoints import layout
from umer1.checkpoints.search import find_checkpoint, is_checkpoint_place, read_json
from umer1.checkpoints.sharded_state import read_sharded
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import load_hf, stored_dtype, unwrap
from umer1.rules import cannot_be_looked_at

ASSETS = "hf"  # folder of a checkpoint with config.json, tokenizer and processor settings


def open_model(path: str | Path) -> HFDirectory:
    """Configuration, tokenizer and settings of the model at `path`; reads no weights and needs no process group.

    Of several checkpoints the newest whose files have their sizes and whose assets are as they were written.
    Raises UserError when `path` is none of the three forms, or when every checkpoint in it is damaged.
    """
    path = Path(path)
    try:
        if not is_checkpoint_place(path):
            return HFDirectory.open(path)
    except OSError as error:
        raise UserError(cannot_be_looked_at(path, error)) from None
    problems = []
    for checkpoint in layout.newest_first(path):
        try:
            manifest = layout.read_manifest(checkpoint)
            assets = {name: about for name, about in manifest["files"].items() if name.startswith(f"{ASSETS}/")}
            if damaged := layout.corrupt_files(checkpoint, {"files": assets}):
                raise ValueError(f"the content of {', '.join(damaged)} is not what was written (CRC-32)")
            return HFDirectory.open(checkpoint / ASSETS, weights=False)
        except (ValueError, OSError) as error:
            problems.append(f"{checkpoint}: {error}")
    raise UserError(f"{path} holds no whole checkpoint:\n" + "\n".join(f"  - {problem}" for problem in problems))


def load_model_weights(
    models: list[torch.nn.Module], path: str | Path, directory: HFDirectory, parallel: ParallelState
) -> Path:
    """Fill `models` (built from `directory.config`, any layout and dtype) from `path`; collective.

    Returns what was read: `path`, or the newest valid checkpoint in it.  Raises UserError on every rank.
    """
    path = Path(path)
    if not is_checkpoint_place(path):
        load_hf(models, directory, parallel)
        return path
    checkpoint = find_checkpoint(path, parallel)
    if checkpoint is None:
        raise UserError(f"{path} holds no checkpoint (no iter_* directory)")
    problems = model_differences(read_json(checkpoint / layout.MANIFEST), models)
    if problems:
        raise UserError(f"{checkpoint} is of another model: {'; '.join(problems)}")
    read_sharded(checkpoint, models, None, parallel)
    return checkpoint


def stored_model_dtype(path: str | Path, directory: HFDirectory) -> str:
    """ "float32" or "bfloat16": the weights' type in a Hugging Face directory or one checkpoint.  Raises UserError."""
    path = Path(path)
    if not is_checkpoint_place(path):
        return str(stored_dtype(directory)).removeprefix("torch.")
    dtype = read_json(path / layout.MANIFEST).get("dtype")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"{path}: unknown dtype {dtype!r} in {layout.MANIFEST}")
    return dtype


def describe_model(models: list[torch.nn.Module]) -> dict[str, Any]:
    """The architecture, as a manifest gives it back."""
    described = dataclasses.asdict(unwrap(models[0]).model_config)
    vision = described.pop("vision")
    described |= {f"vision.{name}": value for name, value in vision.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in described.items()}


def model_differences(manifest: dict[str, Any], models: list[torch.nn.Module]) -> list[str]:
    """Where the manifest's architecture is not that of `models`, one clause each."""
    there = manifest["model"]
    return [
        f"{name} is {there.get(name)} there and {ours} here"
        for name, ours in describe_model(models).items()
        if there.get(name) != ours
    ]
