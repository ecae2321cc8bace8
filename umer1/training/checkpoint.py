"""Checkpoints that appear whole or not at all, and resume from the newest valid one at any TP, PP and DP.

A checkpoint is put together in a hidden directory, made durable, renamed, and only then named by the tracker.  Rank 0
decides which one is loaded and tells the others; damaged ones are passed over with a message.
"""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from umer1.checkpoints import layout as directories
from umer1.checkpoints.search import find_checkpoint, read_json
from umer1.checkpoints.sharded_state import read_sharded, write_sharded
from umer1.checkpoints.source import ASSETS, describe_model, model_differences
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.files import write_json
from umer1.models.qwen2_vl.directory import HFDirectory, save_assets
from umer1.models.qwen2_vl.weights import agree, unwrap
from umer1.training.rng import rng_state, set_rng_state


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Where the run's state is kept, and what it goes on from"""

    save: str | None = None
    """Directory for checkpoints and logs; a run that finds a checkpoint here goes on from it."""
    load: str | None = None
    """Directory to go on from when --save holds no checkpoint yet: a save directory or one iter_* directory."""
    save_interval: int = 500
    """Iterations between checkpoints; the last iteration is always saved."""
    keep_latest_checkpoints: int = 3
    """How many checkpoints stay in --save; older ones are removed after a newer one is complete.  0 keeps all."""
    keep_every: int = 0
    """Checkpoints whose iteration is a multiple of this stay for good, beside the latest.  0: none do."""
    ckpt_step: int | None = None
    """Iteration of --load to go on from; default: the newest valid one.  --save is always continued from its newest."""
    finetune: bool = False
    """Take only the weights from --load: iteration, optimizer, schedule, data order and generators start anew."""

    def violations(self) -> list[str]:
        problems = []
        if self.save_interval < 1:
            problems.append(f"save_interval={self.save_interval} must be 1 or above")
        if self.keep_latest_checkpoints < 0:
            problems.append(f"keep_latest_checkpoints={self.keep_latest_checkpoints} must be 0 (keep all) or above")
        if self.keep_every < 0 or self.keep_every % max(self.save_interval, 1):
            wanted = f"0 (none stays for good) or a multiple of save_interval={self.save_interval}"
            problems.append(f"keep_every={self.keep_every} must be {wanted}")
        if self.keep_every and not self.keep_latest_checkpoints:
            problems.append(f"keep_every={self.keep_every} needs keep_latest_checkpoints above 0, which keeps all")
        if self.ckpt_step is not None and self.ckpt_step < 0:
            problems.append(f"ckpt_step={self.ckpt_step} must be 0 or above")
        if self.ckpt_step is not None and not self._loads_from_elsewhere:
            # An earlier iteration beside later ones would be passed over by the next resume.
            problems.append("ckpt_step needs --load, and a --save that is another directory")
        if self.finetune and not self.load:
            problems.append("finetune needs --load, the directory whose weights are taken")
        if self._loads_from_elsewhere and not Path(self.load).is_dir():
            problems.append(f"load={self.load} is not a directory")
        return problems

    @property
    def _loads_from_elsewhere(self) -> bool:
        same = self.load and self.save and Path(self.load).absolute() == Path(self.save).absolute()
        return bool(self.load) and not same


class Checkpointer:
    """Saves and loads the state of one run; every method but `is_due` is collective."""

    def __init__(self, config: CheckpointConfig, state: ParallelState, assets: HFDirectory, algorithm: str = "sft"):
        self.config, self.state, self.assets, self.algorithm = config, state, assets, algorithm
        self.loaded_from: Path | None = None
        problem = None
        if config.save and state.rank == 0:
            problem = directories.is_writable(config.save)
            for name in directories.remove_left_behind(config.save):
                self._say(f"removed {Path(config.save) / name}, left behind by an interrupted run")
        agree(problem, state)

    def is_due(self, iteration: int) -> bool:
        return self.config.save is not None and iteration % self.config.save_interval == 0

    def save(
        self, iteration: int, models: list[torch.nn.Module], optimizer: Any, scheduler: Any, extra: dict[str, Any]
    ) -> None:
        """Publish a checkpoint of `iteration`; without --save nothing happens.

        scheduler: megatron's OptimizerParamScheduler.  extra: the trainer's own state, JSON.  Raises UserError on every
        rank when it could not be written; earlier checkpoints are untouched then.
        """
        if self.config.save is None:
            return
        save_checkpoint(
            Path(self.config.save),
            iteration,
            models,
            self.assets,
            self.state,
            optimizer=optimizer,
            extra={
                "algorithm": self.algorithm,
                "scheduler": scheduler.state_dict() if scheduler else None,
                "trainer": extra,
            },
        )
        if self.state.rank == 0:
            directories.prune(self.config.save, self.config.keep_latest_checkpoints, self.config.keep_every)

    def load(self, models: list[torch.nn.Module], optimizer: Any, scheduler: Any) -> dict[str, Any] | None:
        """Go on from --save's newest valid checkpoint, else from --load's; returns the trainer's state.

        None: there is no checkpoint, or only weights were taken (--finetune, a checkpoint that holds no more, or one of
        the other stage under --load).
        Raises UserError when there are checkpoints and none of them is whole.
        """
        path, own = self._choose()
        if path is None:
            return None
        manifest = read_json(path / directories.MANIFEST)
        extra = read_json(path / "extra.json")
        weights_only = not manifest["optimizer"] or (self.config.finetune and not own)
        made_by = extra.get("algorithm", "sft") if manifest["optimizer"] else self.algorithm
        if made_by != self.algorithm:
            if own:
                raise UserError(
                    f"save={self.config.save} holds checkpoints of {made_by}, this run is {self.algorithm}; give "
                    "another --save, and the old one as --load"
                )
            weights_only = True
        self._check_fit(path, manifest, models, None if weights_only else optimizer)
        read_sharded(path, models, None if weights_only else optimizer, self.state)
        self.loaded_from = path
        if weights_only:
            optimizer.reload_model_params()
            self._say(f"weights from {path}; optimizer, schedule and iteration start anew")
            return None
        scheduler.load_state_dict(extra["scheduler"])
        if manifest["layout"] == _layout(self.state):
            set_rng_state(read_json(path / "rng.json")[self.state.rank])
        return extra["trainer"]

    def _choose(self) -> tuple[Path | None, bool]:
        """(checkpoint to go on from, whether it is of --save); the same on all ranks."""
        config = self.config
        if config.save and (path := find_checkpoint(Path(config.save), self.state)):
            return path, True
        if not config._loads_from_elsewhere:
            return None, True
        path = find_checkpoint(Path(config.load), self.state, config.ckpt_step)
        if path is None:
            which = "no checkpoint (no iter_* directory)"
            if config.ckpt_step is not None:
                which = f"no checkpoint of ckpt_step={config.ckpt_step}"
            raise UserError(f"load={config.load} holds {which}")
        return path, False

    def _check_fit(self, path: Path, manifest: dict[str, Any], models: list[torch.nn.Module], optimizer: Any) -> None:
        """Differences that would end in a wrong load, as one UserError."""
        problems = model_differences(manifest, models)
        if optimizer is not None:
            theirs, ours = set(manifest["trained"]), set(_trained(models, self.state))
            if theirs != ours:
                names = ", ".join(sorted(theirs ^ ours)[:6])
                problems.append(f"other parameters are trained ({names}, ...); --finetune takes the weights alone")
            if manifest["distributed_optimizer"] != _is_distributed(optimizer):
                problems.append(
                    "use_distributed_optimizer differs; set it as it was, or take the weights with --finetune"
                )
        if problems:
            raise UserError(f"{path} does not fit this run: " + "; ".join(problems))

    def _say(self, text: str) -> None:
        if self.state.rank == 0:
            print(f"checkpoint: {text}", file=sys.stderr, flush=True)


def save_checkpoint(
    save: Path,
    iteration: int,
    models: list[torch.nn.Module],
    assets: HFDirectory,
    state: ParallelState,
    *,
    optimizer: Any = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write and publish SAVE/iter_NNNNNNN and the tracker; collective.  Without optimizer: weights and assets alone."""
    aside = _open_aside(save, iteration, state)
    destination = directories.iteration_path(save, iteration)
    try:
        write_sharded(aside, models, optimizer, state)
        mine = _checksums(aside, state.rank)
        content = {
            "iteration": iteration,
            "optimizer": optimizer is not None,
            "distributed_optimizer": _is_distributed(optimizer),
            "dtype": str(next(unwrap(models[0]).parameters()).dtype).removeprefix("torch."),
            "layout": _layout(state),
            "model": describe_model(models),
            "trained": _trained(models, state),
        }
        gathered = [None] * state.world_size if state.rank == 0 else None
        dist.gather_object((mine, rng_state()), gathered, dst=0)
        problem = None
        if state.rank == 0:
            problem = _publish(aside, destination, content, gathered, assets, extra)
        agree(problem, state)
    except BaseException:
        if state.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return destination


def _open_aside(save: Path, iteration: int, state: ParallelState) -> Path:
    """The hidden directory, made by rank 0 and known to all."""
    message = [None, None]
    if state.rank == 0:
        try:
            message[0] = str(directories.new_aside(save, iteration))
        except OSError as error:
            message[1] = f"nothing can be saved under {save}: {error}"
    dist.broadcast_object_list(message, src=0)
    if message[1]:
        raise UserError(message[1])
    return Path(message[0])


def _publish(aside, destination, content, gathered, assets, extra) -> str | None:
    """Rank 0: the small files, the manifest, the rename, the tracker; returns what went wrong, if anything."""
    try:
        if failed := [mine for mine, _ in gathered if isinstance(mine, str)]:
            raise OSError(failed[0])
        write_json(aside / "extra.json", extra or {})
        write_json(aside / "rng.json", [rng for _, rng in gathered])
        save_assets(assets, aside / ASSETS, dtype=content["dtype"])
        checksums = {name: value for mine, _ in gathered for name, value in mine.items()}
        directories.seal(aside, destination, content, checksums)
        directories.write_tracker(destination.parent, content["iteration"])
    except OSError as error:
        return f"the checkpoint {destination} could not be written: {error}"
    return None


def _checksums(aside: Path, rank: int) -> dict[str, int] | str:
    """CRC-32 of the shards that this rank wrote; a failure as text, so that rank 0 hears of it."""
    try:
        return {path.name: directories.crc32(path) for path in aside.glob(f"__{rank}_*.distcp")}
    except OSError as error:
        return str(error)


def _layout(state: ParallelState) -> dict[str, int]:
    return {"world_size": state.world_size, "tp": state.tp_size, "pp": state.pp_size, "dp": state.dp_size}


def _trained(models: list[torch.nn.Module], state: ParallelState) -> list[str]:
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
    return sorted(set().union(*stages) - ({"output_layer.weight"} if _tied(models) else set()))


def _tied(models: list[torch.nn.Module]) -> bool:
    return unwrap(models[0]).model_config.tie_word_embeddings


def _is_distributed(optimizer: Any) -> bool:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(hasattr(part, "gbuf_ranges") for part in parts)
