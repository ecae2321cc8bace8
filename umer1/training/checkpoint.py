"""Checkpoints that appear whole or not at all, and resume from the newest valid one at any TP, PP and DP.

A checkpoint is put together in a hidden directory, made durable, renamed, and only then named by the tracker; with
--async-save by a thread, while training goes on.  Rank 0 decides which one is loaded and tells the others; damaged ones
are passed over with a message.
"""

import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from umer1.checkpoints import layout as directories
from umer1.checkpoints.search import find_checkpoint, read_json
from umer1.checkpoints.sharded_state import read_sharded
from umer1.checkpoints.shards import ShardTaker
from umer1.checkpoints.source import ASSETS, model_differences
from umer1.data.input_settings import InputSettings
from umer1.distributed.fp8_weights import cast_main_weights, set_main_weights
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory, asset_texts
from umer1.models.qwen2_vl.weights import agree
from umer1.rules import path_problems
from umer1.training.background import Background
from umer1.training.rng import set_rng_state
from umer1.training.snapshot import (
    Snapshot,
    is_distributed,
    layout_of,
    take_snapshot,
    trained_names,
    write_snapshot,
)

# Of the thread's collectives, in which ranks wait for the slowest disk.  A rank that dies is noticed at once; a disk
# that hangs is found by umer1.training.hang, when the training thread waits at the next save.
_THREAD_TIMEOUT = timedelta(days=1)


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
    async_save: bool = False
    """Write in the background while training goes on; each rank's share waits in host memory, a failure is told after
    the step at hand."""
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
        if self.save and (problem := directories.place_problem(self.save)):
            problems.append(problem)
        if self._loads_from_elsewhere:
            problems += path_problems("load", self.load, Path.is_dir, "is not a directory")
        return problems

    @property
    def _loads_from_elsewhere(self) -> bool:
        same = self.load and self.save and Path(self.load).absolute() == Path(self.save).absolute()
        return bool(self.load) and not same


class Checkpointer:
    """Saves and loads the state of one run; `save`, `load` and the making of one are collective."""

    def __init__(self, config: CheckpointConfig, state: ParallelState, assets: HFDirectory, algorithm: str = "sft"):
        self.config, self.state, self.assets, self.algorithm = config, state, assets, algorithm
        self.loaded_from: Path | None = None
        problem = None
        if config.save and state.rank == 0:
            problem = directories.is_writable(config.save)
            for name in directories.remove_left_behind(config.save):
                self._say(f"removed {Path(config.save) / name}, left behind by an interrupted run")
        agree(problem, state)
        self.taker = ShardTaker(state)
        self.asset_texts: dict[str, str] = {}  # made once: a tokenizer's takes a while with the interpreter's lock held
        self.background = Background("checkpoint")
        self.seconds = 0.0  # for which steps have waited since `take_seconds`
        self.group: dist.ProcessGroup | None = None
        if config.save and config.async_save:
            # On CPUs, and never used by the training thread: collectives of two threads must not meet in one group.
            self.group = dist.new_group(backend="gloo", timeout=_THREAD_TIMEOUT)

    def is_due(self, iteration: int) -> bool:
        return self.config.save is not None and iteration % self.config.save_interval == 0

    def save(
        self,
        iteration: int,
        models: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        extra: dict[str, Any],
        *,
        last: bool = False,
    ) -> None:
        """Publish a checkpoint of `iteration`; without --save nothing happens.

        scheduler: megatron's OptimizerParamScheduler.  extra: the trainer's own state, JSON.  Raises UserError on every
        rank when it, or the one before, could not be written; earlier checkpoints are untouched then.
        With --async-save it is published while training goes on (`failed`, `wait`), unless it is the `last`.
        """
        if self.config.save is None:
            return
        started = time.perf_counter()
        self.wait()
        everything = {"algorithm": self.algorithm, "scheduler": scheduler.state_dict(), "trainer": extra}
        in_background = self.config.async_save and not last
        snapshot = take_snapshot(iteration, models, optimizer, self.taker, everything, copy=in_background)
        if not self.asset_texts and self.state.rank == 0:
            self.asset_texts = asset_texts(self.assets, dtype=snapshot.content["dtype"])
        if in_background:
            self.background.start(lambda: self._publish(snapshot, self.group))
        else:
            self._publish(snapshot, None)
        self.seconds += time.perf_counter() - started

    def _publish(self, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
        write_snapshot(Path(self.config.save), snapshot, self.asset_texts, self.state, group)
        if self.state.rank == 0:
            directories.prune(self.config.save, self.config.keep_latest_checkpoints, self.config.keep_every)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint in the background could not be written; `wait` says why."""
        return self.background.failed

    def wait(self) -> None:
        """Until no checkpoint is being written.  Raises UserError on every rank when one could not be written."""
        self.background.wait()

    def close(self) -> None:
        """The end of a run, also of one that fails: what is being written is finished, or said to be lost."""
        try:
            self.wait()
        except Exception as error:
            self._say(f"the one in the background is lost: {error}")
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def take_seconds(self) -> dict[str, float]:
        """For the record, since the last call: seconds in which steps waited for saves, and of a save in the background
        that is over."""
        found = {"seconds_save": self.seconds or None, "seconds_save_background": self.background.seconds}
        self.seconds, self.background.seconds = 0.0, None
        return {name: value for name, value in found.items() if value is not None}

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
        unrounded = read_sharded(path, models, None if weights_only else optimizer, self.state)
        self.loaded_from = path
        if weights_only:
            optimizer.reload_model_params()
            set_main_weights(optimizer, unrounded)
            cast_main_weights(optimizer, models)
            self._say(f"weights from {path}; optimizer, schedule and iteration start anew")
            return None
        scheduler.load_state_dict(extra["scheduler"])
        if manifest["layout"] == layout_of(self.state):
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
            problems += self._input_differences(path)
            theirs, ours = set(manifest["trained"]), set(trained_names(models, self.state))
            if theirs != ours:
                names = ", ".join(sorted(theirs ^ ours)[:6])
                problems.append(f"other parameters are trained ({names}, ...); --finetune takes the weights alone")
            if manifest["distributed_optimizer"] != is_distributed(optimizer):
                problems.append(
                    "use_distributed_optimizer differs; set it as it was, or take the weights with --finetune"
                )
        if problems:
            raise UserError(f"{path} does not fit this run: " + "; ".join(problems))

    def _input_differences(self, path: Path) -> list[str]:
        """What the model saw so far and would not see any more, one clause each."""
        there = InputSettings.read(HFDirectory.open(path / ASSETS, weights=False))
        here = InputSettings.read(self.assets)
        if there is None or here is None or not (found := here.differences(there)):
            return []
        return [*found, "give these flags as they were, or take the weights alone (--load with --finetune)"]

    def _say(self, text: str) -> None:
        if self.state.rank == 0:
            print(f"checkpoint: {text}", file=sys.stderr, flush=True)


def save_checkpoint(
    save: Path, models: list[torch.nn.Module], assets: HFDirectory, state: ParallelState, iteration: int = 0
) -> Path:
    """Write and publish SAVE/iter_NNNNNNN with weights and assets alone; collective."""
    snapshot = take_snapshot(iteration, models, None, ShardTaker(state), {})
    return write_snapshot(save, snapshot, asset_texts(assets, dtype=snapshot.content["dtype"]), state)
