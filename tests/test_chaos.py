"""`make chaos` itself: what it writes, and that a scenario that fails cannot look like one that passed."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent / "chaos"))
import chaos
import place
import scenarios

ROW = place.Row("a rank killed", 7, 7, "same weights", 1.25)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "reliability.md"
    path.write_text(f"before\n{chaos.BEGIN}\nold\n{chaos.END}\nafter\n")
    return path


def test_table_between_the_marks(document, monkeypatch):
    monkeypatch.setattr(chaos, "SCENARIOS", {"made-up": lambda place: ROW})
    assert chaos.main(["--output", str(document), "--seed", "3"]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| a rank killed | 7 | 7 | same weights | 1.2 s |" in text and "seed 3" in text


def test_a_failure_is_told_and_leaves_the_table(document, monkeypatch, capsys):
    def fails(place):
        raise AssertionError("3 tensors differ")

    monkeypatch.setattr(chaos, "SCENARIOS", {"made-up": lambda place: ROW, "broken": fails})
    before = document.read_text()
    assert chaos.main(["--output", str(document)]) == 1
    assert document.read_text() == before
    out = capsys.readouterr()
    assert "| broken | | | FAILED | |" in out.out and "3 tensors differ" in out.err


def test_the_document_has_the_marks():
    text = (Path(chaos.TESTS).parent / "docs" / "reliability.md").read_text()
    assert text.count(chaos.BEGIN) == text.count(chaos.END) == 1


def test_what_differs_is_found(tmp_path):
    """A curve that skips a step and a weight that is off by one bit are no same end."""
    import json

    import torch
    from safetensors.torch import save_file

    for name, value, steps in (("want", 1.0, 3), ("same", 1.0, 3), ("weights", 1.0 + 2**-23, 3), ("curve", 1.0, 2)):
        for folder in ("run", "hf"):
            (tmp_path / name / folder).mkdir(parents=True)
        save_file({"w": torch.full((2,), value)}, tmp_path / name / "hf" / "model.safetensors")
        lines = [json.dumps({"iteration": step, "loss": 0.5, "seconds": len(name)}) for step in range(steps)]
        (tmp_path / name / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "3 steps" in place.assert_same_end(tmp_path / "same", tmp_path / "want")
    for name, message in (("weights", "1 tensors differ"), ("curve", "curve differs")):
        with pytest.raises(AssertionError, match=message):
            place.assert_same_end(tmp_path / name, tmp_path / "want")


class Started:
    """Stands for a run that makes steps and, with the flags of `saves`, always has a checkpoint in the making."""

    output = f"{place.STEP} " * 9
    process = SimpleNamespace(pid=0, returncode=1)

    def __init__(self, folder: Path, flags: tuple[str, ...], saves: set[tuple[str, ...]]):
        self.log = folder / "log-0.txt"
        for left in folder.glob("run/.*"):
            left.rmdir()
        if flags in saves:
            (folder / "run" / ".tmp-iter_0000002-0123456789ab").mkdir(parents=True)

    def wait_until(self, condition, **_):
        return condition()

    def ended(self):
        return False

    def ranks(self):
        return [0]

    workers = ranks

    def finish(self, **_):
        return "resumed at iteration 2"


def test_kills_meet_saves_in_the_step_and_in_the_background(tmp_path, monkeypatch):
    """By turns; a run of kills that never met one of them has not shown what its row would say."""
    started = []

    def sft(folder, iterations, *flags, saves=((), scenarios.BACKGROUND)):
        started.append(flags)
        return Started(folder, flags, set(saves))

    monkeypatch.setattr(scenarios.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(scenarios, "assert_same_end", lambda folder, want: "the same")
    some = SimpleNamespace(root=tmp_path, kills=10, rng=random.Random(0), say=lambda words: None, sft=sft)
    some.undisturbed, some.until_ended, some.take_longest = (lambda *_: tmp_path), (lambda run: None), (lambda: 1.0)
    row = scenarios.processes_killed(some)
    assert started[:10] == [(), ("--async-save",)] * 5
    assert (row.faults, row.end) == (10, "the same") and "5 saves in the step and 5 in the background" in row.what
    some.sft = lambda *given: sft(*given, saves=[()])
    with pytest.raises(AssertionError, match=r"in the background: \[5, 0\]"):
        scenarios.killed(some, ("rank",), "a rank", 10)
