"""perf/batch_balance.py: what it measures is there and in order."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import batch_balance


def test_balancing_is_measured():
    pairs = batch_balance.draw_pairs(70)
    assert len(pairs["flops"]) == 25 * 70 and pairs["flops"].min() > 0
    found = batch_balance.measure(pairs, 4, 128, 2)
    assert 1 <= found["balanced"] <= found["slots_in_turn"] < found["consecutive_slots"]
    assert 1 <= found["micro_batches_balanced"] < found["micro_batches_consecutive"]
    assert 0 < found["pairs_moved"] < 1
