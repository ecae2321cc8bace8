"""Runs planned batches of inputs through the model on all data-parallel ranks and brings the results together."""

import sys
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.images import Patchifier
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.inference.embedders import DiscEmbedder, Embedder, GenEmbedder
from umer1.inference.engine import Engine
from umer1.inference.generate import GenerationConfig
from umer1.inference.inputs import BadInput, Input
from umer1.inference.planning import Cost, inspect
from umer1.inference.replicas import any_rank, gather_to_first, share_in_replica, share_with_all
from umer1.progress import Progress

# Batches between two looks at how the other data-parallel ranks are; also bounds how far ranks drift.
_SYNC_EVERY = 8


@dataclass(slots=True)
class Encoded:
    """One input's result."""

    position: int  # in the input order
    id: str
    embedding: np.ndarray  # float32 [H]
    response: dict | None  # the line of FILE.jsonl; None in disc mode


def inspect_together(
    inputs: list[Input], mode: str, media: MediaRoot | None, processor: Processor, state: ParallelState
) -> tuple[list[Cost | None], list[BadInput]]:
    """`planning.inspect` with the headers shared out over all ranks; every rank gets the whole result."""
    mine = inspect(inputs[state.rank :: state.world_size], mode, media, Patchifier(processor.image_config))
    parts = share_with_all(mine, state)
    costs: list[Cost | None] = [None] * len(inputs)
    for rank, (part, _) in enumerate(parts):
        costs[rank :: state.world_size] = part
    return costs, [entry for _, bad in parts for entry in bad]


class Runner:
    """Encodes inputs in one mode.  `generation` None: disc mode, else gen mode under these settings.

    `skip_bad`: go on when an input cannot be decoded or has no embedding; otherwise all ranks stop soon after.
    `embedder`: what embeds a batch, in place of the engine itself.  `progress`: of a job that this is a part of;
    default: one of its own for each `run`.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: list[Input],
        media: MediaRoot | None,
        *,
        generation: GenerationConfig | None,
        skip_bad: bool,
        num_workers: int,
        embedder: Embedder | None = None,
        progress: Progress | None = None,
    ):
        self.state, self.inputs, self.media = engine.state, inputs, media
        own = DiscEmbedder(engine) if generation is None else GenEmbedder(engine, generation)
        self.embedder = embedder or own
        self.skip_bad, self.num_workers, self.progress = skip_bad, num_workers, progress

    def run(self, batches: list[list[int]]) -> tuple[list[Encoded], list[BadInput]]:
        """(results of all ranks on rank 0 and [] elsewhere, what is wrong with the others on every rank).

        An error on one rank ends the run on all of them: UserError with its text.  Within one copy of the model that
        several ranks share, the others wait for the rank that failed, so there it leaves as it is.
        """
        state = self.state
        self.encoded: list[Encoded] = []
        self.bad: list[BadInput] = []
        self.failure: str | None = None
        total = sum(map(len, batches))
        progress = self.progress or Progress("umer1 encode", total, enabled=state.rank == 0)
        mine = batches[state.dp_rank :: state.dp_size]
        ready = self._decoded_ahead(mine)
        for number in range(-(-len(batches) // state.dp_size)):
            if number < len(mine) and not self.failure:
                self._guarded(ready)
            progress.add(sum(map(len, batches[number * state.dp_size : (number + 1) * state.dp_size])))
            stop = bool(self.failure or (self.bad and not self.skip_bad))
            if state.dp_size > 1:
                stop = (number + 1) % _SYNC_EVERY == 0 and any_rank(stop, state)
            if stop:
                break
        ready.close()
        parts = share_with_all((self.failure, self.bad), state)
        failures = [failure for failure, _ in parts if failure]
        if failures:
            raise UserError(failures[0])
        bad = {entry.line: entry for _, part in parts for entry in part}
        encoded = [item for part in gather_to_first(self.encoded, state) for item in part]
        if self.progress is None:
            progress.finish()
        return encoded, list(bad.values())

    def _guarded(self, ready: Iterator[dict[int, Any]]) -> None:
        """The next batch; what it raises is kept for all ranks, where the ranks of this copy need not be told."""
        state = self.state
        try:
            self._encode(self._agreed(next(ready)))
        except Exception as error:  # whatever it is, the other copies must not wait for this one
            if state.dp_size == 1 or state.tp_size * state.pp_size > 1:
                raise
            traceback.print_exc(file=sys.stderr)
            self.failure = f"rank {state.rank} of {state.world_size} failed: {type(error).__name__}: {error}"

    def _decoded_ahead(self, batches: list[list[int]]) -> Iterator[dict[int, Any]]:
        """{position: prompt or what is wrong} of each batch in turn, one batch decoded ahead by threads."""
        with ThreadPoolExecutor(self.num_workers) as workers:
            queue: deque = deque()
            waiting = iter(batches)
            while True:
                while len(queue) < 2 and (batch := next(waiting, None)) is not None:
                    queue.append({position: workers.submit(self._decode, position) for position in batch})
                if not queue:
                    return
                yield {position: future.result() for position, future in queue.popleft().items()}

    def _decode(self, position: int) -> Any:
        item = self.inputs[position]
        try:
            return self.embedder.prepare(item, self.media)
        except BadSample as error:
            return BadInput(item.line, item.id, error.cause, error.detail)

    def _agreed(self, batch: dict[int, Any]) -> dict[int, Any]:
        """The prompts that every rank of this replica decoded: a file that one alone failed on must not divide them."""
        found = {position: entry for position, entry in batch.items() if isinstance(entry, BadInput)}
        for part in share_in_replica(found, self.state):
            found |= part
        self.bad += found.values()
        return {position: entry for position, entry in batch.items() if position not in found}

    def _encode(self, prompts: dict[int, Any]) -> None:
        if not prompts:
            return
        items = [self.inputs[position] for position in prompts]
        results = self.embedder.embed(items, list(prompts.values()))
        for position, item, (embedding, response) in zip(prompts, items, results, strict=True):
            if embedding is None:
                self.bad.append(BadInput(item.line, item.id, "missing_gen_emb", "the response has no <gen_emb>"))
            else:
                self.encoded.append(Encoded(position, item.id, embedding, response))
