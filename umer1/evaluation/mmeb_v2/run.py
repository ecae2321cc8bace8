"""The encoding of an MMEB-V2 run: every side of every task that is not finished, on all ranks."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.distributed.parallel import ParallelState
from umer1.evaluation.mmeb_v2.config import MMEBCommand
from umer1.evaluation.mmeb_v2.coverage import without_missing
from umer1.evaluation.mmeb_v2.encode import SideEncoder, make_side
from umer1.evaluation.mmeb_v2.readers import read_task
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

TaskDone = Callable[[TaskData, Store], None]


def encode_tasks(
    command: MMEBCommand, specs: list[TaskSpec], num_inputs: int, state: ParallelState, task_done: TaskDone
) -> str:
    """Embed both sides of every task, and hand rank 0 each task as soon as its sides are there; collective.

    Returns the weights' hash.

    num_inputs: of all tasks, for the progress.  `task_done`: called on rank 0 with the task as it was read.
    """
    config = command.eval
    command.engine.model = on_first(lambda: str(newest_model(command.engine.model)), state)
    directory = open_directory(command.engine)
    processor = make_processor(command.engine, directory)
    output = Path(config.output)
    sha256 = on_first(lambda: model_fingerprint(command.engine.model, output / _HASH_CACHE), state)
    settings = settings_of(command, sha256, processor)
    on_first(lambda: keep_settings(output, settings), state)
    store = Store(output, sha256)
    progress = Progress("umer1 eval", num_inputs, enabled=state.rank == 0)
    with closing(_Encoders(command, directory, processor, state, progress)) as encoders:
        for spec in specs:
            # read once and sent to the others: they must not see media that came in between
            task = on_first(
                lambda spec=spec: read_task(spec, config.data_root, num_frames=command.engine.num_frames), state
            )
            kept = without_missing(task, config.max_queries)
            for side, mode in (("qry", config.query_mode), ("tgt", config.target_mode)):
                wanted = make_side(kept, side, mode, settings_hash(settings, mode))
                if on_first(lambda wanted=wanted: store.has(wanted), state):
                    progress.skip(len(wanted.inputs))
                    continue
                done = encoders.get(mode).encode(wanted, store.parts(wanted))
                on_first(lambda wanted=wanted, done=done: store.finish(wanted, done), state)
            on_first(lambda task=task: task_done(task, store), state)
    progress.finish()
    return sha256


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
