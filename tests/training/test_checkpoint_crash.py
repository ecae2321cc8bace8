"""A process killed at any moment of saving leaves checkpoints of which the newest valid one loads."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints import layout
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.checkpoint import CheckpointConfig, Checkpointer
from umer1.training.optimizer import OptimizerConfig, build_optimizer

KILLS = {"in the step": 20, "in the background": 10}


def _save_for_ever(path, save, way, pipe):
    """Child: load the newest checkpoint, check that it is of one piece, then save one after the other."""
    try:
        directory = HFDirectory.open(path)
        with init_distributed(ParallelConfig()) as state:
            models = build_training_model(ModelConfig(fp32=True), ParallelConfig(), directory, state)
            optimizer, scheduler = build_optimizer(OptimizerConfig(), models, use_distributed_optimizer=True)
            config = CheckpointConfig(save=str(save), keep_latest_checkpoints=2, async_save=way == "in the background")
            checkpointer = Checkpointer(config, state, directory)
            found = checkpointer.load(models, optimizer, scheduler)
            iteration = found["iteration"] if found else 0
            values = {float(p.detach().min()) for p in models[0].parameters()} if found else {0.0}
            values |= {float(p.detach().max()) for p in models[0].parameters()} if found else {0.0}
            assert values == {float(iteration)}, f"iteration {iteration} holds {values}"
            pipe.send(iteration)
            while True:
                iteration += 1
                with torch.no_grad():
                    for parameter in models[0].parameters():
                        parameter.fill_(iteration)
                started = time.monotonic()
                checkpointer.save(iteration, models, optimizer, scheduler, {"iteration": iteration})
                pipe.send(time.monotonic() - started)
    except BaseException as error:
        pipe.send(repr(error))
        raise


def _unfinished(save) -> bool:
    return any(entry.name.startswith(".tmp-") for entry in save.iterdir())


@pytest.mark.parametrize("way", KILLS)
def test_newest_valid_checkpoint_survives_any_kill(tmp_path, way):
    """KILLS children, forked from a process that has done the imports; each killed at a random moment of its saving,
    every second one when a checkpoint is certainly being written."""
    path = make_tiny_directory(tmp_path / "tiny", layers=1, vision_depth=1)
    save = tmp_path / "run"
    choose = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["umer1.training.build", "umer1.training.checkpoint", "umer1.training.optimizer"])
    published, left_behind, duration = 0, 0, 0.5
    for number in range(KILLS[way]):
        here, there = context.Pipe()
        child = context.Process(target=_save_for_ever, args=(path, save, way, there))
        child.start()
        assert here.poll(120), "the child did not come up"
        loaded = here.recv()
        assert isinstance(loaded, int), loaded
        # What the tracker named before the kill was complete; a later one may be, an earlier one may not.
        assert loaded >= published
        if number % 3 == 0:  # otherwise the first save is hit
            for _ in range(1 if way == "in the step" else 2):  # the second save returns when the first is published
                assert here.poll(120)
                duration = here.recv()
        moment = choose.uniform(0.0, duration)
        if number % 2:
            moment, end = choose.uniform(0.0, 0.01), time.monotonic() + 60
            while not _unfinished(save) and time.monotonic() < end:
                pass
        time.sleep(moment)
        published = layout.read_tracker(save) or published
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        left_behind += _unfinished(save)
    assert published > 3
    assert left_behind > 0, "no kill hit a save: the test has tested nothing"


def test_what_is_left_behind_is_removed_or_put_back(tmp_path):
    for name in (
        ".tmp-iter_0000003-0123456789ab",
        ".removed-iter_0000001-0123456789ab",
        ".old-iter_0000002-0123456789ab",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".tmp-of-somebody-else").mkdir()
    removed = layout.remove_left_behind(tmp_path)
    assert removed == [".removed-iter_0000001-0123456789ab", ".tmp-iter_0000003-0123456789ab"]
    # killed between the two renames of a replacement: the earlier checkpoint has its name again
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-of-somebody-else", "iter_0000002"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_publish_replaces(tmp_path, monkeypatch, exchange):
    from umer1 import atomic_directory

    if not exchange:
        monkeypatch.setattr(atomic_directory, "_exchange", lambda first, second: False)
    for content in ("one", "two"):
        aside = atomic_directory.aside_path(tmp_path / "target")
        aside.mkdir()
        (aside / content).write_text(content)
        atomic_directory.publish(aside, tmp_path / "target")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
