"""perf/first_batch.py: its file is one that training reads, and what it measures is there."""

import json
import sys
from pathlib import Path

from umer1.data.dataset import PairDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import first_batch


def test_pairs_are_whole_and_measured(tmp_path):
    path = tmp_path / "pairs.json"
    first_batch.write_pairs(path, 1100)
    records = json.loads(path.read_text())
    dataset = PairDataset(path, None)
    assert len(records) == len(dataset) == 1100
    assert len(dataset.names) == first_batch.NUM_SETS
    assert dataset.read(1099).query.text == records[1099]["qry"]["conversations"][0]["value"]
    found = first_batch.measure(str(path))
    assert found["tokens"] > 1024 * 100
    assert 0 < found["index_s"] < found["first_batch_s"]
