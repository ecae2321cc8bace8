"""Memory that `umer1 plan` predicts against memory that training takes: thirteen CPU runs in child processes.

    python perf/plan_memory.py [--only NAME ...] [--results DIR]

Each run trains two steps of a small model; measured is the most that torch's allocator had handed out at once
(perf/memory_meter.py), on every rank.  Ends with status 1 when a prediction is more than 10% off.
"""

import argparse
import sys
from typing import Any

from plan_cases import Case, compare, shape
from plan_policy_case import PolicyCase, compare_policy
from provenance import new_record, save_record

from umer1.testing import run_distributed

LIMIT = 0.10
PICTURE = {"text": 64, "response": 128, "grid": (16, 16)}
SHORT = {"text": 184, "response": 8, "grid": (16, 16)}
UNEQUAL = ({"text": 300, "response": 60, "grid": (8, 8)}, {"text": 32, "response": 16, "grid": (12, 12)})
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NARROW, WIDE = shape(256, 6, 8, 2, 768, 4096, depth=4, embed=128), shape(384, 4, 6, 2, 1536, 2048)
DEEP = shape(192, 12, 6, 2, 512, 1024)
CASES = [
    Case(name="plain", world_size=1, model=NARROW, pairs=4, micro_batch=2, sides=(PICTURE, PICTURE)),
    Case(name="one micro-batch", world_size=1, model=WIDE, pairs=2, micro_batch=2, sides=UNEQUAL),
    Case(name="full recompute", world_size=1, model=DEEP, pairs=4, micro_batch=2, sides=(SHORT, SHORT), parallel=FULL),
    Case(
        name="selective recompute",
        world_size=1,
        model=DEEP,
        pairs=4,
        micro_batch=1,
        sides=UNEQUAL,
        parallel={"recompute_granularity": "selective"},
    ),
    Case(
        name="large vocabulary, untied, blocks of logits",
        world_size=1,
        model=shape(128, 4, 4, 2, 384, 32768, tied=False),
        pairs=2,
        micro_batch=1,
        sides=({"text": 16, "response": 400, "grid": (4, 4)},) * 2,
    ),
    Case(
        name="ViT trained, recompute",
        world_size=1,
        model=shape(128, 4, 4, 2, 384, 1024, depth=6, embed=160),
        pairs=2,
        micro_batch=1,
        sides=({"text": 32, "response": 32, "grid": (32, 32)}, {"text": 32, "response": 32, "grid": (24, 24)}),
        parallel=FULL,
        train_vision=True,
    ),
    Case(name="bf16", world_size=1, model=NARROW, pairs=2, micro_batch=2, sides=(SHORT, SHORT), bf16=True),
    Case(name="DP 2", world_size=2, model=WIDE, pairs=4, micro_batch=1, sides=(PICTURE, PICTURE)),
    Case(
        name="TP 2, sequence-parallel",
        world_size=2,
        model=NARROW,
        pairs=2,
        micro_batch=1,
        sides=(PICTURE, SHORT),
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    Case(
        name="PP 2, uneven, four micro-batches",
        world_size=2,
        model=DEEP,
        pairs=4,
        micro_batch=1,
        sides=(PICTURE, SHORT),
        parallel={"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 5},
    ),
    Case(
        name="PP 2, interleaved, recompute",
        world_size=2,
        model=DEEP,
        pairs=4,
        micro_batch=1,
        sides=(SHORT, SHORT),
        parallel={"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3, **FULL},
    ),
    PolicyCase(
        name="GRPO",
        world_size=1,
        model=NARROW,
        pairs=2,
        group=4,
        micro_batch=4,
        response=96,
        prompt={"text": 64, "grid": (16, 16)},
    ),
    PolicyCase(
        name="GRPO, recompute",
        world_size=1,
        model=DEEP,
        pairs=2,
        group=4,
        micro_batch=8,
        response=160,
        prompt={"text": 32, "grid": (12, 12)},
        parallel=FULL,
    ),
]


def measured(case: Case | PolicyCase) -> list[dict]:
    """A row a rank.  Several ranks run twice, and a rank's smaller peak counts: what gloo's threads free is not always
    seen (memory_meter.py), which can only add."""
    run = compare if isinstance(case, Case) else compare_policy
    found = [run_distributed(run, case.world_size, case, timeout=280) for _ in range(min(case.world_size, 2))]
    return [min(rows, key=lambda row: row["measured_bytes"]) for rows in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all of them")
    parser.add_argument("--results", help="folder for the JSON record; default: perf/results")
    options = parser.parse_args()
    record = new_record("plan_memory") | {"limit": LIMIT}
    worst = 0.0
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        rows = measured(case)
        for row in rows:
            row["error"] = row["predicted_bytes"] / row["measured_bytes"] - 1
            worst = max(worst, abs(row["error"]))
            print(told(case, row), flush=True)
        record["rows"].append({"case": case.name, "world_size": case.world_size, "ranks": rows})
    record["worst_error"] = worst
    if not options.only:
        print(f"largest error {100 * worst:.1f}% ({save_record(record, options.results).name})")
    sys.exit(worst > LIMIT)


def told(case: Case | PolicyCase, row: dict[str, Any]) -> str:
    sizes = f"{row['predicted_bytes'] / 2**20:8.1f} MiB predicted, {row['measured_bytes'] / 2**20:8.1f} MiB measured"
    return f"{case.name}, rank {row['rank']}: {sizes}, {100 * row['error']:+.1f}% (at: {row['moment']})"


if __name__ == "__main__":
    main()
