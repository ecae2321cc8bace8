"""GRPO (docs/method.md, 5): responses by a rollout engine, rewards from their embeddings, a clipped policy update."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.losses.grpo import TOKEN_STATISTICS, token_weights
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.phase import RolloutPhase
from umer1.rl.types import Completion, EngineDied, Interrupted, Request, Sampling
from umer1.training.build import build_training_model
from umer1.training.dynamic_sampling import merge_rounds
from umer1.training.engines import await_engines, describe_engine, make_phase
from umer1.training.heldout import Heldout, evaluate, requests_of
from umer1.training.optimizer import step_if_finite
from umer1.training.policy_balance import RolloutBalance
from umer1.training.policy_batches import PolicyBatch, Round, SpecialIds
from umer1.training.policy_config import GRPOConfig
from umer1.training.policy_step import PolicyStep, update_step
from umer1.training.prompt_source import PromptSource
from umer1.training.reference import Reference, read_reference
from umer1.training.rollout_log import log_rollouts
from umer1.training.schedule import run_schedule
from umer1.training.scoring import ScoredRound, Scorer
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch


class EnginesFailed(UserError):
    """Rollout engines died more often than the run allows."""


class GRPOTrainer(Trainer):
    """`fit()` trains to `train_iters`; `train_step()` is the algorithm."""

    algorithm = "grpo"
    own_phases = ("data", "generating", "forward and backward")

    def __init__(self, config: GRPOConfig, directory: HFDirectory, state: ParallelState, watch: Watch):
        # The engine first: on a CPU its process starts while the model is built here.
        with watch.phase("starting the rollout engine"):
            self.phase: RolloutPhase = make_phase(config, directory, state)
            self.phase.working, self.phase.waiting = watch.beat, watch.waits
            await_engines(self.phase, config, lambda: bool(watch.signals.received))
        weights_follow = config.model.hf_model is None and config.checkpoint.load is not None
        with watch.phase("reading the data's index"):
            source = PromptSource(config, directory, state)
        with watch.phase("building the model and reading its weights"):
            models = build_training_model(
                config.model,
                config.parallel,
                directory,
                state,
                weights_follow=weights_follow,
                fp8=config.fp8,
                working=watch.beat,
            )
        super().__init__(config, directory, state, watch, source, models)
        special = directory.special
        ids = SpecialIds(special.im_end, special.gen_emb, (special.image_pad, special.video_pad))
        self.stop_ids = (special.im_end, special.gen_emb) if config.rollout.stop_at_gen_emb else (special.im_end,)
        self.scorer = Scorer(config, ids, directory.tokenizer, state)
        self.balance = RolloutBalance(config, directory.config, state)
        with watch.phase("reading the held-out data's index"):
            self.heldout = Heldout(config, directory, state) if config.heldout.eval_data_path else None
        self.evaluation_is_due = True
        resumed = self.resume()
        with watch.phase("making or reading the reference model"):
            self.reference = self.find_reference(resumed)
        self.open_logs()
        self.place_in_data = source.state_dict()  # before the step at hand
        self.failed_in_a_row = self.unusable_in_a_row = 0
        self.engine_is_current = False
        self.restarts = 0
        self.seconds: dict[str, float] = {}
        self.not_logged: list[dict[str, Any]] = []  # records of steps since the last log line
        self.slowest: dict[str, float] = {}  # straggler report of the interval that ends

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train, evaluate and save at their intervals and at the end, export; leave early on SIGTERM or SIGUSR1."""
        if self.state.rank == 0:  # a source of data, which can describe it
            self.say(self.describe())
        try:
            if self.iteration == 0 or self.evaluation_is_due:  # of the start, or one that a signal broke off
                self.note_evaluation(self.evaluate())
            while not self.finished:
                with self.watch.step(self.iteration + 1):
                    record = self.train_step()
                if self.is_logged:
                    self.slowest = self.stragglers()
                try:
                    if self.finished or self.iteration % self.config.heldout.eval_interval == 0:
                        record |= self.evaluate()
                finally:
                    self.log(record)
                number = self.agree_on_signal()
                if number or self.checkpoint_is_due:
                    self.save(last=bool(number) or self.finished)
                if number and not self.finished:
                    self.plot()
                    self.say_stopped(number, f"after iteration {self.iteration}")
                    return
        except Interrupted:
            self.leave_mid_rollout()
            return
        except EnginesFailed:
            self.roll_back_and_save()
            raise
        finally:
            self.phase.engine.close()
            self.close()
        self.finish()

    def train_step(self) -> dict[str, Any]:
        """Rollouts of one global batch of pairs and what is learnt from them; returns this step's record."""
        started = time.perf_counter()
        self.seconds = dict.fromkeys(("rollout", "score", "update", "sync"), 0.0)
        self.place_in_data = self.source.state_dict()
        with self.settled():
            with self.engine_at_work():
                rounds = self.sample_rounds()
            scored = rounds[0] if len(rounds) == 1 else merge_rounds(rounds, self.scorer)
            with self.clock("score"):
                self.add_reference_logprobs(scored)
            record = self.scorer.summary(rounds[0])
        self.check_rollouts(record)
        self.check_parity(record)
        self.iteration += 1  # before an update that may save and stop the run: data and count go together
        with self.clock("update"):
            record |= self.update(scored)
        self.place_in_data = self.source.state_dict()
        log_rollouts(self, rounds[0])
        record["load_imbalance"] = self.balance.imbalance(scored.round_)
        record["rounds"] = len(rounds)
        record["generated_tokens"] = sum(int(each.rollouts.lengths.sum()) for each in rounds)
        record["seconds"] = time.perf_counter() - started
        return record | {f"seconds_{name}": value for name, value in self.seconds.items()}

    # ------------------------------------------------------------------------------------------------ rollouts

    @contextmanager
    def engine_at_work(self) -> Iterator[None]:
        """The engine awake inside the block; it has to hear the weights, which a sleep or a step made old."""
        self.phase.engine.wake()
        self.engine_is_current = False
        yield
        self.phase.engine.sleep()

    def sample_rounds(self) -> list[ScoredRound]:
        """One round; with dynamic sampling further ones until enough pairs have spread in their rewards."""
        config, rounds, useful = self.config.policy, [], 0
        while not rounds or (
            config.dynamic_sampling
            and useful < self.config.data.global_batch_size
            and len(rounds) < config.dynamic_sampling_rounds
        ):
            with self.watch.phase("data", own=self.source.is_source):
                pairs = self.source.next()
            with self.clock("rollout", less="sync"):
                completions = self.rollout(pairs, len(rounds))
            with self.clock("score"):
                round_ = self.balance.shared_out(Round(pairs, completions, self.group))
                rounds.append(self.scorer.score(self.models, round_))
                self.scorer.reward(rounds[-1])
            useful += int(rounds[-1].spread.any(0).sum())
        return rounds

    def rollout(self, pairs: list, number: int) -> list[Completion | None]:
        """G responses of every prompt of `pairs`, in the order of Round.completions."""
        sampling = self.sampling(self.group, self.config.rollout.temperature)
        answers = self.generate(requests_of(pairs, f"{self.iteration}/{number}"), sampling)
        return [completion for answer in answers for completion in answer]

    def sampling(self, num_generations: int, temperature: float) -> Sampling:
        config = self.config.rollout
        return Sampling(
            num_generations, config.max_completion_length, temperature, self.stop_ids, seed=self.config.run.seed
        )

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion | None]]:
        """Answers under the trainer's weights; dead engines are started anew with them, a bounded number of times."""

        def stop() -> bool:
            return bool(self.watch.signals.received)

        while True:
            try:
                if not self.engine_is_current:
                    with self.clock("sync"):
                        self.phase.load_weights(self.models, stop)
                    self.engine_is_current = True
                with self.watch.phase("generating"):
                    return self.phase.run(requests, sampling, stop)
            except EngineDied as error:
                if self.agree_on_signal():
                    raise Interrupted("no engine is started anew by a run that leaves") from None
                self.restarts += 1
                self.engine_is_current = False
                limit = self.config.rollout.rollout_max_restarts
                if self.restarts > limit:
                    raise EnginesFailed(
                        f"rollout engines died {self.restarts} times, more than --rollout-max-restarts {limit}"
                        f"{self.hint()}. The last words: {error}"
                    ) from None
                self.say(f"a rollout engine died and is started anew ({self.restarts} of {limit}): {error}")
                self.phase.restart()

    def check_rollouts(self, record: dict[str, Any]) -> None:
        """Stop a run that gets no response at all, and say once when no response can be used; the same on all ranks."""
        self.failed_in_a_row = self.failed_in_a_row + 1 if record["failed_share"] == 1.0 else 0
        self.unusable_in_a_row = self.unusable_in_a_row + 1 if record["missing_gen_emb_share"] == 1.0 else 0
        limit, config = self.config.rollout.max_failed_steps, self.config.rollout
        if self.failed_in_a_row >= limit:
            raise UserError(
                f"iteration {self.iteration + 1}: all responses failed in {limit} steps in a row, the limit of "
                f"--max-failed-steps{self.hint()}. The {self.phase.engine.name} engine's log says "
                f"why it refuses; --rollout-timeout-seconds is {config.rollout_timeout_seconds:g}"
            )
        if self.unusable_in_a_row == limit:
            self.say(
                f"no response of the last {limit} steps has a <gen_emb>, so that all rewards are 0: raise "
                f"--max-completion-length {config.max_completion_length} if they are cut off, or begin from a model "
                "that SFT has taught to reason"
            )

    def check_parity(self, record: dict[str, Any]) -> None:
        """Stop a run whose trainer and engine disagree on the log-probs of the same tokens; the same on all ranks."""
        if not record["generated_tokens"]:  # all rollouts failed: nothing was compared
            return
        limit, mean = self.parity_threshold, record["mismatch_mean"]
        if not mean <= limit:
            raise UserError(
                f"iteration {self.iteration}: log-probs of trainer and {self.phase.engine.name} engine differ by "
                f"{mean:.3g} on average, more than parity_threshold={limit:g}: the weights did not arrive, or the two "
                "compute different models"
            )

    @property
    def parity_threshold(self) -> float:
        given = self.config.rollout.parity_threshold
        if given is not None:
            return given
        return 0.01 if self.config.model.params_dtype == torch.float32 else 0.2

    @property
    def group(self) -> int:
        return self.config.rollout.num_generations

    # ------------------------------------------------------------------------------------------------ the update

    def add_reference_logprobs(self, scored: ScoredRound) -> None:
        """Log-probs of the same tokens under the frozen model."""
        if self.reference is not None:
            with self.reference.in_place():
                scored.step.ref_logprobs = self.scorer.reference_logprobs(self.models, scored)

    def update(self, scored: ScoredRound) -> dict[str, float]:
        """inner_epochs passes over the rollouts, one optimizer step for each mini-batch; old log-probs stay."""
        totals, norms = torch.zeros(1 + len(TOKEN_STATISTICS), dtype=torch.float64), []
        moved_all = finite_all = True
        for _ in range(self.config.policy.inner_epochs):
            for batches in scored.parts:
                scored.step.weights = self.weights_of_tokens(scored.round_, batches)
                numbers = self.forward_backward(batches, scored.step)
                if numbers[1] == 0.0:  # no token of any rank: momentum alone must not move the weights
                    continue
                finite = math.isfinite(numbers[0])
                moved, norm = step_if_finite(self.optimizer, self.config.optimizer.clip_grad, finite)
                moved_all, finite_all = moved_all and moved, finite_all and finite
                totals += torch.tensor(numbers, dtype=torch.float64)
                norms.append(norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if moved_all:
            self.scheduler.step(increment=1)
        norms = norms or [0.0]
        loss, tokens, kl, ratio, low, high = totals.tolist()
        tokens = max(tokens, 1.0)
        self.note_offending(loss / len(norms) if finite_all else math.nan, sum(norms) / len(norms))
        self.note_skip(moved_all, finite_all, norms[-1])
        return {
            "loss": loss / len(norms),
            "kl": kl / tokens,
            "ratio": ratio / tokens,
            "clip_share": (low + high) / tokens,
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": learning_rate,
            "trained_tokens": tokens,
        }

    def weights_of_tokens(self, round_: Round, batches: list[PolicyBatch]) -> torch.Tensor:
        """fp64 [K]: what each flat token counts in the mini-batch's loss, the mean of both sides' means."""
        chosen = torch.zeros(len(round_.completions), dtype=torch.bool)
        chosen[[number for batch in batches for number in batch.rollouts]] = True
        chosen &= round_.lengths > 0  # a mean over responses that have tokens
        sides = torch.tensor([round_.side_of(number) for number in range(len(chosen))], dtype=torch.int64)
        counts = torch.tensor([int((chosen & (sides == side)).sum()) for side in range(2)], device=self.state.device)
        dist.all_reduce(counts, group=self.state.groups.dp)
        sides_there = max(int((counts > 0).sum()), 1)
        weights = torch.zeros(len(chosen), dtype=torch.float64)
        for side, count in enumerate(counts.tolist()):
            mine = chosen & (sides == side)
            weights[mine] = token_weights(
                round_.lengths[mine],
                loss_normalisation=self.config.policy.loss_normalisation,
                max_completion_length=self.config.rollout.max_completion_length,
                num_responses=count * sides_there,
            )
        return weights[round_.rollout_of_token()].to(self.state.device)

    def forward_backward(self, batches: list[PolicyBatch], step: PolicyStep) -> list[float]:
        """Leave the mini-batch's gradients in the models; [loss, TOKEN_STATISTICS], summed over all ranks."""
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def learn(iterator, model):
            return update_step(iterator, model, step)

        with self.watch.phase("forward and backward"):
            collected = run_schedule(self.models, batches, learn)
        numbers = torch.zeros(1 + len(TOKEN_STATISTICS), device=self.state.device)
        if collected:
            numbers = torch.stack(collected).sum(0)
            dist.all_reduce(numbers, group=self.state.groups.dp)
        if self.state.pp_size > 1:
            dist.broadcast(numbers, self.state.last_stage_rank, group=self.state.groups.pp)
        return numbers.tolist()

    # ------------------------------------------------------------------------------------------ state and record

    def own_state(self) -> dict[str, Any]:
        """An evaluation that a signal broke off is made up for by the next run."""
        return {"evaluation_is_due": self.evaluation_is_due}

    def take_own_state(self, found: dict[str, Any]) -> None:
        self.evaluation_is_due = found.get("evaluation_is_due", False)

    def find_reference(self, resumed: bool) -> Reference | None:
        """The frozen model of the KL penalty: what the run starts from, or what it started from."""
        if self.config.policy.beta == 0:
            return None
        save, load = self.config.checkpoint.save, self.config.checkpoint.load
        if resumed:
            came_from = self.checkpointer.loaded_from.parent
            reference = read_reference(self.models, [str(came_from), load, save], self.state)
            if save and came_from.absolute() != Path(save).absolute():
                with reference.in_place():
                    reference.save(save, self.directory, self.state)
            return reference
        reference = Reference(self.models)
        if save:
            reference.save(save, self.directory, self.state)
        return reference

    def evaluate(self) -> dict[str, float]:
        """Held-out retrieval under the current weights; {} without held-out pairs."""
        self.evaluation_is_due = self.heldout is not None
        if self.heldout is None:
            return {}
        sampling = self.sampling(1, 0.0)
        with self.watch.phase("held-out evaluation"), self.settled(), self.engine_at_work():
            record = evaluate(self.heldout, self.scorer, self.models, lambda asked: self.generate(asked, sampling))
        self.evaluation_is_due = False
        return record

    def note_evaluation(self, record: dict[str, float]) -> None:
        """The evaluation before the first step has a record of its own."""
        if record and self.logger:
            self.logger.note({"iteration": self.iteration, **record})

    def leave_mid_rollout(self) -> None:
        """A signal came during a rollout: the step is given up, and will be made anew."""
        number = self.agree_on_signal()
        self.roll_back_and_save()
        self.plot()
        where = f"the rollouts of iteration {self.iteration + 1}"
        if self.evaluation_is_due:
            where = f"the held-out evaluation after iteration {self.iteration}"
        self.say_stopped(number, f"during {where}")

    def roll_back_and_save(self) -> None:
        """Save the state between two steps, with the data where it was before the step that broke off."""
        self.source.load_state_dict(self.place_in_data)
        self.save()

    def log(self, record: dict[str, Any]) -> None:
        """Means over the interval's steps (of an evaluation: those that have one), and rates."""
        if not self.logger:
            return
        self.not_logged.append(record)
        if not self.is_logged:
            return
        steps, self.not_logged = self.not_logged, []
        having = {name: [step[name] for step in steps if name in step] for step in steps for name in step}
        mean = {name: sum(values) / len(values) for name, values in having.items()}
        generated, trained = mean.pop("generated_tokens"), mean.pop("trained_tokens")
        mean["learning_rate"] = record["learning_rate"]
        mean["generated_tokens_per_second"] = generated / max(mean["seconds_rollout"], 1e-9)
        mean["trained_tokens_per_second"] = trained / max(mean["seconds_update"], 1e-9)
        seconds = mean.pop("seconds")
        self.logger.log(mean | self.progress(len(steps) * seconds, len(steps)) | self.slowest)

    # ------------------------------------------------------------------------------------------------ for people

    @contextmanager
    def clock(self, name: str, less: str | None = None) -> Iterator[None]:
        """Add the block's seconds to a phase, without those that the phase `less` took inside it."""
        started, other = time.perf_counter(), self.seconds.get(less, 0.0)
        with self.watch.phase(name):
            yield
        spent = time.perf_counter() - started - (self.seconds.get(less, 0.0) - other)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def describe(self) -> str:
        config, group = self.config, self.group
        pairs = config.data.global_batch_size
        rows = {
            "engine": describe_engine(config, self.directory.config, self.state),
            "rollouts a step": f"{pairs} pairs x 2 sides x {group} responses of at most "
            f"{config.rollout.max_completion_length} tokens, compared in sets of {config.reward.pairs_compared(pairs)}"
            " pairs",
            "reward": " + ".join(f"{term.weight:g} {term.name}" for term in config.reward.rewards),
            "reference": f"KL weight {config.policy.beta:g}" if self.reference else "none (beta 0)",
            "held out": config.heldout.eval_data_path or "nothing (no --eval-data-path)",
        }
        return self.banner("umer1 GRPO", rows)
