"""`umer1 ckpt` on real checkpoints, whole and damaged."""

import json
import random
import shutil

import pytest
from tiny_qwen2_vl import make_tiny_directory

from umer1 import checkpoint_command, conversion
from umer1.checkpoints import administration, layout
from umer1.errors import UserError
from umer1.training.checkpoint import CheckpointConfig
from umer1.training.config import SFTConfig
from umer1.training.launch import open_directory

SEED = random.randrange(2**32)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A save directory with iterations 2, 4, ..., 12, the same weights in each, and the model they are of."""
    folder = tmp_path_factory.mktemp("good")
    tiny = make_tiny_directory(folder / "tiny", layers=1, vision_depth=1)
    conversion.main(["--from-hf", str(tiny), "--to-checkpoint", str(folder / "run")])
    first = folder / "run" / "iter_0000000"
    for iteration in range(2, 13, 2):
        copy = layout.iteration_path(folder / "run", iteration)
        shutil.copytree(first, copy)
        manifest = json.loads((copy / layout.MANIFEST).read_text())
        layout.write_manifest(copy, {**manifest, "iteration": iteration})
    shutil.rmtree(first)
    return folder


@pytest.fixture
def run(good, tmp_path):
    return shutil.copytree(good / "run", tmp_path / "run")


def damaged_file(run, iteration, rng):
    """Any file of the manifest."""
    path = layout.iteration_path(run, iteration)
    names = [name for name, about in layout.read_manifest(path)["files"].items() if about["size"]]
    return path / rng.choice(names)


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def verify(run, capsys, *flags):
    with pytest.raises(SystemExit) as end:
        checkpoint_command.main(["verify", str(run), *flags])
    return end.value.code, capsys.readouterr().out


def test_list(run, capsys):
    shutil.rmtree(layout.iteration_path(run, 6) / "hf")
    checkpoint_command.main(["list", str(run)])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [f"iter_{n:07d}" for n in range(12, 0, -2)]
    assert "weights alone, float32, written by one rank" in lines[0]
    assert "DAMAGED: hf/" in lines[3] and "is missing" in lines[3] and out.count("DAMAGED") == 1
    assert "goes on from iter_0000012" in out
    checkpoint_command.main(["list", str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one.get("iteration") for one in found] == [12, 10, 8, None, 4, 2]
    files = [file for file in layout.iteration_path(run, 12).rglob("*") if file.is_file()]
    assert found[0]["bytes"] == sum(file.stat().st_size for file in files)


def test_verify_finds_any_flipped_bit_and_any_cut(run, capsys):
    rng = random.Random(SEED)
    assert verify(run, capsys)[0] == 0
    flip(damaged_file(run, 8, rng), rng)
    cut = damaged_file(run, 4, rng)
    cut.write_bytes(cut.read_bytes()[:-1])
    status, out = verify(run, capsys)
    assert status == 1, SEED
    assert [line.split()[0] for line in out.splitlines() if "DAMAGED" in line] == ["iter_0000008", "iter_0000004"], SEED
    status, out = verify(run, capsys, "--json")
    assert status == 1 and [bool(one["problem"]) for one in json.loads(out)] == [False, False, True, False, True, False]
    assert verify(layout.iteration_path(run, 10), capsys)[0] == 0
    assert verify(layout.iteration_path(run, 8), capsys)[0] == 1


def test_verify_does_not_trust_a_manifest_that_fits_a_hostile_pickle(run, capsys):
    """What the loader would refuse is not called whole."""
    path = layout.iteration_path(run, 12)
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    manifest = json.loads((path / layout.MANIFEST).read_text())
    manifest["files"][".metadata"] = {"size": 24, "crc32": layout.crc32(path / ".metadata")}
    manifest["files"][".metadata"]["size"] = (path / ".metadata").stat().st_size
    layout.write_manifest(path, manifest)
    status, out = verify(run, capsys)
    assert status == 1 and out.splitlines()[0].startswith("iter_0000012     DAMAGED") and "system" in out


@pytest.mark.parametrize("lost", ["model", "trained", "layout"])
def test_verify_and_list_ask_what_the_loader_asks(run, capsys, lost):
    """A manifest without this cannot be resumed from, whatever its files are like."""
    path = layout.iteration_path(run, 12)
    layout.write_manifest(path, {**json.loads((path / layout.MANIFEST).read_text()), lost: 1})
    status, out = verify(run, capsys)
    assert status == 1 and f"DAMAGED: {layout.MANIFEST} lacks {lost}" in out
    checkpoint_command.main(["list", str(run)])
    assert "goes on from iter_0000010" in capsys.readouterr().out


def test_any_flipped_bit_of_a_manifest_is_found(run, capsys):
    """Nothing else has its checksum.  A flip between upper and lower case of an escape changes nothing that it says."""
    rng, path = random.Random(SEED), layout.iteration_path(run, 12)
    good = (path / layout.MANIFEST).read_bytes()
    said = json.loads(good)
    for _ in range(200):
        flip(path / layout.MANIFEST, rng)
        try:
            same = json.loads((path / layout.MANIFEST).read_bytes()) == said
        except ValueError:
            same = False
        try:
            layout.read_manifest(path)
            assert same, SEED
        except ValueError:
            assert not same, SEED
        (path / layout.MANIFEST).write_bytes(good)


def test_a_renamed_checkpoint_is_told(run, capsys):
    """Under a higher number it would be gone on from again and again, under a lower one removed before its time."""
    (run / "iter_0000012").rename(run / "iter_0000013")
    (run / "iter_0000010").rename(run / "iter_00000010")  # no name that a run gives
    (run / "iter_0000014").symlink_to("iter_0000008")
    status, out = verify(run, capsys)
    assert status == 1 and [line.split()[0] for line in out.splitlines() if "DAMAGED" in line] == [
        "iter_0000014",
        "iter_0000013",
    ]
    assert "it was renamed: its content is that of iteration 12" in out and "00000010" not in out
    assert layout.sound_iterations(run) == [2, 4, 6, 8]


def test_what_a_run_removes_meanwhile_is_not_damaged(run, capsys, monkeypatch):
    """A run that trains on keeps its latest checkpoints alone, and reading all of them takes a while."""
    paths = [*layout.newest_first(run), layout.iteration_path(run, 1)]
    monkeypatch.setattr(layout, "newest_first", lambda place: paths)
    status, out = verify(run, capsys)
    assert status == 0 and len(out.splitlines()) == 6
    checkpoint_command.main(["list", str(run), "--json"])
    assert [one["iteration"] for one in json.loads(capsys.readouterr().out)] == [12, 10, 8, 6, 4, 2]


def test_prune_beside_a_run_that_removes_the_same(run, capsys, monkeypatch):
    """One that is to stay goes while it is read, one that may go is gone when its turn comes."""

    def verify_late(path, progress=None):
        for iteration in (2, 8):
            shutil.rmtree(layout.iteration_path(run, iteration), ignore_errors=True)
        return administration.verify(path)

    monkeypatch.setattr(checkpoint_command, "verify", verify_late)
    checkpoint_command.main(["prune", str(run), "--keep-latest-checkpoints", "3"])
    assert layout.list_iterations(run) == [10, 12]


def test_prune(run, tmp_path, capsys):
    """Of a checkpoint that was moved to another disk the link goes."""
    moved = layout.iteration_path(run, 2).rename(tmp_path / "moved")
    layout.iteration_path(run, 2).symlink_to(moved)
    words = ["prune", str(run), "--keep-latest-checkpoints", "2", "--keep-every", "4"]
    checkpoint_command.main([*words, "--dry-run"])
    assert layout.list_iterations(run) == [2, 4, 6, 8, 10, 12]
    assert "would remove iter_0000006" in capsys.readouterr().out
    checkpoint_command.main(words)
    assert layout.list_iterations(run) == [4, 8, 10, 12] and not list(run.glob(".*"))
    assert "4 checkpoints stay" in capsys.readouterr().out and (moved / layout.MANIFEST).exists()


def test_prune_never_takes_the_last_whole_one(run):
    """Cut files do not count as kept; a flipped bit among those that are to stay stops it all."""
    rng = random.Random(SEED)
    cut = damaged_file(run, 12, rng)
    cut.write_bytes(cut.read_bytes()[:-1])
    words = ["prune", str(run), "--keep-latest-checkpoints", "1"]
    flip(damaged_file(run, 10, rng), rng)
    with pytest.raises(UserError, match="nothing was removed: .*iter_0000010 is to stay and is damaged"):
        checkpoint_command.main(words)
    assert len(layout.list_iterations(run)) == 6, SEED
    shutil.rmtree(layout.iteration_path(run, 10))
    checkpoint_command.main(words)
    assert layout.list_iterations(run) == [8, 12]


def test_export_takes_the_newest_whole_one(run, tmp_path):
    """The model is what `umer1 convert` writes of it."""
    rng = random.Random(SEED)
    flip(damaged_file(run, 12, rng), rng)
    checkpoint_command.main(["export", str(run), "--to-hf", str(tmp_path / "hf")])
    conversion.main(["--from-checkpoint", str(run / "iter_0000010"), "--to-hf", str(tmp_path / "again")])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "again")]
    assert files[0] == files[1], SEED


def test_a_damaged_tokenizer_is_not_taken_with_an_older_ones_weights(run, tmp_path):
    """JSON still, of the same size: only its checksum tells.  A run that goes on from --load asks the same."""
    tokenizer = layout.iteration_path(run, 12) / "hf" / "tokenizer.json"
    good = tokenizer.read_text()
    tokenizer.write_text(good.replace("a", "b", 1))
    checkpoint_command.main(["export", str(run), "--to-hf", str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == good
    config = SFTConfig(checkpoint=CheckpointConfig(load=str(run)))
    assert open_directory(config).path.parent.name == "iter_0000010"
    with pytest.raises(UserError, match="holds no checkpoint .*; give --hf-model to start from"):
        open_directory(SFTConfig(checkpoint=CheckpointConfig(load=str(tmp_path))))


def test_wrong_commands_are_one_message(run, tmp_path):
    with pytest.raises(UserError, match="is no checkpoint and holds none"):
        checkpoint_command.main(["list", str(tmp_path)])
    with pytest.raises(UserError, match="x{300}.*: File name too long"):
        checkpoint_command.main(["list", str(tmp_path / ("x" * 300))])
    with pytest.raises(UserError, match=r"latest-checkpoints 0 must be 1 or above; --keep-every -1 must be"):
        checkpoint_command.main(["prune", str(run), "--keep-latest-checkpoints", "0", "--keep-every", "-1"])
    with pytest.raises(UserError, match="is one checkpoint; give the --save directory"):
        checkpoint_command.main(["prune", str(run / "iter_0000012"), "--keep-latest-checkpoints", "1"])
    assert len(layout.list_iterations(run)) == 6


@pytest.mark.parametrize(
    ("latest", "every", "stay"),
    [(0, 0, [2, 4, 6, 8]), (1, 0, [8]), (3, 0, [4, 6, 8]), (1, 4, [4, 8]), (9, 0, [2, 4, 6, 8])],
)
def test_what_may_go(latest, every, stay):
    gone = layout.removable([2, 4, 6, 8], latest, every)
    assert [number for number in (2, 4, 6, 8) if number not in gone] == stay
