"""A weight update tells all ranks the same, whatever one engine does; nobody is left waiting."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import load_hf
from umer1.rl.checksum import checksum
from umer1.rl.types import EngineDied
from umer1.rl.weight_sync import EXIT_STATUS, WeightSync
from umer1.testing import run_distributed

LIMIT, SLOW = 4.0, 6.0  # seconds of an update, and of an engine over it; a busy machine needs up to 2 s for the rest


class FakeEngine:
    """Takes weights; misbehaves in one way on one rank."""

    name, collective = "fake", False

    def __init__(self, fault: str, rank: int, at: int = 5):
        self.fault = fault if dist.get_rank() == rank else ""
        self.at, self.taken = at, {}

    def load_weights(self, tensors):
        self.taken = {}
        if self.fault == "is slow to start":
            time.sleep(SLOW)
        if self.fault == "dies at the start":
            raise EngineDied("its last words")
        for number, (name, tensor) in enumerate(tensors):
            if number == self.at:
                self.misbehave(tensor)
                if self.fault == "leaves early":
                    break
            self.taken[name] = tensor.clone()
        if self.fault == "reports nothing":
            return {}
        if self.fault == "reports a stranger":
            return {"stranger": 1.0}
        arrived = {name: checksum(tensor) for name, tensor in self.taken.items()}
        if self.fault == "keeps the old":
            self.taken["model.norm.weight"].zero_()
        return arrived | {f"engine:{name}": checksum(tensor) for name, tensor in self.taken.items()}

    def misbehave(self, tensor):
        if self.fault == "dies":
            raise EngineDied("its last words")
        if self.fault == "fails":
            raise KeyError("its own mistake")
        if self.fault == "is slow":
            time.sleep(SLOW)
        if self.fault == "hangs":
            time.sleep(1000)


def synced(path, layout, fault, rank, timeout, grace=60.0):
    """One rank: (type of error, message) of an update with a fault; then one without, to see that all go on."""
    parallel = ParallelConfig(**layout)
    directory = HFDirectory.open(path)
    with init_distributed(parallel) as state:
        models = build_model(directory.config, parallel, state, params_dtype=torch.float32)
        load_hf(models, directory, state)
        engine = FakeEngine(fault, rank)
        sync = WeightSync(engine, state, timeout, grace=grace)
        try:
            seconds, result = sync(models), ("well", "")
            assert 0 < seconds < 100
        except Exception as error:
            result = (type(error).__name__, str(error))
        engine.fault = ""
        WeightSync(engine, state, 100.0)(models)
        assert len(engine.taken) == len(directory.tensors)
        return result


def synced_all(path, layout, faults):
    return {fault: synced(path, layout, fault, rank, timeout) for fault, rank, timeout in faults}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_directory(tmp_path_factory.mktemp("sync") / "model", embedding_tokens=True)


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_a_bad_engine_is_known_to_all(path, layout):
    faults = [
        ("dies", 1, 100.0),
        ("fails", 1, 100.0),
        ("leaves early", 0, 100.0),
        ("keeps the old", 1, 100.0),
        ("reports a stranger", 1, 100.0),
        ("is slow", 1, LIMIT),
        ("is slow to start", 1, LIMIT),
        ("dies at the start", 0, 100.0),
    ]
    for rank, found in enumerate(run_distributed(synced_all, 2, path, layout, faults)):
        kind, text = found["dies"]
        assert kind == "EngineDied" and "rank 1" in text and "its last words" in text
        kind, text = found["fails"]
        if rank == 1:
            assert kind == "KeyError"
        else:
            assert kind == "UserError" and "rank 1" in text and "its own mistake" in text and "tensor 6" in text
        assert found["leaves early"] == ("well", "")
        kind, text = found["keeps the old"]
        assert (
            kind == "UserError"
            and "rank 1" in text
            and "1 of" in text
            and "engine:model.norm.weight: the trainer" in text
        )
        kind, text = found["reports a stranger"]
        assert kind == "UserError" and "stranger: the trainer has no such tensor" in text
        kind, text = found["is slow"]
        assert kind == "UserError" and "rank 1: weight update of the fake engine did not end within 4 s" in text
        assert found["is slow to start"] == ("well", "")
        kind, text = found["dies at the start"]
        assert kind == "EngineDied" and "rank 0" in text and "its last words" in text


def test_no_checksum_at_all_is_no_success(path):
    parallel, directory = ParallelConfig(), HFDirectory.open(path)
    with init_distributed(parallel) as state:
        models = build_model(directory.config, parallel, state, params_dtype=torch.float32)
        with pytest.raises(UserError, match="no engine reported a checksum"):
            WeightSync(FakeEngine("reports nothing", 0), state, 100.0)(models)


def test_a_stuck_rank_ends_its_process_with_a_message(path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_weight_sync as t, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "t.synced(sys.argv[2], {}, 'hangs', 0, 1.0, grace=1.0)\n"
    )
    folder = Path(__file__).parent
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder.parent)!r})\n{program}"]
    done = subprocess.run([*command, str(folder), str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_STATUS, done.stderr
    said = "rank 0: weight update of the fake engine is stuck for too long (limit 1 s), while the engine takes"
    assert f"{said} tensor 6, " in done.stderr
