"""The newest valid checkpoint is found whatever was damaged, and nothing hostile in one is executed or followed."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from tiny_qwen2_vl import make_tiny_directory

from umer1 import conversion
from umer1.checkpoints import layout
from umer1.checkpoints.search import find_checkpoint
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.testing import run_distributed


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A save directory with iterations 1 to 3, the same weights in each."""
    folder = tmp_path_factory.mktemp("good")
    tiny = make_tiny_directory(folder / "tiny", layers=1, vision_depth=1)
    conversion.main(["--from-hf", str(tiny), "--to-checkpoint", str(folder / "run")])
    first = folder / "run" / "iter_0000000"
    for iteration in (1, 2, 3):
        copy = layout.iteration_path(folder / "run", iteration)
        shutil.copytree(first, copy)
        manifest = json.loads((copy / layout.MANIFEST).read_text())
        layout.write_manifest(copy, {**manifest, "iteration": iteration})
    shutil.rmtree(first)
    layout.write_tracker(folder / "run", 3)
    return folder / "run"


@pytest.fixture
def run(good, tmp_path):
    return shutil.copytree(good, tmp_path / "run")


def _found(place, iteration=None):
    with init_distributed(ParallelConfig()) as state:
        path = find_checkpoint(place, state, iteration)
    return path.name if path else None


def _flip(path):
    """One bit in the middle: the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class _Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def _reseal(directory):
    """A careful attacker writes a manifest that fits."""
    manifest = json.loads((directory / layout.MANIFEST).read_text())
    for name in manifest["files"]:
        path = directory / name
        manifest["files"][name] = {"size": path.stat().st_size, "crc32": layout.crc32(path)}
    layout.write_manifest(directory, manifest)


def _evil_metadata(directory):
    (directory / ".metadata").write_bytes(pickle.dumps(_Evil(directory.parent / "EXECUTED")))
    _reseal(directory)


def _evil_common(directory):
    torch.save({"optimizer": _Evil(directory.parent / "EXECUTED")}, directory / "common.pt")
    _reseal(directory)


def _legacy_common(directory):
    (directory / "common.pt").write_bytes(pickle.dumps(_Evil(directory.parent / "EXECUTED")))
    _reseal(directory)


def _two_pickles(directory):
    """A second data.pkl, for readers that take another one than the checker."""
    with zipfile.ZipFile(directory / "common.pt", "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(_Evil(directory.parent / "EXECUTED")))
    _reseal(directory)


def _encrypted(directory):
    """Python's reader of archives raises what it raises for nothing else."""
    data = bytearray((directory / "common.pt").read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 8] |= 1
    (directory / "common.pt").write_bytes(data)
    _reseal(directory)


def _edit_metadata(directory, change):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    _reseal(directory)


def _object_entry(directory):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    def change(metadata):
        metadata.state_dict_metadata["decoder.final_layernorm.weight"] = BytesStorageMetadata()

    _edit_metadata(directory, change)


def _path_out(directory):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../../secret"

    _edit_metadata(directory, change)


def _manifest(directory, change):
    manifest = json.loads((directory / layout.MANIFEST).read_text())
    change(manifest)
    layout.write_manifest(directory, manifest)


def _link(directory):
    shard = next(directory.glob("*.distcp"))
    shutil.move(shard, directory.parent / "elsewhere")
    shard.symlink_to(directory.parent / "elsewhere")


DAMAGE = {
    "shard cut short": lambda d: os.truncate(next(d.glob("*.distcp")), 1000),
    "shard with a flipped bit": lambda d: _flip(next(d.glob("*.distcp"))),
    "shard missing": lambda d: next(d.glob("*.distcp")).unlink(),
    "metadata with a flipped bit": lambda d: _flip(d / ".metadata"),
    "no manifest": lambda d: (d / layout.MANIFEST).unlink(),
    "manifest cut short": lambda d: os.truncate(d / layout.MANIFEST, 100),
    "manifest is a list": lambda d: (d / layout.MANIFEST).write_text("[]"),
    "manifest of a later format": lambda d: _manifest(d, lambda m: m.update(format_version=99)),
    "manifest without a model": lambda d: _manifest(d, lambda m: m.pop("model")),
    "manifest with a name that no file system has": lambda d: _manifest(
        d, lambda m: m["files"].update({"x" * 300: {"size": 1, "crc32": 0}})
    ),
    "manifest leads out": lambda d: _manifest(d, lambda m: m["files"].update({"../x": {"size": 1, "crc32": 0}})),
    "empty directory": lambda d: (shutil.rmtree(d), d.mkdir()),
    "link in place of a shard": _link,
    "code in .metadata": _evil_metadata,
    "something else in .metadata": lambda d: ((d / ".metadata").write_bytes(pickle.dumps({})), _reseal(d)),
    "code in common.pt": _evil_common,
    "code in an old-style common.pt": _legacy_common,
    "code in a second data.pkl": _two_pickles,
    "an encrypted common.pt": _encrypted,
    "pickled object among the tensors": _object_entry,
    "metadata points out of the directory": _path_out,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_passed_over_loudly(run, case, capfd):
    DAMAGE[case](run / "iter_0000003")
    assert _found(run) == "iter_0000002"
    assert not (run / "EXECUTED").exists()
    said = capfd.readouterr().err
    assert "DAMAGED, passed over" in said and "iter_0000003" in said


def test_undamaged_ones_are_taken_in_order(run, capfd):
    assert _found(run) == "iter_0000003"
    assert capfd.readouterr().err == ""
    assert _found(run, iteration=1) == "iter_0000001"
    assert _found(run, iteration=9) is None
    assert _found(run / "iter_0000002") == "iter_0000002"  # one checkpoint, named directly


@pytest.mark.parametrize("tracker", [None, "", "banana", "1", "99999"])
def test_the_tracker_is_only_a_hint(run, tracker, capfd):
    (run / layout.TRACKER).unlink()
    if tracker is not None:
        (run / layout.TRACKER).write_text(tracker)
    assert _found(run) == "iter_0000003"
    assert layout.TRACKER in capfd.readouterr().err


def test_nothing_whole_is_an_error_and_nothing_at_all_is_not(run, tmp_path):
    for iteration in (1, 2, 3):
        (run / f"iter_{iteration:07d}" / "common.pt").unlink()
    with pytest.raises(UserError) as error:
        _found(run)
    assert "3 checkpoint(s) and none is whole" in str(error.value)
    assert str(error.value).count("common.pt is missing") == 3
    assert _found(tmp_path / "nowhere") is None


def _on_every_rank(place):
    with init_distributed(ParallelConfig()) as state:
        return find_checkpoint(place, state).name


def test_all_ranks_agree(run):
    _flip(next((run / "iter_0000003").glob("*.distcp")))
    assert run_distributed(_on_every_rank, 2, run) == ["iter_0000002"] * 2


def test_pruning_keeps_the_newest_whole_ones(run):
    (run / "iter_0000003" / "common.pt").unlink()
    assert layout.prune(run, 1) == [1]
    # the damaged one is left for a person to look at and does not count
    assert layout.list_iterations(run) == [2, 3]
    assert layout.prune(run, 0) == []
