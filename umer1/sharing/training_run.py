"""What a training run says about itself: configuration, data sets, steps, last record, versions.

A run notes its data sets and versions in SAVE/run.json when it starts, so that a card can be written later and
elsewhere, without the data and from another commit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from umer1.checkpoints import layout
from umer1.checkpoints.search import is_checkpoint_place
from umer1.errors import UserError
from umer1.files import write_json
from umer1.sharing.versions import versions

_NAME = "run.json"


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One run as a model card tells it."""

    config: dict[str, dict[str, Any]]  # as SAVE/config.yaml has it
    step: int | None  # optimizer steps done
    pairs: dict[str, int]  # data set -> pairs; {} when nothing was noted
    versions: list[tuple[int, dict[str, str]]]  # (step from which on, package -> version)
    last: dict[str, Any]  # the record of the last step; {} when none was written

    @property
    def stage(self) -> str:
        """ "SFT" or "GRPO"."""
        return "GRPO" if "rollout" in self.config else "SFT"


def pairs_of(names: Sequence[str], name_ids: np.ndarray) -> dict[str, int]:
    """Data set -> pairs.  name_ids: int [N], for each pair which of `names` it belongs to; a name may come twice."""
    found: dict[str, int] = {}
    for name, count in zip(names, np.bincount(name_ids, minlength=len(names)).tolist(), strict=True):
        found[name] = found.get(name, 0) + count
    return found


def note_start(save: str | Path, step: int, pairs: dict[str, int]) -> None:
    """Write or go on with SAVE/run.json, on one rank; versions are kept for each step from which on they were used."""
    earlier = [entry for entry in _noted(Path(save)).get("versions", []) if entry["step"] < step]
    now = versions()
    if not earlier or earlier[-1]["packages"] != now:
        earlier.append({"step": step, "packages": now})
    write_json(Path(save) / _NAME, {"pairs": pairs, "versions": earlier})


def read_run(save: str | Path, step: int | None = None) -> TrainingRun:
    """The run whose --save directory this is, up to `step` (default: its last record's); UserError when it is none."""
    path = Path(save) / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--run {save}: {path.name} cannot be read ({error}); give a training run's --save") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in ("data", "optimizer")):
        raise UserError(f"--run {save}: {path} is no configuration of a training run")
    return describe_run(config, save, step)


def run_of(checkpoint: Path) -> TrainingRun | None:
    """The run that one checkpoint is of, up to its step; None for what is no checkpoint, or does not lie in its run."""
    if not is_checkpoint_place(checkpoint) or not (checkpoint.parent / "config.yaml").is_file():
        return None
    return read_run(checkpoint.parent, checkpoint_step(checkpoint))


def checkpoint_step(model: Path) -> int | None:
    """Steps done at one checkpoint; None for a Hugging Face directory."""
    return layout.read_manifest(model)["iteration"] if is_checkpoint_place(model) else None


def describe_run(config: dict[str, dict[str, Any]], save: str | Path | None, step: int | None = None) -> TrainingRun:
    """The run of a resolved configuration, with what lies in `save` (None: a run that kept nothing)."""
    noted, last = ({}, {}) if save is None else (_noted(Path(save)), _last_record(Path(save), step))
    used = [(entry["step"], entry["packages"]) for entry in noted.get("versions", [])]
    return TrainingRun(
        config=config,
        step=last.get("iteration") if step is None else step,
        pairs=noted.get("pairs", {}),
        versions=[entry for entry in used if step is None or entry[0] < max(step, 1)],
        last=last,
    )


def _noted(save: Path) -> dict[str, Any]:
    """run.json; {} in a run from before there was one."""
    path = save / _NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "pairs": {name: int(count) for name, count in found["pairs"].items()},
            "versions": [
                {"step": int(entry["step"]), "packages": dict(entry["packages"])} for entry in found["versions"]
            ],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); remove it to go on without it") from None


def _last_record(save: Path, step: int | None) -> dict[str, Any]:
    """The last record of a training step, none after `step`."""
    path = save / "metrics.jsonl"
    last: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a killed run or a lost disk cut off
        if isinstance(record, dict) and "loss" in record and (step is None or record["iteration"] <= step):
            last = record
    return last
