"""Adaptive mode on mini-MMEB, on fresh held-out queries: score, share that reasoned, tokens and seconds beside gen's.

    OMP_NUM_THREADS=1 .venv/bin/python perf/mini_adaptive.py [--models runs/grpo-seeds] [--draws 201 202 ...]

Each draw is a mini-MMEB of its own (4 tasks x 96 queries, pools and probes of its own; the training pairs' seed is that
of the models, so that no query was trained on) in runs/adaptive.  The models are those that perf/mini_grpo.py leaves:
MODELS/{sft,grpo}-{0,1,2}/hf.  The rule is AdaptiveRule's default.  Seconds are CPU time of this process, of passes over
the same prepared queries one after the other, at the same limits of a batch: embedding in disc mode, a greedy response
for every query, and adaptive mode.  Decoding of pictures is the same for all and left out.  Writes
perf/results/mini_adaptive.json and prints the table of docs/adaptive.md.  About ten minutes on one core.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from provenance import RESULTS, ROOT, new_record

from umer1.data.media import MediaRoot
from umer1.data.mini_mmeb import make_mini_mmeb
from umer1.distributed.parallel import ParallelState, init_distributed
from umer1.evaluation.adaptive import AdaptiveRule
from umer1.evaluation.evaluate import GenSettings, adaptive_pass, run_task, until_disc
from umer1.evaluation.modes import score_task
from umer1.evaluation.tasks import Benchmark, Task, read_benchmark
from umer1.files import write_json
from umer1.inference.engine import Engine, EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig, generate

RESULT = RESULTS / "mini_adaptive.json"
STAGES, SEEDS = ("sft", "grpo"), (0, 1, 2)
SCORES = ("disc", "gen", "adaptive", "fused", "oracle")
COSTS = ("reasoned", "tokens_gen", "tokens_adaptive", "seconds_disc", "seconds_gen", "seconds_adaptive")
SETTINGS = GenSettings(
    generation=GenerationConfig(max_new_tokens=64, max_sequences=96),
    num_samples=0,
    sample_temperature=1.0,
    seed=0,
    adaptive=AdaptiveRule(),
)


def measure_task(engine: Engine, task: Task, media: MediaRoot) -> dict[str, float]:
    """Scores (0 to 1), share that reasoned, new tokens and CPU seconds a query of one task."""
    outputs = run_task(engine, task, media, SETTINGS)
    result = score_task(outputs, SETTINGS.adaptive)
    wanted = np.array(result["queries"]["reasoned"], dtype=bool)
    videos = [[item.video] if item.video else [] for item in task.queries]
    prompts = [
        engine.processor.encode_prompt(item.text, item.images, video, media)
        for item, video in zip(task.queries, videos, strict=True)
    ]
    ids, generation = [item.id for item in task.queries], SETTINGS.generation
    passes = {
        "disc": lambda: engine.embed([until_disc(p) for p in prompts], [p.disc_index for p in prompts]),
        "gen": lambda: generate(engine, prompts, ids, generation, (0.0,)),
        "adaptive": lambda: adaptive_pass(engine, prompts, ids, generation, wanted),
    }
    found = {name: result["score"][name]["value"] for name in SCORES}
    found |= {"reasoned": float(wanted.mean()), "tokens_gen": float(outputs.gen.lengths.mean())}
    found["tokens_adaptive"] = result["adaptive"]["new_tokens"]["value"]
    for name, work in passes.items():
        start = time.process_time()
        work()
        found[f"seconds_{name}"] = (time.process_time() - start) / len(prompts)
    return found


def measure_model(model: Path, benchmarks: dict[int, Benchmark], state: ParallelState) -> dict[str, dict]:
    """By draw and task, what `measure_task` found."""
    config = EngineConfig(model=str(model), fp32=True)
    directory = open_directory(config)
    engine = load_engine(config, directory, make_processor(config, directory), state)
    found = {}
    for draw, benchmark in benchmarks.items():
        media = MediaRoot(benchmark.media_root)
        found[str(draw)] = {task.name: measure_task(engine, task, media) for task in benchmark.tasks}
        print(f"{model.parent.name}, draw {draw} is done", flush=True)
    return found


def over_tasks(tasks: dict[str, dict]) -> dict[str, float]:
    """Means over the tasks of one draw."""
    return {name: statistics.mean(task[name] for task in tasks.values()) for name in (*SCORES, *COSTS)}


def summarise(models: dict[str, dict]) -> dict[str, dict]:
    """By stage: means over seeds and draws, and the lead over gen with standard errors over draws and over seeds."""
    found = {}
    for stage in STAGES:
        # [seed][draw] -> means over tasks
        table = [[over_tasks(tasks) for tasks in models[f"{stage}-{seed}"].values()] for seed in SEEDS]
        rows = [row for draws in table for row in draws]
        summary = {name: statistics.mean(row[name] for row in rows) for name in (*SCORES, *COSTS)}
        lead = np.array([[row["adaptive"] - row["gen"] for row in draws] for draws in table])
        by_draw, by_seed = lead.mean(axis=0), lead.mean(axis=1)
        summary["lead"] = float(lead.mean())
        summary["lead_by_seed"] = by_seed.tolist()
        summary["lead_stderr_draws"] = float(by_draw.std(ddof=1) / len(by_draw) ** 0.5)
        summary["lead_stderr_seeds"] = float(by_seed.std(ddof=1) / len(by_seed) ** 0.5)
        summary["gap_recovered"] = summary["lead"] / (summary["oracle"] - summary["gen"])
        summary["tokens_saved"] = 1 - summary["tokens_adaptive"] / summary["tokens_gen"]
        summary["seconds_saved"] = 1 - summary["seconds_adaptive"] / summary["seconds_gen"]
        summary["tasks"] = {
            task: {
                name: statistics.mean(models[f"{stage}-{seed}"][draw][task][name] for seed in SEEDS for draw in draws)
                for name in (*SCORES, *COSTS)
            }
            for draws in [list(models[f"{stage}-0"])]
            for task in models[f"{stage}-0"][draws[0]]
        }
        found[stage] = summary
    return found


def table(summary: dict[str, dict]) -> str:
    """Markdown: what docs/adaptive.md shows."""
    lines = ["| | " + " | ".join(summary) + " |", "|---|" + "---|" * len(summary)]

    def line(title: str, text) -> None:
        lines.append(f"| {title} | " + " | ".join(text(stage) for stage in summary.values()) + " |")

    for name in SCORES:
        line(name, lambda stage, name=name: f"{100 * stage[name]:.1f}")
    line("adaptive - gen", lambda s: f"{100 * s['lead']:+.2f}")
    line(
        "standard error over draws / seeds",
        lambda s: f"{100 * s['lead_stderr_draws']:.2f} / {100 * s['lead_stderr_seeds']:.2f}",
    )
    line("by seed", lambda s: ", ".join(f"{100 * value:+.1f}" for value in s["lead_by_seed"]))
    line("of the oracle's lead over gen", lambda s: f"{s['gap_recovered']:.2f}")
    line("queries that reasoned", lambda s: f"{100 * s['reasoned']:.0f}%")
    line(
        "new tokens a query, gen, adaptive",
        lambda s: f"{s['tokens_gen']:.2f}, {s['tokens_adaptive']:.2f} (-{100 * s['tokens_saved']:.0f}%)",
    )
    for name in ("disc", "gen", "adaptive"):
        line(f"CPU ms a query, {name}", lambda s, name=name: f"{1000 * s[f'seconds_{name}']:.2f}")
    line("CPU time saved", lambda s: f"{100 * s['seconds_saved']:.1f}%")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "grpo-seeds")
    parser.add_argument("--draws", type=int, nargs="+", default=list(range(201, 209)))
    options = parser.parse_args()
    benchmarks = {}
    for draw in options.draws:
        root = ROOT / "runs" / "adaptive" / f"draw-{draw}"
        make_mini_mmeb(root, eval_seed=draw, num_rl_pairs=4, num_rl_eval_pairs=4)
        benchmarks[draw] = read_benchmark(root / "eval")
    with init_distributed(EngineConfig().parallel(), seed=0) as state:
        models = {
            f"{stage}-{seed}": measure_model(options.models / f"{stage}-{seed}" / "hf", benchmarks, state)
            for stage in STAGES
            for seed in SEEDS
        }
    summary = summarise(models)
    write_json(RESULT, {**new_record("mini_adaptive"), "summary": summary, "models": models})
    print(table(summary))


if __name__ == "__main__":
    main()
