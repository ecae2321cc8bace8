"""Cold-start SFT (METHOD section 4): building once, then a loop of named steps."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from umer1 import device
from umer1.configuration import to_yaml
from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.evaluation.curves import plot_training
from umer1.files import write_text
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import save_hf
from umer1.training.batches import BatchSource
from umer1.training.build import build_training_model
from umer1.training.checkpoint import Checkpointer
from umer1.training.config import SFTConfig
from umer1.training.flops import peak_flops, step_flops
from umer1.training.forward_step import NUM_STATISTICS, SFTStep, Totals, current_log_scale, unwrap
from umer1.training.grad_cache import forward_backward
from umer1.training.metrics import MetricsLogger
from umer1.training.optimizer import build_optimizer, step_if_finite
from umer1.training.signals import SignalWatch


class SFTTrainer:
    """`fit()` trains to `train_iters`; `train_step()` is the algorithm."""

    def __init__(self, config: SFTConfig, directory: HFDirectory, state: ParallelState):
        self.config, self.directory, self.state = config, directory, state
        self.batches = BatchSource(config, directory, state)
        weights_follow = config.model.hf_model is None and config.checkpoint.load is not None
        self.models = build_training_model(
            config.model, config.parallel, config.loss, directory, state, weights_follow=weights_follow
        )
        self.optimizer, self.scheduler = build_optimizer(
            config.optimizer, self.models, use_distributed_optimizer=config.parallel.use_distributed_optimizer
        )
        self.checkpointer = Checkpointer(config.checkpoint, state, assets=directory)
        self.iteration, self.skipped, self.skipped_in_a_row, self.nan = 0, 0, 0, 0
        self.resume()
        directory_for_logs = config.checkpoint.save if state.rank == 0 else None
        self.logger = None
        if state.rank == 0:
            if directory_for_logs:
                write_text(f"{directory_for_logs}/config.yaml", to_yaml(config))
            self.logger = MetricsLogger(config.logging, directory_for_logs, self.iteration, {"config": to_yaml(config)})

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train, save every `save_interval` steps and at the end, export; leave early on SIGTERM or SIGUSR1."""
        if self.state.rank == 0:  # a source of batches, which can describe them
            self.say(self.banner())
        signals = SignalWatch()
        interval: list[dict[str, Any]] = []
        try:
            while self.iteration < self.config.optimizer.train_iters:
                interval.append(self.train_step())
                if self.iteration % self.config.logging.log_interval == 0 or self.finished:
                    self.log(interval)
                    interval = []
                number = self.agree_on_signal(signals)
                if number or self.finished or self.checkpointer.is_due(self.iteration):
                    self.save()
                if number and not self.finished:
                    self.say(f"stopped by {signal.Signals(number).name} after iteration {self.iteration}{self.hint()}")
                    return
        finally:
            signals.close()
            self.batches.close()
            if self.logger:
                self.logger.close()
        self.finish()

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over one global batch; returns this step's record."""
        started = time.perf_counter()
        batches, several = self.batches.next()
        totals, work = self.count(batches)
        step = SFTStep(self.config.loss, totals, self.state.groups.dp, self.config.model.train_vision)
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        numbers = forward_backward(self.models, batches, step, self.state, several)
        losses = self.share(numbers, step)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        finite = math.isfinite(losses["loss"])
        moved, grad_norm = step_if_finite(self.optimizer, self.config.optimizer.clip_grad, finite)
        self.iteration += 1
        if moved:
            self.scheduler.step(increment=1)
        self.note_skip(moved, finite, grad_norm)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, **losses, **work, "grad_norm": grad_norm, "learning_rate": learning_rate}

    # ------------------------------------------------------------------------------------------- parts of a step

    def count(self, batches: list[PackedBatch]) -> tuple[Totals, dict[str, float]]:
        """Denominators of the losses, and the work done, over all data-parallel ranks; one reduction."""
        config = self.directory.config
        mine = torch.tensor(
            [
                sum(batch.num_pairs for batch in batches),
                sum(int((batch.supervised_sides == 0).sum()) for batch in batches),
                sum(int((batch.supervised_sides == 1).sum()) for batch in batches),
                sum(batch.num_real_tokens for batch in batches),
                sum(len(batch.input_ids) for batch in batches),
                sum(int(batch.grid_thw.prod(-1).sum()) for batch in batches if batch.grid_thw.numel()),
                step_flops(batches, config, self.config.model.train_vision),
                sum(batch.num_negatives for batch in batches),
            ],
            dtype=torch.float64,
            device=self.state.device,
        )
        dist.all_reduce(mine, group=self.state.groups.dp)
        pairs, query, positive, tokens, slots, patches, flops, negatives = mine.tolist()
        totals = Totals(int(pairs), (int(query), int(positive)))
        work = {"tokens": tokens, "slots": slots, "patches": patches, "flops": flops, "hard_negatives": negatives}
        return totals, work

    def share(self, numbers: torch.Tensor, step: SFTStep) -> dict[str, float]:
        """Sum the last stage's numbers over data-parallel ranks and give them to every rank, by name."""
        temperature = numbers.new_zeros(1)
        if self.state.is_last_stage:
            with torch.no_grad():
                temperature = torch.exp(-current_log_scale(unwrap(self.models[-1]), self.config.loss)).view(1)
            dist.all_reduce(numbers, group=self.state.groups.dp)
        everything = torch.cat([numbers, temperature.to(numbers)])
        if self.state.pp_size > 1:
            dist.broadcast(everything, self.state.last_stage_rank, group=self.state.groups.pp)
        values = everything.tolist()
        kinds = step.kinds
        record = dict(zip((f"{name}_loss" for name, _ in kinds), values, strict=False))
        weighted = sum(weight * record[f"{name}_loss"] for name, weight in kinds)
        ce_weight = self.config.loss.weights()[2]
        if ce_weight > 0:
            record["ce_query"], record["ce_positive"] = values[len(kinds) : len(kinds) + 2]
            weighted += ce_weight * (record["ce_query"] + record["ce_positive"])
        for index, (name, _) in enumerate(kinds):
            start = len(kinds) + 2 + index * NUM_STATISTICS
            positive, hits, negative, negatives = values[start : start + NUM_STATISTICS]
            record[f"{name}_recall"] = hits / step.totals.pairs
            record[f"{name}_positive_similarity"] = positive / step.totals.pairs
            record[f"{name}_negative_similarity"] = negative / max(negatives, 1.0)
        return {"loss": weighted, **record, "temperature": values[-1]}

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

    # ------------------------------------------------------------------------------------------ state and record

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one: model, optimizer, schedule, sampler, counts, RNG."""
        found = self.checkpointer.load(self.models, self.optimizer, self.scheduler)
        if found is None:
            return
        self.iteration = found["iteration"]
        self.skipped, self.skipped_in_a_row, self.nan = found["skips"]
        self.batches.load_state_dict(found["batches"])
        self.say(f"resumed at iteration {self.iteration} from {self.checkpointer.loaded_from}")

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Weights as the last step left them: with overlapped gathers they arrive only at the next forward."""
        overlapped = [model for model in self.models if model.ddp_config.overlap_param_gather]
        for model in overlapped:
            model.disable_forward_pre_hook(param_sync=True)
        yield
        for model in overlapped:
            model.enable_forward_pre_hook()

    def save(self) -> None:
        extra = {
            "iteration": self.iteration,
            "skips": [self.skipped, self.skipped_in_a_row, self.nan],
            "batches": self.batches.state_dict(),
        }
        with self.settled():
            self.checkpointer.save(self.iteration, self.models, self.optimizer, self.scheduler, extra)

    def agree_on_signal(self, signals: SignalWatch) -> int:
        """The signal that any rank has received, 0 for none."""
        number = torch.tensor([signals.received], device=self.state.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def log(self, interval: list[dict[str, Any]]) -> None:
        """Means over the interval's steps, and rates."""
        if not self.logger:
            return
        keys = [key for key in interval[-1] if key not in ("tokens", "slots", "patches", "flops", "seconds")]
        record = {key: sum(entry[key] for entry in interval) / len(interval) for key in keys}
        total = {
            key: sum(entry[key] for entry in interval) for key in ("seconds", "tokens", "slots", "patches", "flops")
        }
        seconds, steps = total["seconds"], len(interval)
        rate = total["flops"] / seconds / self.state.world_size
        peak = peak_flops(device.device_name())
        record |= {
            "iteration": self.iteration,
            "train_iters": self.config.optimizer.train_iters,
            "consumed_samples": self.iteration * self.config.data.global_batch_size,
            "global_batch_size": self.config.data.global_batch_size,
            "milliseconds": 1000 * seconds / steps,
            "learning_rate": interval[-1]["learning_rate"],
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nan,
            "tokens_per_second": total["tokens"] / seconds,
            "patches_per_second": total["patches"] / seconds,
            "padding_share": 1 - total["tokens"] / total["slots"],
            "tflops_per_device": rate / 1e12,
            "mfu": rate / peak if peak else None,
            "memory_mib": device.memory_gib() * 1024,
            "bad_samples": self.batches.counts.bad,
            "eta_seconds": (self.config.optimizer.train_iters - self.iteration) * seconds / steps,
        }
        self.logger.log(record)

    # ------------------------------------------------------------------------------------------------ for people

    @property
    def finished(self) -> bool:
        return self.iteration >= self.config.optimizer.train_iters

    def say(self, text: str) -> None:
        if self.state.rank == 0:
            print(text, flush=True)

    def hint(self) -> str:
        where = self.config.checkpoint.save
        return f"; the same command goes on from {where}" if where else "; nothing was saved: there is no --save"

    def banner(self) -> str:
        config, state = self.config, self.state
        pairs = config.data.global_batch_size
        if config.loss.cached_contrastive:
            negatives = f"{pairs - 1} (all pairs of the global batch)"
        else:
            negatives = f"up to {config.data.micro_batch_size * state.dp_size - 1} (one micro-batch over all ranks)"
        count = torch.tensor([0.0, 0.0], device=state.device)
        for model in self.models:
            for parameter in model.parameters():
                count[0 if parameter.requires_grad else 1] += parameter.numel()
        trained, frozen = count.tolist()
        rows = {
            "variant": config.loss.variant,
            "model": f"{config.model.source} ({trained / 1e6:.2f}M parameters trained, {frozen / 1e6:.2f}M frozen "
            "on this rank)",
            "data": self.batches.describe(),
            "layout": f"TP {state.tp_size} x PP {state.pp_size} x DP {state.dp_size}, sequence parallelism "
            f"{'on' if config.parallel.sequence_parallel else 'off'}, {config.model.params_dtype}, "
            f"{device.device_name()}",
            "global batch": f"{pairs} pairs, at most {config.data.micro_batch_size} a micro-batch and rank",
            "negatives per query": negatives + " + hard negatives of the data, if any",
            "steps": f"{self.iteration} of {config.optimizer.train_iters} done",
            "save": config.checkpoint.save or "nothing (no --save)",
        }
        return "umer1 cold-start SFT\n" + "\n".join(f"  {name:20s} {value}" for name, value in rows.items())

    def finish(self) -> None:
        """Export, and say what comes next."""
        where = self.config.model.export_hf
        if where:
            with self.settled():
                save_hf([unwrap(model) for model in self.models], self.directory, where, self.state)
        source = where or self.config.checkpoint.save
        if self.state.rank == 0:
            self.say(self.batches.report())
            if self.config.checkpoint.save:
                save = self.config.checkpoint.save
                plot_training(f"{save}/metrics.jsonl", f"{save}/training.png")
        if source:
            self.say(f"training is complete. Next: umer1 eval --benchmark mini --model {source} --output {source}-eval")
