"""How long a training step waits for a checkpoint, saved in the step and in the background (--async-save).

    .venv/bin/python perf/save_time.py --folder /tmp/save_time [--repeats 5] [--ranks 1 2]

Trains a Qwen2-VL of about 40M parameters in fp32 (16 bytes a parameter in a checkpoint) on synthetic pairs and saves
after each of `repeats` steps into FOLDER, whose disk is what is measured; a save in the background is followed by
steps until it is over.  Writes perf/results/save_time_cpu.json; the checkpoints are deleted.
"""

import argparse
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from plan_cases import Case, CaseTrainer, made_pairs, shape
from provenance import new_record, save_record

from umer1.checkpoints.layout import newest_first
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.testing import run_distributed
from umer1.training.checkpoint import CheckpointConfig
from umer1.training.config import SFTConfig

MODEL = shape(512, 8, 8, 4, 1536, 24_000)
SIDE = {"text": 32, "response": 32, "grid": (4, 4)}
TIMES = ("step", "in_step", "waits", "background", "steps_beside")  # what is timed, as the record calls it


@dataclass(kw_only=True)
class SavedCase(Case):
    """A run that keeps one checkpoint in `folder`."""

    folder: str

    def config(self) -> SFTConfig:
        return replace(
            super().config(), checkpoint=CheckpointConfig(save=self.folder, async_save=True, keep_latest_checkpoints=1)
        )


def case_of(ranks: int, folder: str, model: Qwen2VLConfig = MODEL) -> SavedCase:
    sides = (SIDE, SIDE)
    return SavedCase(
        name=f"dp{ranks}", world_size=ranks, model=model, pairs=8, micro_batch=4, sides=sides, folder=folder
    )


def measure(case: SavedCase, repeats: int) -> dict[str, Any]:
    """On each rank: seconds of each save and step, and the checkpoint's bytes, this rank's share of them too."""
    with init_distributed(ParallelConfig(**case.parallel), seed=1) as state:
        trainer = CaseTrainer(case, made_pairs(case, state.dp_rank, case.pairs // state.dp_size), state)
        checkpointer = trainer.checkpointer

        def step() -> float:
            started = time.perf_counter()
            trainer.train_step()
            return time.perf_counter() - started

        def is_busy_anywhere() -> bool:
            busy = torch.tensor([int(checkpointer.background.busy)])
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
            return bool(busy)

        def save(last: bool) -> float:
            state.barrier()
            checkpointer.save(trainer.iteration, trainer.models, trainer.optimizer, trainer.scheduler, {}, last=last)
            return checkpointer.take_seconds()["seconds_save"]

        step(), save(True)  # makes the optimizer's states, settles which rank writes what
        found: dict[str, list[float]] = {name: [] for name in TIMES}
        for _ in range(repeats):
            found["step"].append(step())
            found["in_step"].append(save(True))
        for _ in range(repeats):
            step()
            found["waits"].append(save(False))
            steps = [step()]
            while is_busy_anywhere():
                steps.append(step())
            found["steps_beside"] += steps
            checkpointer.wait()
            found["background"].append(checkpointer.take_seconds()["seconds_save_background"])
        checkpoint = newest_first(case.folder)[0]
        sizes = {path.name: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
        share = sum(size for name, size in sizes.items() if name.startswith(f"__{state.rank}_"))
        checkpointer.close()
        return {"seconds": found, "checkpoint_bytes": sum(sizes.values()), "own_bytes": share}


def row(ranks: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over saves of the slowest rank, for which the others wait."""
    slowest = {f"{name}_s": max(median(each["seconds"][name]) for each in measured) for name in TIMES}
    return {
        "ranks": ranks,
        "checkpoint_bytes": measured[0]["checkpoint_bytes"],
        "largest_share_bytes": max(each["own_bytes"] for each in measured),
        **slowest,
        "waits_over_in_step": slowest["waits_s"] / slowest["in_step_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; needs 2 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    record = new_record("save_time")
    for ranks in options.ranks:
        folder = options.folder / str(ranks)
        measured = run_distributed(measure, ranks, case_of(ranks, str(folder)), options.repeats, timeout=900)
        shutil.rmtree(folder)
        record["rows"].append(row(ranks, measured))
        print(record["rows"][-1], flush=True)
    save_record(record)


if __name__ == "__main__":
    main()
