"""Runs planned batches of inputs through the model on all data-parallel ranks and brings the results together."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.images import Patchifier
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.data.prompts import has_format
from umer1.data.schema import Sequence
from umer1.distributed.parallel import ParallelState
from umer1.inference.engine import Engine
from umer1.inference.generate import GenerationConfig, Response, generate
from umer1.inference.inputs import BadInput, Input
from umer1.inference.planning import Cost, inspect
from umer1.inference.progress import Progress
from umer1.inference.replicas import any_rank, gather_to_first, share_in_replica, share_with_all

# Batches between two looks at whether another data-parallel rank met a bad input; also bounds how far ranks drift.
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
    ):
        self.engine, self.inputs, self.media, self.generation = engine, inputs, media, generation
        self.skip_bad, self.num_workers = skip_bad, num_workers
        self.encoded: list[Encoded] = []
        self.bad: list[BadInput] = []

    def run(self, batches: list[list[int]]) -> tuple[list[Encoded], list[BadInput]]:
        """(results of all ranks on rank 0 and [] elsewhere, what is wrong with the others on every rank)."""
        state = self.engine.state
        progress = Progress("umer1 encode", sum(map(len, batches)), enabled=state.rank == 0)
        mine = batches[state.dp_rank :: state.dp_size]
        ready = self._decoded_ahead(mine)
        for number in range(-(-len(batches) // state.dp_size)):
            if number < len(mine):
                self._encode(self._agreed(next(ready)))
            progress.add(sum(map(len, batches[number * state.dp_size : (number + 1) * state.dp_size])))
            look = (number + 1) % _SYNC_EVERY == 0 and state.dp_size > 1
            if not self.skip_bad and (
                any_rank(bool(self.bad), state) if look else bool(self.bad) and state.dp_size == 1
            ):
                break
        ready.close()
        bad = {entry.line: entry for part in share_with_all(self.bad, state) for entry in part}
        encoded = [item for part in gather_to_first(self.encoded, state) for item in part]
        progress.finish()
        return encoded, list(bad.values())

    def _decoded_ahead(self, batches: list[list[int]]) -> Iterator[dict[int, Sequence | BadInput]]:
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

    def _decode(self, position: int) -> Sequence | BadInput:
        item = self.inputs[position]
        videos = [item.video] if item.video else []
        try:
            return self.engine.processor.encode_prompt(
                item.text, item.images, videos, self.media, disc_only=self.generation is None
            )
        except BadSample as error:
            return BadInput(item.line, item.id, error.cause, error.detail)

    def _agreed(self, batch: dict[int, Sequence | BadInput]) -> dict[int, Sequence]:
        """The prompts that every rank of this replica decoded: a file that one alone failed on must not divide them."""
        found = {position: entry for position, entry in batch.items() if isinstance(entry, BadInput)}
        for part in share_in_replica(found, self.engine.state):
            found |= part
        self.bad += found.values()
        return {position: entry for position, entry in batch.items() if position not in found}

    def _encode(self, prompts: dict[int, Sequence]) -> None:
        if not prompts:
            return
        engine, sequences = self.engine, list(prompts.values())
        items = [self.inputs[position] for position in prompts]
        if self.generation is None:
            embeddings = engine.embed(sequences, [sequence.disc_index for sequence in sequences])
            responses = [None] * len(items)
        else:
            generated = generate(engine, sequences, [item.id for item in items], self.generation)
            embeddings = [outcome.embedding(self.generation.missing_gen_emb) for outcome in generated]
            responses = [
                response_line(engine, item.id, outcome.responses[0])
                for item, outcome in zip(items, generated, strict=True)
            ]
        for position, item, embedding, response in zip(prompts, items, embeddings, responses, strict=True):
            if embedding is None:
                self.bad.append(BadInput(item.line, item.id, "missing_gen_emb", "the response has no <gen_emb>"))
            else:
                self.encoded.append(Encoded(position, item.id, embedding, response))


def response_line(engine: Engine, input_id: str, response: Response) -> dict:
    """One line of the file of responses."""
    text = engine.decode_text(response.token_ids)
    return {
        "id": input_id,
        "response": text,
        "missing_gen_emb": response.missing_gen_emb,
        "well_formed": has_format(text) and not response.missing_gen_emb,
        "finish_reason": response.finish_reason,
        "num_tokens": response.num_generated,
        "token_ids": response.token_ids,
    }
