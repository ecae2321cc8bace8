"""What both training stages do alike: resume and save, leave on a signal, skip a bad step, talk to people."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from umer1 import device
from umer1.configuration import to_yaml
from umer1.data.images import ImageConfig
from umer1.data.input_settings import InputSettings, settle_inputs
from umer1.distributed.fp8_weights import finish_gather
from umer1.distributed.optimizer_checkpoint import rounded_main_weights
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.evaluation.curves import plot_training
from umer1.files import dispensable, not_written, write_text
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import save_hf, unwrap
from umer1.sharing.card import Subject
from umer1.sharing.documents import export_documents
from umer1.sharing.training_run import describe_run, note_start, pairs_of
from umer1.training.batches import DataSource, raise_together
from umer1.training.checkpoint import Checkpointer
from umer1.training.metrics import MetricsLogger
from umer1.training.offending import LossWatch, list_samples
from umer1.training.optimizer import build_optimizer
from umer1.training.signals import tell_job_script
from umer1.training.stragglers import straggler_report
from umer1.training.watch import Watch


class Trainer:
    """The state of a run: models, optimizer, place in the data, counters.  A stage adds its loop and its step.

    config: SFTConfig or GRPOConfig; the sections used here are in both.
    """

    algorithm: str  # "sft" or "grpo", kept in the checkpoint
    own_phases: tuple[str, ...]  # whose times are compared between ranks: a rank's own work, before it waits for others

    def __init__(
        self,
        config: Any,
        directory: HFDirectory,
        state: ParallelState,
        watch: Watch,
        source: DataSource,
        models: list[torch.nn.Module],
    ):
        settle_inputs(config.data, directory)
        pictures = ImageConfig.of_directory(directory, config.data)
        directory = InputSettings.of(pictures, config.data.blank_image_for_text).carried_by(directory)
        self.config, self.directory, self.state, self.source, self.models = config, directory, state, source, models
        self.watch = watch
        with watch.phase("building the optimizer"):
            self.optimizer, self.scheduler = build_optimizer(
                config.optimizer, models, use_distributed_optimizer=config.parallel.use_distributed_optimizer
            )
        self.checkpointer = Checkpointer(config.checkpoint, state, assets=directory, algorithm=self.algorithm)
        self.iteration, self.skipped, self.skipped_in_a_row, self.nan = 0, 0, 0, 0
        self.logger: MetricsLogger | None = None
        watch.attach(models)
        source.waiting = watch.waits
        self.losses = LossWatch(config.watch.loss_spike_deviations)

    # ------------------------------------------------------------------------------------------ state and record

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint, if there is one: model, optimizer, schedule, data, counts, RNG."""
        with self.watch.phase("looking for a checkpoint and reading it"):
            found = self.checkpointer.load(self.models, self.optimizer, self.scheduler)
        if found is None:
            return False
        self.iteration = found["iteration"]
        self.skipped, self.skipped_in_a_row, self.nan = found["skips"]
        self.source.load_state_dict(found["batches"])
        self.take_own_state(found)
        self.say(f"resumed at iteration {self.iteration} from {self.checkpointer.loaded_from}")
        return True

    def own_state(self) -> dict[str, Any]:
        """What a stage keeps in its checkpoints besides (JSON)."""
        return {}

    def take_own_state(self, found: dict[str, Any]) -> None:
        """Go on with what `own_state` gave."""

    def open_logs(self) -> None:
        """Rank 0: the resolved configuration and the record, beside the checkpoints.  Collective; raises UserError."""
        problem = None
        if self.state.rank == 0:
            directory, settings = self.config.checkpoint.save, to_yaml(self.config)
            try:
                if directory:
                    write_text(f"{directory}/config.yaml", settings)
                    dataset = self.source.loader.maker.dataset
                    note_start(directory, self.iteration, pairs_of(dataset.names, dataset.name_ids))
                self.logger = MetricsLogger(self.config.logging, directory, self.iteration, {"config": settings})
            except OSError as error:
                problem = not_written("the run's settings and record", directory, error)
        raise_together(problem)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Weights as the last step left them: with overlapped gathers they arrive only at the next forward."""
        overlapped = [model for model in self.models if model.ddp_config.overlap_param_gather]
        for model in overlapped:
            model.disable_forward_pre_hook(param_sync=True)
            finish_gather(model)
        try:
            yield
        finally:
            for model in overlapped:
                model.enable_forward_pre_hook()

    def save(self, *, last: bool = True) -> None:
        """Keep the state as it is.  The `last` checkpoint is written on return; another one may still be in the making
        (--async-save), and fail at a later step."""
        extra = {
            "iteration": self.iteration,
            "skips": [self.skipped, self.skipped_in_a_row, self.nan],
            "batches": self.source.state_dict(),
            **self.own_state(),
        }
        with self.watch.phase("saving a checkpoint"), self.settled():
            self.checkpointer.save(self.iteration, self.models, self.optimizer, self.scheduler, extra, last=last)

    def agree_on_signal(self) -> int:
        """The signal that any rank has received, 0 for none.

        Raises UserError on all ranks when a checkpoint in the background could not be written.
        """
        with self.watch.phase("waiting for all ranks after a step"):
            mine = torch.tensor([self.watch.signals.received, int(self.checkpointer.failed)], device=self.state.device)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            number, failed = mine.tolist()
            if failed:
                self.checkpointer.wait()
            return number

    def close(self) -> None:
        """At the end of a run, also of one that fails: nothing is read or written any more after it."""
        self.source.close()
        with self.watch.phase("waiting for a checkpoint"):
            self.checkpointer.close()
        if self.logger:
            self.logger.close()

    def note_offending(self, loss: float, grad_norm: float) -> None:
        """List the samples of a step that is not finite or a spike: each source of data its own share, so that no rank
        has to wait for another.  The step itself goes on as it would."""
        drawn, save = self.source.take_drawn(), self.config.checkpoint.save
        cause = self.losses.judge(loss, grad_norm)
        if cause is None:
            return
        if cause.endswith("spike"):
            self.say(
                f"iteration {self.iteration}: {cause.replace('_', ' ')} (loss {loss:.4g}, grad norm {grad_norm:.4g})"
            )
        if save and self.source.is_source:
            dataset = self.source.loader.maker.dataset
            samples = [
                {"slot": slot, "index": index, "dataset": dataset.dataset_name(index)}
                for slots, indices in drawn
                for slot, index in zip(slots.tolist(), indices.tolist(), strict=True)
            ]
            record = {"iteration": self.iteration, "cause": cause, "loss": loss, "grad_norm": grad_norm}
            record |= {"rank": self.state.rank, "samples": samples}
            with dispensable(f"rank {self.state.rank}: samples of iteration {self.iteration} ({samples})"):
                list_samples(Path(save) / "offending_samples.jsonl", record)

    def stragglers(self) -> dict[str, float]:
        """The slowest rank since the last call, by phase; collective."""
        with self.watch.phase("comparing times"):
            return straggler_report(self.watch.take_own(), self.state)

    def note_skip(self, moved: bool, finite: bool, grad_norm: float) -> None:
        """Count a skipped step; several in a row stop the run, with the last good weights saved."""
        self.skipped += not moved
        self.nan += not finite
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if not moved:
            what = "loss" if not finite else f"gradient norm ({grad_norm})"
            self.say(f"iteration {self.iteration}: non-finite {what}; the step is skipped on all ranks")
        if self.skipped_in_a_row >= self.config.optimizer.max_consecutive_skips:
            self.save()
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient, the limit of "
                f"--max-consecutive-skips; the weights of before are saved{self.hint()}. Try a smaller --lr or --bf16"
            )

    # ------------------------------------------------------------------------------------------------ for people

    @property
    def finished(self) -> bool:
        return self.iteration >= self.config.optimizer.train_iters

    @property
    def checkpoint_is_due(self) -> bool:
        """Not after a skipped step: its weights are an earlier step's, and may be what the next steps fail by, too."""
        return not self.skipped_in_a_row and (self.finished or self.checkpointer.is_due(self.iteration))

    @property
    def is_logged(self) -> bool:
        """Whether the step that was just done ends a log interval."""
        return self.iteration % self.config.logging.log_interval == 0 or self.finished

    def progress(self, seconds: float, steps: int) -> dict[str, Any]:
        """What every record says: where the run stands and how fast it is; `seconds` for the last `steps` steps."""
        config, work = self.config, self.source.take_work()
        return {
            "iteration": self.iteration,
            "train_iters": config.optimizer.train_iters,
            "consumed_samples": self.iteration * config.data.global_batch_size,
            "global_batch_size": config.data.global_batch_size,
            "milliseconds": 1000 * seconds / steps,
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nan,
            "memory_mib": device.memory_gib() * 1024,
            "bad_samples": self.source.counts.bad,
            "images_per_second": work["images"] / seconds,
            "frames_per_second": work["frames"] / seconds,
            "seconds_decoding": work["seconds_decoding"] / steps,
            "waiting_share": work["seconds_waiting"] / seconds,
            "eta_seconds": (config.optimizer.train_iters - self.iteration) * seconds / steps,
            **self.watch.take_seconds(steps),
            **self.checkpointer.take_seconds(),
        }

    def say(self, text: str) -> None:
        if self.state.rank == 0:
            print(text, flush=True)

    def hint(self) -> str:
        """How a run that ends early goes on."""
        where = self.config.checkpoint.save
        return f"; the same command goes on from {where}" if where else "; nothing was saved: there is no --save"

    def say_stopped(self, number: int, where: str) -> None:
        """That the run ends early, and how it goes on: to the user, and to a job script that asked to be told."""
        name = signal.Signals(number).name if number else "a signal"
        self.say(f"stopped by {name} {where}{self.hint()}")
        if self.config.checkpoint.save and self.state.rank == 0:
            tell_job_script()

    def banner(self, title: str, rows: dict[str, str]) -> str:
        """The run in a few lines; `rows` are the stage's own."""
        config, state = self.config, self.state
        count = [0, 0]
        for model in self.models:
            for parameter in model.parameters():
                count[0 if parameter.requires_grad else 1] += parameter.numel()
        everything = {
            "model": f"{self.origin()} ({count[0] / 1e6:.2f}M parameters trained, {count[1] / 1e6:.2f}M frozen "
            "on this rank)",
            "data": self.source.describe(),
            "layout": f"TP {state.tp_size} x PP {state.pp_size} x DP {state.dp_size}, sequence parallelism "
            f"{'on' if config.parallel.sequence_parallel else 'off'}, {config.model.params_dtype}, "
            f"{device.device_name()}",
            "overlapped": config.parallel.overlapped,
            **rows,
            "steps": f"{self.iteration} of {config.optimizer.train_iters} done",
            "save": config.checkpoint.save or "nothing (no --save)",
        }
        return title + "\n" + "\n".join(f"  {name:20s} {value}" for name, value in everything.items())

    def origin(self) -> str:
        """Where the first weights came from."""
        config = self.config
        return str(config.model.hf_model or config.checkpoint.load or config.model.source)

    def plot(self) -> None:
        """The record so far, if there is any, as SAVE/training.png."""
        if self.state.rank == 0 and self.config.checkpoint.save:
            record = Path(self.config.checkpoint.save) / "metrics.jsonl"
            if record.stat().st_size:
                plot_training(record, record.with_name("training.png"))

    def finish(self) -> None:
        """Export, plot, and say what comes next.  UserError when the last steps were skipped."""
        if self.skipped_in_a_row:
            raise UserError(
                f"the last {self.skipped_in_a_row} of {self.iteration} steps had a non-finite loss or gradient: "
                f"nothing is exported{self.hint()}. Try a smaller --lr or --bf16"
            )
        where, save = self.config.model.export_hf, self.config.checkpoint.save
        if where:
            with self.watch.phase("exporting"), self.settled():
                models, documents = [unwrap(model) for model in self.models], self.documents(where)
                rounded = rounded_main_weights(self.optimizer, wanted=self.state.dp_rank == 0)
                save_hf(models, self.directory, where, self.state, documents=documents, of_fp8=rounded)
        if self.state.rank == 0:
            self.say(self.source.report())
        self.plot()
        if source := where or save:
            self.say(f"training is complete. Next: umer1 eval --benchmark mini --model {source} --output {source}-eval")

    def documents(self, where: str) -> dict[str, str]:
        """The model card and what else stands beside exported weights; rank 0 alone writes them."""
        if self.state.rank != 0:
            return {}
        config, name = self.config, Path(where).absolute().name
        run = describe_run(asdict(config), config.checkpoint.save, self.iteration)
        dtype = str(config.model.params_dtype).removeprefix("torch.")
        return export_documents(Subject(name, self.directory.config, dtype, run=run), self.directory)
