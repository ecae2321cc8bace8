"""Cold-start SFT (docs/method.md, 4): building once, then a loop of named steps."""

import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from umer1 import device
from umer1.data.balancing import imbalance
from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelState
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import unwrap
from umer1.training.batches import BatchSource
from umer1.training.build import build_training_model
from umer1.training.config import SFTConfig
from umer1.training.flops import peak_flops, step_flops
from umer1.training.forward_step import NUM_STATISTICS, SFTStep, Totals, current_log_scale
from umer1.training.grad_cache import forward_backward
from umer1.training.optimizer import step_if_finite
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch


class SFTTrainer(Trainer):
    """`fit()` trains to `train_iters`; `train_step()` is the algorithm."""

    algorithm = "sft"
    own_phases = ("data", "forward and backward")

    def __init__(self, config: SFTConfig, directory: HFDirectory, state: ParallelState, watch: Watch):
        weights_follow = config.model.hf_model is None and config.checkpoint.load is not None
        learnt = config.loss.contrastive_temperature if config.loss.learnable_temperature else None
        with watch.phase("reading the data's index"):
            source = BatchSource(config, directory, state)
        with watch.phase("building the model and reading its weights"):
            models = build_training_model(
                config.model,
                config.parallel,
                directory,
                state,
                learnt_temperature=learnt,
                weights_follow=weights_follow,
                fp8=config.fp8,
                working=watch.beat,
            )
        super().__init__(config, directory, state, watch, source, models)
        self.resume()
        self.open_logs()

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train, save every `save_interval` steps and at the end, export; leave early on SIGTERM or SIGUSR1."""
        if self.state.rank == 0:  # a source of batches, which can describe them
            self.say(self.describe())
        interval: list[dict[str, Any]] = []
        try:
            while self.iteration < self.config.optimizer.train_iters:
                with self.watch.step(self.iteration + 1):
                    interval.append(self.train_step())
                if self.is_logged:
                    self.log(interval)
                    interval = []
                number = self.agree_on_signal()
                if number or self.checkpoint_is_due:
                    self.save(last=bool(number) or self.finished)
                if number and not self.finished:
                    self.plot()
                    self.say_stopped(number, f"after iteration {self.iteration}")
                    return
        finally:
            self.close()
        self.finish()

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over one global batch; returns this step's record."""
        started = time.perf_counter()
        with self.watch.phase("data", own=self.source.is_source):
            batches = self.source.next()
        with self.watch.phase("counting"):
            totals, several, work = self.count(batches)
        step = SFTStep(self.config.loss, totals, self.state.groups.dp, self.config.model.train_vision)
        step.apart = self.watch.apart
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.watch.phase("forward and backward"):
            numbers = forward_backward(self.models, batches, step, self.state, several)
        with self.watch.phase("sharing losses"):
            losses = self.share(numbers, step)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        finite = math.isfinite(losses["loss"])
        with self.watch.phase("optimizer"):
            moved, grad_norm = step_if_finite(self.optimizer, self.config.optimizer.clip_grad, finite)
        self.iteration += 1
        if moved:
            self.scheduler.step(increment=1)
        self.note_offending(losses["loss"], grad_norm)
        self.note_skip(moved, finite, grad_norm)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, **losses, **work, "grad_norm": grad_norm, "learning_rate": learning_rate}

    # ------------------------------------------------------------------------------------------- parts of a step

    def count(self, batches: list[PackedBatch]) -> tuple[Totals, bool, dict[str, float]]:
        """Over all data-parallel ranks, by one reduction: denominators of the losses, whether any rank has more than
        one micro-batch, and the work done and how evenly it is shared out."""
        config, train_vision = self.directory.config, self.config.model.train_vision
        loads = np.zeros(self.state.dp_size)
        flops = np.array([step_flops([batch], config, train_vision) for batch in batches])
        loads[self.state.dp_rank] = flops.sum()
        mine = torch.tensor(
            [
                sum(batch.num_pairs for batch in batches),
                sum(int((batch.supervised_sides == 0).sum()) for batch in batches),
                sum(int((batch.supervised_sides == 1).sum()) for batch in batches),
                sum(batch.num_real_tokens for batch in batches),
                sum(len(batch.input_ids) for batch in batches),
                sum(int(batch.grid_thw.prod(-1).sum()) for batch in batches if batch.grid_thw.numel()),
                sum(batch.num_negatives for batch in batches),
                len(batches) > 1,
                imbalance(flops),
                *loads,
            ],
            dtype=torch.float64,
            device=self.state.device,
        )
        dist.all_reduce(mine, group=self.state.groups.dp)
        pairs, query, positive, tokens, slots, patches, negatives, several, micro_batches, *loads = mine.tolist()
        totals = Totals(int(pairs), (int(query), int(positive)))
        work = {"tokens": tokens, "slots": slots, "patches": patches, "flops": sum(loads), "hard_negatives": negatives}
        work["load_imbalance"] = imbalance(np.array(loads))
        work["micro_batch_imbalance"] = micro_batches / self.state.dp_size
        return totals, several > 0, work

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

    # ------------------------------------------------------------------------------------------------ for people

    def log(self, interval: list[dict[str, Any]]) -> None:
        """Means over the interval's steps, and rates; collective."""
        stragglers = self.stragglers()
        if not self.logger:
            return
        sums = ("seconds", "tokens", "slots", "patches", "flops")
        record = {key: sum(entry[key] for entry in interval) / len(interval) for key in interval[-1] if key not in sums}
        total = {key: sum(entry[key] for entry in interval) for key in sums}
        config, seconds = self.config, total["seconds"]
        rate = total["flops"] / seconds / self.state.world_size
        # FP8's products have another peak, and not all are in FP8: there is no one number to divide by.
        peak = peak_flops(device.device_name()) if config.fp8.fp8_format is None else None
        record |= self.progress(seconds, len(interval))
        record |= {
            "learning_rate": interval[-1]["learning_rate"],
            "tokens_per_second": total["tokens"] / seconds,
            "patches_per_second": total["patches"] / seconds,
            "padding_share": 1 - total["tokens"] / total["slots"],
            "tflops_per_device": rate / 1e12,
            "mfu": rate / peak if peak else None,
        }
        self.logger.log(record | stragglers)

    def describe(self) -> str:
        config = self.config
        pairs = config.data.global_batch_size
        if config.loss.cached_contrastive:
            negatives = f"{pairs - 1} (all pairs of the global batch)"
        else:
            together = min(config.data.micro_batch_size * self.state.dp_size, pairs)
            negatives = f"up to {together - 1} (one micro-batch over all ranks)"
        rows = {
            "variant": config.loss.variant,
            "global batch": f"{pairs} pairs, at most {config.data.micro_batch_size} a micro-batch and rank",
            "negatives per query": negatives + " + hard negatives of the data, if any",
        }
        return self.banner("umer1 cold-start SFT", rows)
