"""Trainer and engine on one GPU: who holds its memory when.  Stand-ins on the CPU: no GPU and no vLLM take part."""

from types import SimpleNamespace

import pytest
import torch
from tiny_qwen2_vl import make_tiny_directory

from umer1 import device
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.config import RolloutConfig
from umer1.rl.engines import vllm_engine
from umer1.rl.phase import FollowingEngine
from umer1.rl.types import EngineDied, Interrupted
from umer1.training.engines import await_engines


@pytest.fixture
def events(monkeypatch):
    """What happens, in order, on a machine that passes for one with a GPU."""
    found = []
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("memory given back"))
    return found


class Process:
    """Stands in for EngineProcess and the Channel to it: answers whatever is due, or dies."""

    pid, connection, log = 1, None, []
    answer: str | None = "started"

    def __init__(self, *arguments):
        if len(arguments) == 2:  # the process, not the Channel
            self.log.append("process")

    def send(self, op, *arguments, **settings):
        self.log.append(op)

    def poll(self, seconds):
        if self.answer is None:
            raise vllm_engine.ConnectionLost("gone")
        return SimpleNamespace(op=self.answer, fields={})

    def wait_for_end(self):
        return "exit status 1"

    def last_words(self):
        return "not enough memory"

    def kill(self):
        self.log.append("killed")


def make_engine(monkeypatch, tmp_path, events, **settings):
    kind = type("Process", (Process,), {"log": events})
    monkeypatch.setattr(vllm_engine, "EngineProcess", kind)
    monkeypatch.setattr(vllm_engine, "Channel", kind)
    directory = HFDirectory.open(make_tiny_directory(tmp_path / "model", hidden=128))
    engine = vllm_engine.VLLMEngine(
        RolloutConfig(), directory, dtype=torch.float32, max_model_len=64, rank=0, local_rank=0, **settings
    )
    return engine, kind


def test_memory_is_free_before_an_engine_starts_or_wakes(monkeypatch, tmp_path, events):
    engine, kind = make_engine(monkeypatch, tmp_path, events)
    assert events == ["memory given back", "process", "configure"]
    engine.wake()  # one that still starts is awake, and takes others' memory that becomes free for an error
    assert len(events) == 3
    engine.start()
    kind.answer = "done"
    engine.sleep()
    engine.wake()
    assert events[3:] == ["sleep", "memory given back", "wake"]
    engine.close()
    engine.restart()
    assert events[6:] == ["killed", "memory given back", "process", "configure"]
    engine.close()


def test_an_engine_that_died_at_its_start_says_why_again(monkeypatch, tmp_path, events):
    engine, kind = make_engine(monkeypatch, tmp_path, events)
    kind.answer = None
    for _ in range(2):
        with pytest.raises(EngineDied, match="while starting(.|\n)*not enough memory"):
            engine.start()
    kind.answer = "started"
    engine.restart()
    engine.start()
    engine.close()


def test_a_server_has_memory_of_its_own(monkeypatch, tmp_path, events):
    engine, _ = make_engine(monkeypatch, tmp_path, events, server=("localhost", 1))
    engine.wake()
    engine.restart()
    assert events == []


def test_ranks_that_share_an_engine_give_their_memory(events):
    follower = FollowingEngine()
    follower.sleep()
    assert events == []
    follower.wake()
    follower.restart()
    assert events == ["memory given back"] * 2


@pytest.mark.parametrize("error", [None, EngineDied("dead"), Interrupted("signal")])
def test_on_a_gpu_engines_stand_before_the_model_is_built(monkeypatch, events, error):
    class Phase:
        """Stands in for RolloutPhase."""

        def start(self, stop):
            events.append("start")
            if error is not None:
                raise error  # its first use says so

    config = SimpleNamespace(rollout=RolloutConfig())
    await_engines(Phase(), config, lambda: False)
    assert events == ["start"]
    await_engines(Phase(), SimpleNamespace(rollout=RolloutConfig(rollout_server="localhost:1")), lambda: False)
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    await_engines(Phase(), config, lambda: False)
    assert events == ["start"]
