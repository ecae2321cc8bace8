"""`umer1 eval --benchmark mini`: scores of a model on the generated benchmark.

    umer1 eval --benchmark mini --model DIR --output DIR
    torchrun --nproc-per-node 2 -m umer1.cli eval --benchmark mini --model DIR --output DIR

Per task and as the mean over tasks: disc, gen, oracle (per query the better of the two), adaptive (reason where it is
worth its price, docs/adaptive.md), pass@k and self-consistency of sampled responses, length and format of the
responses, the cosine between different thoughts of one input, and time per query on one copy of the model.  Queries
are compared with candidates of their own mode.

What the thoughts are worth: the greedy response is read again, teacher-forced, with its own summary but without
reasoning (`empty`: `<think></think>` + what followed the thoughts) and with the reasoning of another query of the task
(`shuffled`); the candidates keep theirs.  OUTPUT gets results.json, results.txt, results.png and, in `arrays`, the
embeddings and responses, from which `--stored OUTPUT --output OTHER` scores again under another adaptive rule.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from umer1 import __version__
from umer1 import device as devices
from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.configuration import help_text, load_config
from umer1.data.input_settings import InputSettings
from umer1.data.media import MediaRoot
from umer1.data.mini_mmeb import make_mini_mmeb
from umer1.distributed.parallel import ParallelState, init_distributed, launched_rank
from umer1.errors import UserError
from umer1.evaluation.adaptive import AdaptiveRule
from umer1.evaluation.compare import read_result
from umer1.evaluation.evaluate import GenSettings, run_task
from umer1.evaluation.modes import mean_over_tasks, score_task
from umer1.evaluation.report import evaluation_report, write_evaluation
from umer1.evaluation.stored import arrays_path, load_outputs, save_outputs
from umer1.evaluation.tasks import Benchmark, read_benchmark
from umer1.files import make_folder, writing_to
from umer1.inference.engine import Engine, EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig
from umer1.inference.replicas import on_first
from umer1.progress import Progress

DEFAULT_ROOT = Path("runs/mini-mmeb")  # where training draws it, too


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What is evaluated, and where the results go"""

    benchmark: Literal["mini"] = "mini"
    """The generated benchmark, mini-MMEB."""
    data_root: str | None = None
    """Root of a generated mini-MMEB; unset: runs/mini-mmeb, generated if it is not there."""
    output: str | None = None
    """Directory for results.json, results.txt and results.png."""
    modes: Literal["both", "disc"] = "both"
    """disc leaves out all that needs generated responses (for a model that was not trained to reason)."""
    num_samples: int = 16
    """Sampled responses per query, for pass@k and the cosine between thoughts; 0 for none."""
    sample_temperature: float = 1.0
    """Temperature of the samples."""
    max_new_tokens: int = 64
    """Most tokens of a response; one without <gen_emb> by then is closed with it and counted."""
    max_sequences: int = 1024
    """Most responses that are generated at once."""
    seed: int = 0
    """Seed of the samples, of who gets whose thoughts and of who is a probe."""
    adaptive_price: float = 0.1
    """Adaptive mode reasons where it promises more than this gain in score; higher reasons less."""
    adaptive_probes: int = 16
    """Queries of a task that reason in any case, to calibrate adaptive mode without labels."""
    adaptive_temperature: float = 0.05
    """Temperature of the contrastive loss the model was trained with; calibration starts there."""
    stored: str | None = None
    """Directory of an earlier evaluation: its arrays are scored again (adaptive settings apply), no model is run."""

    def violations(self) -> list[str]:
        found = [] if self.output else ["--output is required"]
        found += [f"adaptive rule: {problem}" for problem in self.rule().violations()]
        if self.num_samples < 0:
            found.append(f"num_samples={self.num_samples} must be 0 or above")
        if not self.sample_temperature > 0:
            found.append(f"sample_temperature={self.sample_temperature} must be above 0")
        return found + self.generation().violations()

    def rule(self) -> AdaptiveRule:
        return AdaptiveRule(
            price=self.adaptive_price,
            num_probes=self.adaptive_probes,
            temperature=self.adaptive_temperature,
            seed=self.seed,
        )

    def generation(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, max_sequences=self.max_sequences, generation_seed=self.seed
        )


@dataclass(kw_only=True, slots=True)
class EvalCommand:
    """umer1 eval"""

    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def violations(self) -> list[str]:
        return self.eval.violations() + ([] if self.eval.stored else self.engine.violations())


def main(argv: list[str]) -> None:
    """The command; every rank runs it, rank 0 prints and writes."""
    if {"-h", "--help"} & set(argv):
        print(help_text(EvalCommand, __doc__))
        return
    command = load_config(EvalCommand, argv)
    make_folder(command.eval.output)
    if command.eval.stored:
        if launched_rank() == 0:
            _finish(score_stored(command.eval.stored, command.eval.rule()), command.eval.output)
        return
    directory = open_directory(command.engine)
    processor = make_processor(command.engine, directory)
    with init_distributed(command.engine.parallel(), seed=command.eval.seed) as state:
        benchmark = _open_benchmark(command.eval, state)
        # one checkpoint from here on: the hash must be of the weights that are loaded
        command.engine.model = on_first(lambda: str(newest_model(command.engine.model)), state)
        sha256 = on_first(lambda: model_fingerprint(command.engine.model), state)
        engine = load_engine(command.engine, directory, processor, state)
        result = evaluate(engine, benchmark, command.eval)
        if state.rank == 0:
            _finish({"model": command.engine.model, "model_sha256": sha256, **result}, command.eval.output)
        state.barrier()


def _finish(result: dict, output: str) -> None:
    with writing_to(output):
        write_evaluation(result, output)
    print(evaluation_report(result), flush=True)


def score_stored(directory: str | Path, rule: AdaptiveRule) -> dict:
    """The result of an earlier evaluation with every task scored again from its arrays under `rule`."""
    result = read_result(directory)
    sections = {name: score_task(load_outputs(arrays_path(directory, name)), rule) for name in result["tasks"]}
    return {**result, "tasks": sections, "mean": mean_over_tasks(sections)}


def _open_benchmark(config: EvalConfig, state: ParallelState) -> Benchmark:
    """The benchmark's files, drawn by rank 0 when the default ones are not there yet."""
    if config.data_root is not None:
        return read_benchmark(Path(config.data_root) / "eval")
    if state.rank == 0 and not (DEFAULT_ROOT / "eval" / "meta.json").exists():
        try:
            make_mini_mmeb(DEFAULT_ROOT, progress=print)
        except (OSError, ValueError) as error:
            raise UserError(f"mini-MMEB could not be generated in {DEFAULT_ROOT}: {error}; give --data-root") from None
    state.barrier()
    return read_benchmark(DEFAULT_ROOT / "eval")


def evaluate(engine: Engine, benchmark: Benchmark, config: EvalConfig) -> dict | None:
    """The result (results.json less the model's name) on rank 0, None elsewhere."""
    gen = None
    if config.modes == "both":
        gen = GenSettings(
            generation=config.generation(),
            num_samples=config.num_samples,
            sample_temperature=config.sample_temperature,
            seed=config.seed,
            adaptive=config.rule(),
        )
    state = engine.state
    media = MediaRoot(benchmark.media_root)
    progress = Progress("umer1 eval", sum(len(task.queries) for task in benchmark.tasks), enabled=state.rank == 0)
    start = time.perf_counter()
    sections = {}
    for task in benchmark.tasks:
        outputs = run_task(engine, task, media, gen)
        if outputs is not None:
            with writing_to(config.output):
                save_outputs(outputs, arrays_path(config.output, task.name))
            try:
                sections[task.name] = score_task(outputs, config.rule())
            except ValueError as error:
                raise UserError(f"{task.name} cannot be scored: {error}; the model's weights may be damaged") from None
        progress.add(len(task.queries))
    progress.finish()
    if state.rank != 0:
        return None
    return {
        "benchmark": benchmark.name,
        "data_fingerprint": benchmark.fingerprint,
        "umer1": __version__,
        "device": devices.device_name(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "inputs": asdict(InputSettings.of(engine.processor.image_config, engine.processor.blank_image_for_text)),
        "data_parallel_size": state.dp_size,
        "seed": config.seed,
        "num_samples": config.num_samples if gen else 0,
        "seconds": time.perf_counter() - start,
        "tasks": sections,
        "mean": mean_over_tasks(sections),
    }
