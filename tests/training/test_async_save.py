"""Saving in the background: the files of a save in the step, whatever training does meanwhile, one at a time."""

import json
import os
import threading

import pytest
import torch
from checkpoint_runs import Run
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints import layout
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.testing import run_distributed

TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_directory(tmp_path_factory.mktemp("async") / "tiny", layers=2, vision_depth=1, vocab_rows=421)


@pytest.fixture
def state():
    with init_distributed(ParallelConfig()) as state:
        yield state


class Gate:
    """In place of layout.new_aside: the thread comes to a stop before it writes anything."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        through = layout.new_aside

        def wait_and_make(*arguments):
            assert self.open.wait(60)
            return through(*arguments)

        monkeypatch.setattr(layout, "new_aside", wait_and_make)


def manifest(save):
    return json.loads((layout.iteration_path(save, 2) / layout.MANIFEST).read_text())


def save_both_ways(path, folder, **options):
    """One rank: the same step saved in the step, and by a thread that writes when training is three steps further.

    Returns whether the weights moved meanwhile.
    """
    parallel = ParallelConfig(**options.pop("layout", {}))
    with pytest.MonkeyPatch.context() as patch, init_distributed(parallel) as state:
        run = Run(path, state, parallel=parallel, save=f"{folder}/in_step", **options)
        run.step()
        run.step()
        run.save(2)
        later = run.checkpointer
        later.config.save, later.config.async_save = f"{folder}/in_background", True
        later.group = torch.distributed.new_group(backend="gloo")
        gate = Gate(patch)
        before = run.weight()
        run.save(2)
        for _ in range(3):
            run.step()
            torch.rand(1)
        assert not layout.list_iterations(later.config.save)
        gate.open.set()
        run.checkpointer.close()
        state.barrier()
        return before != run.weight()


def run_cases(path, folder, cases):
    return [save_both_ways(path, f"{folder}/{number}", **case) for number, case in enumerate(cases)]


CASES = {
    1: [{}, {"layout": {"use_distributed_optimizer": False}}, {"fp32": False, "train_vision": True}],
    2: [{}, {"layout": TP2, "fp32": False}, {"layout": {"overlap_grad_reduce": True}}],
}


@pytest.mark.parametrize("world_size", CASES)
def test_the_same_bytes_as_a_save_in_the_step(tiny, tmp_path, world_size):
    """Sizes and CRC-32 of all files: weights, optimizer, generators, schedule, layout."""
    cases = CASES[world_size]
    moved = run_distributed(run_cases, world_size, tiny, str(tmp_path), cases)
    assert moved == [[True] * len(cases)] * world_size
    for number, case in enumerate(cases):
        in_step, in_background = (manifest(tmp_path / str(number) / way) for way in ("in_step", "in_background"))
        assert len(in_step["files"]) > 8 and in_step["optimizer"]
        assert in_background == in_step, case


def test_one_at_a_time(tiny, state, tmp_path, monkeypatch):
    """The next save, and the end of the run, wait for the one before; the record has both times."""
    run = Run(tiny, state, save=str(tmp_path / "run"), async_save=True, keep_latest_checkpoints=1)
    gate = Gate(monkeypatch)
    run.fill(1)
    run.save(1)
    assert list(run.checkpointer.take_seconds()) == ["seconds_save"]
    threading.Timer(0.2, gate.open.set).start()
    run.fill(2)
    run.save(2)
    assert layout.read_tracker(tmp_path / "run") == 1 or layout.list_iterations(tmp_path / "run") == [2]
    run.fill(3)
    run.save(3, last=True)
    assert not run.checkpointer.background.busy and layout.list_iterations(tmp_path / "run") == [3]
    assert list(run.checkpointer.take_seconds()) == ["seconds_save", "seconds_save_background"]
    assert run.checkpointer.take_seconds() == {}
    run.save(4)
    run.checkpointer.close()
    assert layout.list_iterations(tmp_path / "run") == [4]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    run.fill(0)
    assert run.load() == {"iteration": 4} and run.weight() == 3


def test_damaged_ones_are_passed_over(tiny, state, tmp_path, capfd):
    run = Run(tiny, state, save=str(tmp_path / "run"), async_save=True)
    for iteration in (1, 2, 3):
        run.fill(iteration)
        run.save(iteration)
    run.checkpointer.close()
    newest, middle = (next((tmp_path / "run" / name).glob("*.distcp")) for name in ("iter_0000003", "iter_0000002"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    os.truncate(middle, middle.stat().st_size - 1)
    assert run.load() == {"iteration": 1} and run.weight() == 1
    assert capfd.readouterr().err.count("DAMAGED, passed over") == 2


def test_a_lost_one_is_said_where_the_run_ends_by_another_error(tiny, state, tmp_path, monkeypatch, capfd):
    def fails(*arguments):
        raise OSError("made to fail")

    run = Run(tiny, state, save=str(tmp_path / "run"), async_save=True)
    monkeypatch.setattr(layout, "new_aside", fails)
    run.save(1)
    run.checkpointer.close()
    said = capfd.readouterr().err
    assert "in the background is lost" in said and "made to fail" in said
