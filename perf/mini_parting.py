"""Where two runs of the embedded default part that differ in ranks, threads or the processor's instructions alone.

    .venv/bin/python perf/mini_parting.py [--train-iters 40]

Trains the first steps of examples/configs/mini_sft.yaml once per setting, holds the losses of every step against those
of quickstart's setting, and writes perf/results/mini_parting.json: the first step whose loss differs at all, and the
largest difference there, up to step 10 and up to the end.  What that does to scores is perf/mini_spread.py's subject.
ATEN_CPU_CAPABILITY makes torch take the loops that it would take on a processor without newer instructions;
ONEDNN_MAX_CPU_ISA does the same for matrix products.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from provenance import new_record

from umer1.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"
# name: (processes, threads a process, environment)
SETTINGS = {
    "2 processes, 1 thread": (2, 1, {}),
    "the same again": (2, 1, {}),
    "1 process, 1 thread": (1, 1, {}),
    "1 process, 2 threads": (1, 2, {}),
    "2 processes, AVX2 loops": (2, 1, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "2 processes, plain loops": (2, 1, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
}


def torchrun(setting: tuple[int, int, dict[str, str]], *command: str) -> None:
    """Run under torchrun from the repository's root."""
    processes, threads, environment = setting
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    subprocess.run([*launcher, *command], check=True, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL)


def losses(setting: tuple[int, int, dict[str, str]], train_iters: int, save: str) -> list[float]:
    """The loss of every step of one run."""
    flags = ["--config", "examples/configs/mini_sft.yaml", "--train-iters", str(train_iters), "--log-interval", "1"]
    flags += ["--save", save, "--export-hf", f"{save}/hf"]
    torchrun(setting, "examples/pretrain_sft.py", *flags)
    records = [json.loads(line) for line in (Path(save) / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def parting(base: list[float], other: list[float]) -> dict:
    """First step (from 1) whose loss differs, and the largest differences."""
    differences = [abs(first - second) for first, second in zip(base, other, strict=True)]
    first = next((step for step, difference in enumerate(differences, 1) if difference), None)
    return {
        "first_step_that_differs": first,
        "difference_there": differences[first - 1] if first else 0.0,
        "largest_to_step_10": max(differences[:10]),
        "largest_to_the_end": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-iters", type=int, default=40)
    options = parser.parse_args()
    base, *others = SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            name: losses(setting, options.train_iters, f"{folder}/{index}")
            for index, (name, setting) in enumerate(SETTINGS.items())
        }
    record = new_record("mini_parting")
    record["parting"] = {name: parting(curves[base], curves[name]) for name in others}
    record["losses"] = curves
    write_json(RESULTS / "mini_parting.json", record)
    for name, entry in record["parting"].items():
        print(f"{name:28}", ", ".join(f"{key} {value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
