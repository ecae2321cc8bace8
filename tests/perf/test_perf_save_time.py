"""perf/save_time.py: what it measures is there, of checkpoints that were written."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import save_time
from plan_cases import shape

from umer1.checkpoints import layout


def test_saves_are_made_and_measured(tmp_path):
    case = save_time.case_of(1, str(tmp_path / "run"), shape(64, 2, 4, 2, 96, 512))
    measured = save_time.measure(case, repeats=2)
    row = save_time.row(1, [measured])
    assert len(layout.sound_iterations(tmp_path / "run")) == 1
    assert 0 < row["largest_share_bytes"] < row["checkpoint_bytes"]
    assert all(row[f"{name}_s"] > 0 for name in save_time.TIMES)
    assert [len(measured["seconds"][name]) for name in ("in_step", "waits", "background")] == [2, 2, 2]
