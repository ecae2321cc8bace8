"""The encoding of an MMEB-V2 run: every side of every task that is not finished, on all ranks."""

from contextlib import closing
from pathlib import Path

from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.distributed.parallel import ParallelState
from umer1.evaluation.mmeb_v2.config import MMEBCommand
from umer1.evaluation.mmeb_v2.coverage import Coverage, check_coverage, without_missing
from umer1.evaluation.mmeb_v2.encode import SideEncoder, make_side
from umer1.evaluation.mmeb_v2.memory import Memory
from umer1.evaluation.mmeb_v2.scoring import Scorer
from umer1.evaluation.mmeb_v2.settings import keep_settings, settings_hash, settings_of
from umer1.evaluation.mmeb_v2.store import Store
from umer1.evaluation.mmeb_v2.types import TaskData, TaskSpec
from umer1.evaluation.mmeb_v2.vllm_embedder import VLLMEmbedder
from umer1.inference.engine import load_engine, make_processor, open_directory
from umer1.inference.replicas import on_first
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.progress import Progress

_BATCH_SECONDS = 3600.0  # a batch of vLLM that takes longer counts as lost
_HASH_CACHE = "model.json"  # in the output folder: the weights' hash, as long as their files do not change


def open_newest(command: MMEBCommand, state: ParallelState) -> tuple[HFDirectory, Processor]:
    """Settle which checkpoint `command` is about, and open it; collective.  No weights are read."""
    command.engine.model = on_first(lambda: str(newest_model(command.engine.model)), state)
    directory = open_directory(command.engine)
    return directory, make_processor(command.engine, directory)


def encode_tasks(
    command: MMEBCommand,
    directory: HFDirectory,
    processor: Processor,
    specs: list[TaskSpec],
    covered: list[Coverage],
    state: ParallelState,
    memory: Memory,
    scorer: Scorer,
) -> str:
    """Embed both sides of every task, and have rank 0 score each as soon as its sides are there; collective.

    directory, processor: `open_newest(command)`.  Tasks that `memory` knows as scored, from the files that are there
    now, are passed over.  Returns the weights' hash.
    """
    config = command.eval
    output = Path(config.output)
    sha256 = on_first(lambda: model_fingerprint(command.engine.model, output / _HASH_CACHE), state)
    settings = settings_of(command, sha256, processor)
    on_first(lambda: keep_settings(output, settings), state)
    modes = {"qry": config.query_mode, "tgt": config.target_mode}
    hashes = {side: settings_hash(settings, mode) for side, mode in modes.items()}
    store = Store(output, sha256)
    done = on_first(lambda: scorer.start(specs, store, memory, list(hashes.values())), state)
    num_inputs = [entry.kept_queries + entry.kept_candidates for entry in covered]
    progress = Progress("umer1 eval", sum(num_inputs), enabled=state.rank == 0)
    with closing(_Encoders(command, directory, processor, state, progress)) as encoders:
        for spec, count in zip(specs, num_inputs, strict=True):
            if spec.name in done:
                progress.skip(count)
                continue
            # read once and sent to the others: they must not see media that came in between
            task = on_first(lambda spec=spec: _look(spec, memory, config.allow_missing), state)
            kept = without_missing(task, config.max_queries)
            for side, mode in modes.items():
                wanted = make_side(kept, side, mode, hashes[side])
                if on_first(lambda wanted=wanted: store.has(wanted), state):
                    progress.skip(len(wanted.inputs))
                    continue
                made = encoders.get(mode).encode(wanted, store.parts(wanted))
                on_first(lambda wanted=wanted, made=made: store.finish(wanted, made), state)
            on_first(lambda task=task: scorer.task_done(task, store), state)
            on_first(lambda name=spec.name: memory.keep_scored(name, scorer.scoring, list(hashes.values())), state)
    progress.finish()
    return sha256


def _look(spec: TaskSpec, memory: Memory, allow_missing: bool) -> TaskData:
    """The task as it is by now; UserError where media have gone since all tasks were looked at."""
    task, coverage, seen = memory.look(spec)
    memory.keep(coverage, seen)
    check_coverage([coverage], allow_missing=allow_missing)
    return task


class _Encoders:
    """The model, loaded when the first side turns out to be missing, and vLLM when the first to be generated does."""

    def __init__(
        self,
        command: MMEBCommand,
        directory: HFDirectory,
        processor: Processor,
        state: ParallelState,
        progress: Progress,
    ):
        self.command, self.directory, self.processor = command, directory, processor
        self.state, self.progress = state, progress
        self.engine = self.vllm = None

    def get(self, mode: str) -> SideEncoder:
        """What embeds sides of `mode`; collective."""
        command, config = self.command, self.command.eval
        if self.engine is None:
            self.engine = load_engine(command.engine, self.directory, self.processor, self.state)
        if mode == "gen" and config.engine == "vllm" and self.vllm is None:
            self.vllm = VLLMEmbedder(
                self.engine,
                self.directory,
                command.generation,
                timeout_seconds=_BATCH_SECONDS,
                gpu_memory=config.vllm_memory,
                log_path=Path(config.output) / f"vllm_{self.state.rank}.log",
            )
        return SideEncoder(
            self.engine,
            MediaRoot(config.data_root),
            command.generation,
            embedder=self.vllm if mode == "gen" else None,
            allow_bad=config.allow_missing,
            flag="--allow-missing",
            save_every=config.save_every,
            num_workers=config.num_workers,
            progress=self.progress,
        )

    def close(self) -> None:
        if self.vllm is not None:
            self.vllm.close()
