"""What vectors depend on besides the data, kept beside them: a run that would mix two kinds is refused."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umer1.data.processor import Processor
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.config import MMEBCommand
from umer1.files import write_json

FILE = "settings.json"
# What a run leaves that got further than its settings: in any mode, in gen mode.
_MADE = ("vectors/*.npz", "parts/*/*.npz", "results_*.json")
_MADE_BY_GEN = ("vectors/*_gen.npz", "parts/*_gen/*.npz", "results_*gen*.json")
_FORMAT = 1
# Settings of generation that change no response.
_NO_MATTER = ("max_sequences",)


def settings_of(command: MMEBCommand, model_sha256: str, processor: Processor) -> dict[str, Any]:
    """{"model", "all": for both modes, "gen": for gen mode, None where this run has none of it}."""
    config, engine = command.eval, command.engine
    generation = {name: value for name, value in asdict(command.generation).items() if name not in _NO_MATTER}
    shared = {
        "model_sha256": model_sha256,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "max_queries": config.max_queries,
        "max_input_tokens": engine.max_input_tokens,
        "blank_image_for_text": engine.blank_image_for_text,
        **{f"image.{name}": value for name, value in asdict(processor.image_config).items()},
    }
    return {
        "format": _FORMAT,
        "model": engine.model,
        "all": json.loads(json.dumps(shared)),  # tuples are lists in the file
        "gen": {"engine": config.engine, **generation} if config.generates else None,
    }


def keep_settings(folder: str | Path, settings: dict[str, Any]) -> None:
    """Write them, or compare them with those that vectors in `folder` were made under; UserError with what differs, and
    where the folder has the results of something else.  A run that came to nothing binds no other."""
    folder = Path(folder)
    path = folder / FILE
    if not path.exists() and (folder / "results.json").exists():
        raise UserError(f"{folder} has a results.json that is of no MMEB-V2 run; choose another --output")
    if path.exists() and _holds(folder, _MADE):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not _holds(folder, _MADE_BY_GEN):
                found["gen"] = None
            there = {"format": found["format"], **found["all"], **(found["gen"] or {})}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error!r}); choose another --output") from None
        here = {"format": settings["format"], **settings["all"], **((found["gen"] and settings["gen"]) or {})}
        lines = [f"  {name}: {there.get(name)!r} there, {value!r} now" for name, value in here.items()]
        lines = [line for line, name in zip(lines, here, strict=True) if there.get(name) != here[name]]
        if lines:
            raise UserError(
                f"{folder} has vectors that were made under other settings; use those, or another --output:\n"
                + "\n".join(lines)
            )
        settings = {**settings, "gen": found["gen"] or settings["gen"]}
    write_json(path, settings)


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def settings_hash(settings: dict[str, Any], mode: str) -> str:
    """SHA-256 of what vectors of `mode` depend on."""
    return hashlib.sha256(
        json.dumps([settings["all"], settings["gen"] if mode == "gen" else None]).encode()
    ).hexdigest()
