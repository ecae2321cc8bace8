"""perf/README.md: made from the records alone, nothing that was not measured, targets from an H200's."""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
from table import NOT_MEASURED, bytes_text, load_records, readme, seconds_text, targets_table

ROOT = Path(__file__).resolve().parents[2]


def row(provider: str, seconds: float, shape: dict, mode: str = "forward + backward", **more) -> dict:
    times = {"median": seconds, "best": seconds / 2, "low": seconds, "high": seconds, "rounds": 5}
    return {
        "shape": shape,
        "dtype": "bfloat16",
        "mode": mode,
        "flops": 8e9,
        "bytes": 1e6,
        "provider": provider,
        "ours": provider.startswith("umer1"),
        "error": 1.5e-3,
        "peak_bytes": 3 << 20,
        "seconds": times,
        "floor_seconds": 1e-3,
    } | more


def record(suite: str, rows: list[dict], device: str = "NVIDIA H200") -> dict:
    return {
        "suite": suite,
        "command": "python -m pytest perf/bench_x.py",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "machine": {"device": device, "cores": 16},
        "versions": {"torch": "2.11.0"},
        "load_average": 0.3,
        "ceilings": {"copy_bytes_per_second": 4.3e12, "matmul_bfloat16_flops": 7.9e14, "launch_seconds": 2e-6},
        "rows": rows,
    }


def targets(records: list[dict]) -> dict[str, str]:
    """Name -> what was measured."""
    lines = [line.strip("| ").split(" | ") for line in targets_table(records).splitlines()[2:]]
    return {name: found for name, _, found in lines}


LARGE = {"B": 16384, "D": 1536}
MISSING = {"shape": LARGE, "dtype": "bfloat16", "mode": "forward + backward", "provider": "Inf-CL", "ours": False}


def nce() -> dict:
    rows = [
        row("torch eager", 9e-3, LARGE),
        row("torch eager, fp32 logits", 10e-3, LARGE, peak_bytes=90 << 20),
        row("torch.compile, fp32 logits", 6e-3, LARGE),
        MISSING | {"not_measured": "not installed"},
        row("umer1 torch", 4e-3, LARGE),
        row("umer1 triton", 2e-3, LARGE),
    ]
    return record("infonce", rows)


def test_a_record_of_another_machine_says_so():
    here, other = nce() | {"machine": {"device": "CPU", "cores": 2}}, record("topk", [row("umer1", 1.0, LARGE)], "CPU")
    text = readme([here, other])
    assert "## CPU\n\ncores 2.\n" in text and text.count("On another machine: cores 16.") == 1


def test_nothing_is_claimed_without_a_gpu_record():
    text = readme([nce() | {"machine": {"device": "CPU"}}])
    assert "No kernel has run on a GPU yet" in text
    assert set(targets([nce() | {"machine": {"device": "CPU"}}]).values()) == {NOT_MEASURED}
    assert set(targets([nce() | {"machine": {"device": "NVIDIA A100-SXM4-80GB"}}]).values()) == {NOT_MEASURED}
    assert set(targets([]).values()) == {NOT_MEASURED}


def test_targets_come_from_the_record():
    found = list(targets([nce()]).values())
    # share of the floor, against the faster of both with fp32 logits, Inf-CL not there, memory, ...
    assert found[:4] == ["50%", "3.00x", NOT_MEASURED, "30.00x"]
    assert "No kernel has run on a GPU yet" not in readme([nce()])


def test_targets_are_of_one_machine_an_h100_where_there_is_no_h200():
    h100 = nce() | {"machine": {"device": "NVIDIA H100 80GB HBM3"}}
    assert targets([h100]) == targets([nce()])
    faster = record("infonce", [row("umer1 triton", 1e-3, LARGE)])  # an H200 with one row alone: no ratio to the H100's
    assert list(targets([h100, faster]).values())[1] == NOT_MEASURED


def test_the_forward_alone_is_what_the_gather_is_judged_by():
    shape = {"T": 32768, "H": 3584, "N": 512}
    rows = [
        row("torch eager, norm everything", 3e-3, shape, mode="forward"),
        row("umer1 compiled", 1e-3, shape, mode="forward", floor_seconds=8e-4),
        row("umer1 compiled", 1e-5, shape),
    ]
    found = list(targets([record("gather_hidden", rows)]).values())
    assert found[7:9] == ["1.25x", "3.00x"]


def test_a_suite_is_shown_with_what_is_missing():
    text = readme([nce()])
    assert "| torch eager | 9.00 ms | 4.50 ms | 1.00x | 3.00 MiB | 1.5e-03 | 0.889 | 0.111 | 11% |" in text
    assert "| **umer1 triton** | 2.00 ms | 1.00 ms | 4.50x |" in text
    assert "- Inf-CL: not installed" in text
    assert "copy 4.3e+03 GB/s" in text and "bfloat16 product 790 TFLOP/s" in text
    assert "at 0123456789ab, 2026-01-02" in text


def test_a_reason_for_some_sizes_names_them():
    small = {"B": 256, "D": 1536}
    gone = MISSING | {"shape": small, "not_measured": "out of memory"}
    text = readme([record("infonce", [row("torch eager", 1e-3, LARGE), row("torch eager", 1e-4, small), gone])])
    assert "- Inf-CL: out of memory (B 256, D 1,536; bfloat16; forward + backward)" in text


def test_steps_are_shown():
    done = {"model": "Qwen2-VL-2B", "precision": "bf16", "pairs": 64, "tokens": 80000.0, "seconds": 4.0}
    done |= {"flops": 1.2e15, "mfu": 0.303, "peak_bytes": 40 << 30}
    absent = {"model": "Qwen2-VL-2B", "precision": "fp8", "not_measured": "needs a GPU and Transformer Engine"}
    steps = record("step_sft", [done, absent]) | {"about": "One process."}
    steps.pop("ceilings")
    text = readme([steps])
    assert "| Qwen2-VL-2B | bf16 | 64 | 80,000 | 4.00 s | 20,000 | 16 | 300 | 30% | 40.0 GiB |" in text
    assert "| fp8 | needs a GPU and Transformer Engine |" in text


def test_units():
    assert [seconds_text(value) for value in (2.5, 0.0123, 4.2e-6)] == ["2.50 s", "12.3 ms", "4.20 µs"]
    assert [bytes_text(value) for value in (None, 512, 5 << 20, 3 << 30)] == [
        NOT_MEASURED,
        "0.500 KiB",
        "5.00 MiB",
        "3.00 GiB",
    ]


def test_the_program_reads_records_and_leaves_others_alone(tmp_path):
    results, output = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    output.mkdir()
    (results / "infonce_cpu.json").write_text(json.dumps(nce() | {"machine": {"device": "CPU"}}))
    (results / "mini_seeds.json").write_text(json.dumps({"seeds": []}))
    (results / "a_list.json").write_text(json.dumps([{"name": "build"}]))
    assert len(load_records(results)) == 1
    command = [sys.executable, "perf/table.py", "--results", str(results), "--output", str(output)]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)
        made = {path.name: path.read_bytes() for path in output.rglob("*.*")}
        assert set(made) == {"README.md", "infonce_cpu.png"}
    assert made["infonce_cpu.png"][:4] == b"\x89PNG"


def test_the_readme_in_the_repository_is_of_the_records_there():
    """`make perf` was run to its end: whoever adds a record makes the tables anew."""
    assert (ROOT / "perf" / "README.md").read_text() == readme(load_records(ROOT / "perf" / "results"))
