"""Rollouts by plain sampling with a KV cache, in the trainer's own processes: the reference, and what needs nothing.

A copy of the model with the trainer's tensor- and pipeline-parallel cut lives beside the trained one.  All ranks of a
copy answer the same requests together.  A response depends on the seed, its request's key and its number alone.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from umer1.data.schema import Sequence
from umer1.distributed.parallel import ParallelConfig, ParallelState
from umer1.inference.engine import Engine, EngineConfig, build_frozen_model, make_processor
from umer1.inference.generate import GenerationConfig, Loop, generation_batches
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import load_stream, whole_here
from umer1.rl.checksum import checksum
from umer1.rl.config import RolloutConfig
from umer1.rl.types import Completion, Interrupted, Request, Sampling, Stop

# Tokens between two looks at whether to stop: each look is one small collective of the replica.
_LOOK_EVERY = 8


class TorchEngine:
    """A RolloutEngine; see the module's docstring.

    `parallel`: the trainer's layout; what only training has (sequence parallelism, virtual stages, recomputation) is
    left out of it.  `params_dtype`: of weights and arithmetic.  `seq_length`: most prompt tokens that go through the
    model at once (a longer prompt goes alone).  Construction is collective: every rank builds its part.
    """

    name = "torch"
    collective = True

    def __init__(
        self,
        config: RolloutConfig,
        directory: HFDirectory,
        parallel: ParallelConfig,
        state: ParallelState,
        *,
        params_dtype: torch.dtype,
        seq_length: int,
    ):
        self.config, self.state = config, state
        layout = replace(
            parallel,
            sequence_parallel=False,
            num_layers_per_virtual_pipeline_stage=None,
            recompute_granularity=None,
            recompute_method=None,
            recompute_num_layers=None,
        )
        self.model = build_frozen_model(directory.config, layout, state, params_dtype)
        settings = EngineConfig(model=str(directory.path), max_tokens_per_batch=seq_length)
        self.engine = Engine(self.model, directory, make_processor(settings, directory), state, settings)
        self._shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self._asleep = self._loaded = False

    def generate(self, requests: list[Request], sampling: Sampling, stop: Stop) -> list[list[Completion | None]]:
        """See RolloutEngine; collective over the replica.

        `stop` is asked on every rank of the replica at the same points; one that says so stops all of them.  After
        `rollout_timeout_seconds` what is not over yet is None, as is every response of a batch that was not begun.
        """
        if not self._loaded:
            raise RuntimeError("the engine has no weights: load_weights comes before generate")
        prompts = [request.prompt.sequence for request in requests]
        answers: list[list[Completion | None]] = [[None] * sampling.num_generations for _ in requests]
        limits = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            generation_seed=sampling.seed,
            max_sequences=self.config.rollout_max_sequences,
        )
        watch = _Watch(stop, time.monotonic() + self.config.rollout_timeout_seconds, self.state)
        for batch in generation_batches(self.engine, prompts, limits, sampling.num_generations):
            if watch():
                break
            keys = [requests[i].key for i in batch]
            loop = _RolloutLoop(self.engine, [prompts[i] for i in batch], keys, limits, sampling, watch)
            for index, completions in zip(batch, loop.completions(), strict=True):
                answers[index] = completions
        return answers

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """See RolloutEngine and WeightSync; the checksums are of what this rank's part of the model holds whole."""
        self.wake()
        self._loaded = False
        load_stream([self.model], tensors, self.model.model_config, self.state)
        self._loaded = True
        return {f"engine:{name}": checksum(tensor) for name, tensor in whole_here([self.model], self.state)}

    def start(self, stop: Stop) -> None:
        """Nothing to wait for: it stands since its construction."""

    def sleep(self) -> None:
        """Give the weights' memory back; they are gone."""
        self._asleep, self._loaded = True, False
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)

    def wake(self) -> None:
        """Take memory for the weights again."""
        if self._asleep:
            for name, parameter in self.model.named_parameters():
                parameter.data = parameter.data.new_zeros(self._shapes[name])
        self._asleep = False

    def restart(self) -> None:
        """There is no process of its own that could have died."""
        self.wake()
        self._loaded = False

    def close(self) -> None:
        """Give the weights' memory back."""
        self.sleep()


class _Watch:
    """Whether time is up, agreed on by the ranks of a replica.  Interrupted on all of them when one is told to stop."""

    def __init__(self, stop: Stop, deadline: float, state: ParallelState):
        self.stop, self.deadline, self.state = stop, deadline, state

    def __call__(self) -> bool:
        seen = [float(self.stop()), float(time.monotonic() > self.deadline)]
        if self.state.tp_size * self.state.pp_size > 1:
            flags = torch.tensor(seen, device=self.state.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.state.groups.mp)
            seen = flags.tolist()
        if seen[0]:
            raise Interrupted("generation was broken off")
        return bool(seen[1])


class _RolloutLoop(Loop):
    """Nothing is masked, closed or embedded: tokens as the policy gives them, with the one that stops a response."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[Sequence],
        keys: list[str],
        limits: GenerationConfig,
        sampling: Sampling,
        time_is_up: Callable[[], bool],
    ):
        super().__init__(engine, prompts, keys, limits, (sampling.temperature,) * sampling.num_generations)
        self.stop_ids, self.time_is_up = np.array(sampling.stop_ids), time_is_up
        self.logprobs = np.zeros(self.tokens.shape, dtype=np.float32)

    def completions(self) -> list[list[Completion | None]]:
        """Per prompt its responses; None where time was up first."""
        self._generate()
        found = [
            None
            if self.state[row] != self.DEAD
            else Completion(
                token_ids=self.tokens[row, : self.counts[row]].tolist(),
                logprobs=self.logprobs[row, : self.counts[row]].copy(),
                finish_reason=self.reasons[row],
            )
            for row in range(len(self.counts))
        ]
        return [found[i : i + self.samples] for i in range(0, len(found), self.samples)]

    def _give_up(self, step: int) -> bool:
        return (step + 1) % _LOOK_EVERY == 0 and self.time_is_up()

    def _read(self, live: np.ndarray, hidden: torch.Tensor | None) -> None:
        """The trainer's own forward reads the embedding."""

    def _choose(self, rows: np.ndarray, hidden: torch.Tensor | None, uniforms: np.ndarray) -> np.ndarray:
        chosen, logprobs = self.engine.sample(hidden, self.temperatures[rows], uniforms)
        self.logprobs[rows, self.counts[rows]] = logprobs
        return chosen

    def _take(self, rows: np.ndarray, chosen: np.ndarray) -> None:
        self._append(rows, chosen)
        stopped = np.isin(chosen, self.stop_ids)
        self.reasons[rows[stopped]] = "stop"
        self.state[rows[stopped | (self.counts[rows] == self.config.max_new_tokens)]] = self.DEAD
