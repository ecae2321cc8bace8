"""Checkpointer: what is kept, what is gone on from, what is refused, and what a disk that fails does."""

import random
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch
from checkpoint_runs import Run, full_disk, mount_disk, no_permission, read_only, unmount
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints import layout
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.testing import run_distributed
from umer1.training.checkpoint import CheckpointConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_directory(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1, vision_depth=1)


@pytest.fixture
def state():
    with init_distributed(ParallelConfig()) as state:
        yield state


@pytest.fixture
def saved(tiny, state, tmp_path):
    """Iterations 5, 10 and 15, whose weights are all 5, 10 and 15."""
    run = Run(tiny, state, save=str(tmp_path / "run"), keep_latest_checkpoints=0)
    for iteration in (5, 10, 15):
        run.fill(iteration)
        run.save(iteration)
    return str(tmp_path / "run")


def test_a_new_run_starts_from_nothing(tiny, state, tmp_path):
    run = Run(tiny, state, save=str(tmp_path / "run"), save_interval=4)
    assert run.load() is None
    assert [n for n in range(1, 13) if run.checkpointer.is_due(n)] == [4, 8, 12]
    unsaved = Run(tiny, state)
    unsaved.save(1)
    assert unsaved.load() is None and not unsaved.checkpointer.is_due(500)


def test_the_newest_stay_and_the_newest_is_taken(tiny, state, saved):
    run = Run(tiny, state, save=saved, keep_latest_checkpoints=2)
    assert run.load() == {"iteration": 15} and run.weight() == 15
    assert run.checkpointer.loaded_from.name == "iter_0000015"
    run.save(20)
    assert layout.list_iterations(saved) == [15, 20]
    assert layout.read_tracker(saved) == 20


def test_every_nth_stays_for_good(tiny, state, tmp_path):
    run = Run(tiny, state, save=str(tmp_path / "run"), save_interval=5, keep_latest_checkpoints=1, keep_every=10)
    for iteration in (5, 10, 15, 20, 25):
        run.save(iteration)
    assert layout.list_iterations(tmp_path / "run") == [10, 20, 25]
    config = CheckpointConfig(save_interval=4, keep_every=10, keep_latest_checkpoints=0)
    wanted = "keep_every=10 must be 0 (none stays for good) or a multiple of save_interval=4"
    assert config.violations() == [wanted, "keep_every=10 needs keep_latest_checkpoints above 0, which keeps all"]


def test_load_is_for_a_save_that_has_nothing_yet(tiny, state, saved, tmp_path):
    """The same command, killed and repeated, goes on from --save and not from --load again."""
    flags = {"save": str(tmp_path / "next"), "load": saved, "ckpt_step": 10}
    run = Run(tiny, state, **flags)
    assert run.load() == {"iteration": 10} and run.weight() == 10
    run.fill(11)
    run.save(11)
    again = Run(tiny, state, **flags)
    assert again.load() == {"iteration": 11} and again.weight() == 11


def test_finetune_takes_the_weights_alone(tiny, state, saved, tmp_path):
    run = Run(tiny, state, save=str(tmp_path / "next"), load=saved, finetune=True)
    assert run.load() is None
    assert run.weight() == 15 and run.scheduler.num_steps == 0
    # the main copies of the optimizer are the loaded weights, too: a step with zero gradients changes nothing
    run.models[0].zero_grad_buffer()
    run.optimizer.step()
    assert run.weight() == 15


def test_settings_of_this_run_win(tiny, state, saved):
    run = Run(tiny, state, save=saved, lr=0.5)
    run.load()
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.5}


def test_generators_go_on(tiny, state, tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    run = Run(tiny, state, save=str(tmp_path / "run"))
    draw()
    run.save(1)
    want = draw()
    assert draw() != want
    run.load()
    assert draw() == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_vision": True}, "other parameters are trained .*--finetune takes the weights alone"),
        ({"parallel": ParallelConfig(use_distributed_optimizer=False)}, "use_distributed_optimizer differs"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, state, saved, options, message):
    with pytest.raises(UserError, match=message):
        Run(tiny, state, save=saved, **options).load()


def test_another_model_is_refused(tiny, state, saved, tmp_path):
    other = make_tiny_directory(tmp_path / "other", layers=1, vision_depth=1, ffn=64)
    with pytest.raises(UserError, match="ffn_hidden_size is 96 there and 64 here"):
        Run(other, state, save=saved).load()


def test_load_without_a_checkpoint_is_refused(tiny, state, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        Run(tiny, state, load=str(tmp_path / "empty")).load()
    with pytest.raises(UserError, match="ckpt_step=7"):
        Run(tiny, state, load=saved, ckpt_step=7).load()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made a directory"):
        Run(tiny, state, save=str(tmp_path / "file"))


def test_violations_come_together(tmp_path):
    config = CheckpointConfig(save_interval=0, keep_latest_checkpoints=-1, ckpt_step=3, finetune=True)
    assert len(config.violations()) == 4
    (tmp_path / "file").touch()
    (problem,) = CheckpointConfig(save=str(tmp_path / "file" / "run")).violations()
    assert problem.endswith(f"cannot be a directory: {tmp_path}/file is a file")
    assert CheckpointConfig(save=str(tmp_path / "new" / "run")).violations() == []
    same = CheckpointConfig(save=str(tmp_path / "a"), load=str(tmp_path / "a"))
    assert same.violations() == []  # the first start of a command that names one directory twice
    assert "is not a directory" in CheckpointConfig(load=str(tmp_path / "b")).violations()[0]


def with_faults(path, save, disk):
    """One rank: in both ways of saving, a save under each fault, then one without; returns what was said and done.

    disk: a file system that can be made read-only, or None.
    """
    with init_distributed(ParallelConfig()) as state:
        first, last = state.rank == 0, state.rank == state.world_size - 1
        faults = {
            "full": lambda folder: full_disk(),
            "full for the last rank": lambda folder: full_disk() if last else nullcontext(),
            "no permission": lambda folder: no_permission(folder) if first else nullcontext(),
        }
        if disk:
            faults["read-only"] = lambda folder: read_only(disk) if first else nullcontext()
        outcomes = {}
        for number, (name, way) in enumerate(product(faults, (False, True))):
            folder = f"{disk if name == 'read-only' else save}/{number}"
            run = Run(path, state, save=folder, async_save=way)
            run.fill(1)
            run.save(1)
            run.checkpointer.wait()
            run.fill(2)
            state.barrier()
            with faults[name](folder), pytest.raises(UserError) as said:
                run.save(2)
                run.checkpointer.wait()
            state.barrier()
            left = sorted(entry.name for entry in layout.Path(folder).iterdir())
            found = run.load()
            loaded = run.weight()
            run.save(3)
            run.checkpointer.close()
            state.barrier()
            outcomes[f"{name}, {'in the background' if way else 'in the step'}"] = (
                str(said.value),
                left,
                found,
                loaded,
                layout.list_iterations(folder),
            )
        return outcomes


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fails_is_one_message_on_every_rank_and_costs_nothing(tiny, tmp_path, world_size):
    """Both ways of saving; where this user can't mount a file system, without the read-only one."""
    disk = tmp_path / "disk"
    mounted = mount_disk(disk)
    try:
        ranks = run_distributed(with_faults, world_size, tiny, str(tmp_path / "run"), str(disk) if mounted else None)
    finally:
        if mounted:
            unmount(disk)
    causes = {"full": "File too large", "no permission": "Permission denied", "read-only": "Read-only file system"}
    for outcome in ranks:
        assert outcome == ranks[0] and len(outcome) == 2 * (3 + mounted)
        for name, (said, left, found, weight, at_last) in outcome.items():
            assert "could not be written" in said and ("GiB free" in said or "no permission" in name), name
            assert next(cause for fault, cause in causes.items() if name.startswith(fault)) in said, name
            assert left == ["iter_0000001", layout.TRACKER], name
            assert found == {"iteration": 1} and weight == 1, name
            assert at_last == [1, 3], name
