"""perf/first_batch.py: its file is one that training reads, and what it measures is there."""

import json
import sys
from pathlib import Path

import pytest

from umer1.data.dataset import PairDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import first_batch


@pytest.mark.parametrize("form", first_batch.FORMS)
def test_pairs_are_whole_and_measured(tmp_path, form):
    path = tmp_path / f"pairs.{form}"
    first_batch.write_pairs(path, 1100)
    text = path.read_text()
    records = json.loads(text) if form == "json" else [json.loads(line) for line in text.splitlines()]
    dataset = PairDataset(path, None)
    assert len(records) == len(dataset) == 1100
    assert len(dataset.names) == first_batch.NUM_SETS
    assert dataset.read(1099).query.text == records[1099]["qry"]["conversations"][0]["value"]
    found = first_batch.measure(str(path))
    assert found["tokens"] > 1024 * 100
    assert 0 < found["index_s"] < found["first_batch_s"] and found["first_batch_cpu_s"] > 0
