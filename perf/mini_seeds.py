"""Three seeds of the embedded default: umer1 and dume trained and scored, means, standard errors and raw numbers.

    .venv/bin/python perf/mini_seeds.py [--seeds 0 1 2] [--processes 2]

Trains under runs/seeds, writes perf/results/mini_seeds.json (machine, versions, commit, commands) and prints the table
that README.md shows.  Takes about four minutes a seed on two CPU cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "perf" / "results" / "mini_seeds.json"
SCORES = (("umer1", "disc"), ("umer1", "gen"), ("umer1", "oracle"), ("dume", "disc"))


def torchrun(processes: int, *command: str) -> float:
    """Run under torchrun from the repository's root; seconds taken."""
    started = time.monotonic()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([*launcher, *command], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - started


def run_seed(seed: int, processes: int) -> dict:
    """Both variants of one seed: results.json of each evaluation and the seconds taken."""
    found: dict = {"seed": seed}
    for variant, config in (("umer1", "mini_sft.yaml"), ("dume", "mini_dume.yaml")):
        save = f"runs/seeds/{variant}-{seed}"
        flags = ["--config", f"examples/configs/{config}", "--seed", str(seed), "--save", save]
        training = torchrun(processes, "examples/pretrain_sft.py", *flags, "--export-hf", f"{save}/hf")
        command = ["-m", "umer1.cli", "eval", "--benchmark", "mini", "--model", f"{save}/hf"]
        modes = ["--modes", "disc"] if variant == "dume" else []
        evaluation = torchrun(processes, *command, "--output", f"{save}/eval", *modes)
        result = json.loads((ROOT / save / "eval" / "results.json").read_text())
        found[variant] = {"seconds": {"train": training, "eval": evaluation}, "result": result}
    return found


def score(entry: dict, variant: str, mode: str, task: str | None = None) -> float:
    """Main metric of a mode, the mean over tasks or one task's; in per cent."""
    result = entry[variant]["result"]
    return 100 * (result["tasks"][task] if task else result["mean"])["score"][mode]["value"]


def table(seeds: list[dict]) -> str:
    """Markdown: per score the seeds, mean and standard error over seeds."""
    names = " | ".join(f"seed {entry['seed']}" for entry in seeds)
    lines = [f"| | {names} | mean | standard error |", "|---|" + "---|" * (len(seeds) + 2)]
    for variant, mode in SCORES:
        values = [score(entry, variant, mode) for entry in seeds]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        cells = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {variant} {mode} | {cells} | **{statistics.mean(values):.1f}** | {error:.1f} |")
    return "\n".join(lines)


def differences(seeds: list[dict]) -> str:
    """Paired differences over seeds with their standard errors."""
    lines = []
    for above, below in ((1, 0), (2, 1), (1, 3)):
        values = [score(entry, *SCORES[above]) - score(entry, *SCORES[below]) for entry in seeds]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        names = " - ".join(" ".join(SCORES[index]) for index in (above, below))
        lines.append(f"{names}: {statistics.mean(values):+.1f}, standard error {error:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    seeds = [run_seed(seed, options.processes) for seed in options.seeds]
    record = {
        "command": f"perf/mini_seeds.py --seeds {' '.join(map(str, options.seeds))} --processes {options.processes}",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers", "numpy")},
        "seeds": seeds,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1))
    print(table(seeds), differences(seeds), sep="\n\n")


if __name__ == "__main__":
    main()
