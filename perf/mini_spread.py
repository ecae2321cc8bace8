"""How the embedded default's scores vary over seeds, and over what should not matter: ranks, threads, instructions.

    .venv/bin/python perf/mini_spread.py [--seeds 0 1 2] [--settings NAME ...]

Per seed and setting (perf/mini_parting.py has them) it trains examples/configs/mini_sft.yaml, goes on from there with
mini_grpo.yaml and scores both on the held-out queries.  Writes perf/results/mini_spread.json after every run, and
prints mean, standard error over seeds, and the standard deviation over settings within a seed.
Takes about three minutes a seed and setting on two idle CPU cores.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from mini_parting import RESULTS, SETTINGS, torchrun
from provenance import new_record

from umer1.files import write_json

MODES = ("disc", "gen", "oracle")


def train_and_score(setting: tuple[int, int, dict[str, str]], seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Per program the mean over tasks of each mode's main metric, in per cent."""
    sft, grpo = folder / "sft", folder / "grpo"
    programs = {
        sft: ["examples/pretrain_sft.py", "--config", "examples/configs/mini_sft.yaml"],
        grpo: ["examples/grpo.py", "--config", "examples/configs/mini_grpo.yaml", "--load", str(sft)],
    }
    found = {}
    for save, program in programs.items():
        torchrun(setting, *program, "--seed", str(seed), "--save", str(save), "--export-hf", str(save / "hf"))
        command = ["-m", "umer1.cli", "eval", "--benchmark", "mini", "--model", str(save / "hf")]
        torchrun(setting, *command, "--output", str(save / "eval"))
        mean = json.loads((save / "eval" / "results.json").read_text())["mean"]["score"]
        found[save.name] = {mode: 100 * mean[mode]["value"] for mode in MODES}
    found["gain"] = {"gen": found["grpo"]["gen"] - found["sft"]["gen"]}
    return found


def summary(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Of gen per program: the mean, standard error over seeds' means, deviation within a seed, error over all runs."""
    by_seed: dict[int, list[dict]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append(run["scores"])
    table = {}
    for program in ("sft", "grpo", "gain"):
        groups = [[scores[program]["gen"] for scores in group] for group in by_seed.values()]
        means = [statistics.mean(group) for group in groups]
        within = [statistics.variance(group) for group in groups if len(group) > 1]
        everything = [value for group in groups for value in group]
        table[program] = {
            "mean": statistics.mean(everything),
            "lowest": min(everything),
            "highest": max(everything),
            "deviation_over_runs": statistics.stdev(everything) if len(everything) > 1 else 0.0,
            "deviation_within_a_seed": statistics.mean(within) ** 0.5 if within else 0.0,
            "standard_error_over_seeds": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    record = new_record("mini_spread")
    record["runs"] = []
    for seed in options.seeds:
        for name in options.settings:
            with tempfile.TemporaryDirectory() as folder:
                scores = train_and_score(SETTINGS[name], seed, Path(folder))
            record["runs"].append({"seed": seed, "setting": name, "scores": scores})
            record["summary"] = summary(record["runs"])
            write_json(RESULTS / "mini_spread.json", record)
            print(f"seed {seed}, {name}: {scores}", flush=True)
    for program, row in record["summary"].items():
        print(f"{program:6}", ", ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
