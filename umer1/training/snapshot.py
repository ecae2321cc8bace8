"""A checkpoint in two halves: a snapshot between two steps, and its writing and publishing, now or by a thread."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from umer1.checkpoints import layout as directories
from umer1.checkpoints.shards import Shards, ShardTaker
from umer1.checkpoints.source import ASSETS, describe_model
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.files import not_written, write_json, write_text
from umer1.models.qwen2_vl.directory import write_assets
from umer1.models.qwen2_vl.weights import agree, unwrap
from umer1.training.rng import rng_state


@dataclass(frozen=True, slots=True)
class Snapshot:
    """This rank's part of the checkpoint of `iteration`; with copied shards nothing in it changes any more."""

    iteration: int
    shards: Shards
    content: dict[str, Any]  # of the manifest
    rng: dict[str, Any]  # this rank's generators
    extra: str  # JSON: the trainer's state


def take_snapshot(
    iteration: int,
    models: list[torch.nn.Module],
    optimizer: Any,
    taker: ShardTaker,
    extra: dict[str, Any],
    *,
    copy: bool = False,
) -> Snapshot:
    """The state between two steps; collective.  Without `copy` it has to be written before the next step.

    optimizer: None for weights alone.
    """
    content = {
        "iteration": iteration,
        "optimizer": optimizer is not None,
        "distributed_optimizer": is_distributed(optimizer),
        "dtype": str(next(unwrap(models[0]).parameters()).dtype).removeprefix("torch."),
        "layout": layout_of(taker.parallel),
        "model": describe_model(models),
        "trained": trained_names(models, taker.parallel),
    }
    shards = taker.take(models, optimizer, copy=copy)
    return Snapshot(iteration, shards, content, rng_state(), json.dumps(extra, indent=2, ensure_ascii=False) + "\n")


def write_snapshot(
    save: Path, snapshot: Snapshot, assets: dict[str, str], state: ParallelState, group: dist.ProcessGroup | None = None
) -> Path:
    """Write and publish SAVE/iter_NNNNNNN and the tracker.

    assets: the Hugging Face files beside the weights, by name; rank 0's are written.
    Collective over `group`, which has all ranks and, in a thread, is the thread's own; default: the default group.
    Raises UserError on every rank when any rank could not write; earlier checkpoints are untouched then.
    """
    aside = _open_aside(save, snapshot.iteration, state, group)
    destination = directories.iteration_path(save, snapshot.iteration)
    try:
        snapshot.shards.write(aside, group)
        gathered = [None] * state.world_size if state.rank == 0 else None
        dist.gather_object((_checksums(aside, state.rank), snapshot.rng), gathered, dst=0, group=group)
        problem = _publish(aside, destination, snapshot, gathered, assets) if state.rank == 0 else None
        agree(problem, state, group)
    except BaseException:
        if state.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return destination


def _open_aside(save: Path, iteration: int, state: ParallelState, group: dist.ProcessGroup | None) -> Path:
    """The hidden directory, made by rank 0 and known to all."""
    message = [None, None]
    if state.rank == 0:
        try:
            message[0] = str(directories.new_aside(save, iteration))
        except OSError as error:
            message[1] = not_written("the checkpoint", save, error)
    dist.broadcast_object_list(message, src=0, group=group)
    if message[1]:
        raise UserError(message[1])
    return Path(message[0])


def _publish(aside: Path, destination: Path, snapshot: Snapshot, gathered: list, assets: dict[str, str]) -> str | None:
    """Rank 0: the small files, the manifest, the rename, the tracker; returns what went wrong, if anything."""
    try:
        if failed := [mine for mine, _ in gathered if isinstance(mine, str)]:
            raise OSError(failed[0])
        snapshot.shards.write_small_files(aside)
        write_text(aside / "extra.json", snapshot.extra)
        write_json(aside / "rng.json", [rng for _, rng in gathered])
        write_assets(assets, aside / ASSETS)
        checksums = {name: value for mine, _ in gathered for name, value in mine.items()}
        directories.seal(aside, destination, snapshot.content, checksums)
        directories.write_tracker(destination.parent, snapshot.iteration)
    except OSError as error:
        return not_written("the checkpoint", destination.parent, error)
    return None


def _checksums(aside: Path, rank: int) -> dict[str, int] | str:
    """CRC-32 of the shards that this rank wrote; a failure as text, so that rank 0 hears of it."""
    try:
        return {path.name: directories.crc32(path) for path in aside.glob(f"__{rank}_*.distcp")}
    except OSError as error:
        return str(error)


def layout_of(state: ParallelState) -> dict[str, int]:
    """The layout that a checkpoint was written with."""
    return {"world_size": state.world_size, "tp": state.tp_size, "pp": state.pp_size, "dp": state.dp_size}


def trained_names(models: list[torch.nn.Module], state: ParallelState) -> list[str]:
    """Names of trained parameters over all pipeline stages, layers as N."""
    mine = {
        re.sub(r"\.\d+\.", ".N.", name)
        for model in models
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad
    }
    stages: list[set[str]] = [mine]
    if state.pp_size > 1:
        stages = [set()] * state.pp_size
        dist.all_gather_object(stages, mine, group=state.groups.pp)
    # A tied head is the embedding's copy on the last stage.
    tied = unwrap(models[0]).model_config.tie_word_embeddings
    return sorted(set().union(*stages) - ({"output_layer.weight"} if tied else set()))


def is_distributed(optimizer: Any) -> bool:
    """Whether the optimizer's state is cut over the data-parallel ranks."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(hasattr(part, "gbuf_ranges") for part in parts)
