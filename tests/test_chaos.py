"""`make chaos` itself: what it writes, and that a scenario that fails cannot look like one that passed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "chaos"))
import chaos
import place

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
