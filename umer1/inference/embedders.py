"""Ways to embed a batch of decoded inputs: the prompt alone, or a generated response first."""

from typing import Any, Protocol

import numpy as np

from umer1.data.media import MediaRoot
from umer1.data.prompts import has_format
from umer1.data.schema import Sequence
from umer1.inference.engine import Engine
from umer1.inference.generate import GenerationConfig, Response, generate
from umer1.inference.inputs import Input

Embedded = tuple[np.ndarray | None, dict | None]
"""float32 [H], or None where the response has no `<gen_emb>` and none is to be appended; the response's line."""


class Embedder(Protocol):
    """What the runner hands its batches to.  All ranks of a copy of the model call `embed` together."""

    def prepare(self, item: Input, media: MediaRoot | None) -> Any:
        """The input decoded, as `embed` takes it; called by several threads.  Raises BadSample."""

    def embed(self, items: list[Input], prompts: list[Any]) -> list[Embedded]:
        """One result an input."""


class DiscEmbedder:
    """The state at the prompt's `<disc_emb>`."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def prepare(self, item: Input, media: MediaRoot | None) -> Sequence:
        return self.engine.processor.encode_prompt(item.text, item.images, videos(item), media, disc_only=True)

    def embed(self, items: list[Input], prompts: list[Sequence]) -> list[Embedded]:
        embeddings = self.engine.embed(prompts, [prompt.disc_index for prompt in prompts])
        return [(embedding, None) for embedding in embeddings]


class GenEmbedder:
    """A response by this engine under `generation`, and the state at its `<gen_emb>`."""

    def __init__(self, engine: Engine, generation: GenerationConfig):
        self.engine, self.generation = engine, generation

    def prepare(self, item: Input, media: MediaRoot | None) -> Sequence:
        return self.engine.processor.encode_prompt(item.text, item.images, videos(item), media)

    def embed(self, items: list[Input], prompts: list[Sequence]) -> list[Embedded]:
        config = self.generation
        temperatures = (config.temperature,) * config.mean_of_samples
        generated = generate(self.engine, prompts, [item.id for item in items], config, temperatures)
        found = []
        for item, outcome in zip(items, generated, strict=True):
            states = [outcome.embedding(config.missing_gen_emb, sample) for sample in range(config.mean_of_samples)]
            found.append((mean_embedding(states), response_line(self.engine, item.id, outcome.responses)))
        return found


def videos(item: Input) -> list[tuple[str, ...]]:
    """The processor's list of videos: an input has one or none."""
    return [item.video] if item.video else []


def mean_embedding(states: list[np.ndarray | None]) -> np.ndarray | None:
    """The normalised mean of unit vectors float32 [H]; None where one of them is."""
    if any(state is None for state in states):
        return None
    if len(states) == 1:
        return states[0]
    mean = np.mean(states, axis=0, dtype=np.float64)
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def response_line(engine: Engine, input_id: str, responses: list[Response]) -> dict:
    """One line of the file of responses: the first one, and any others in a list."""
    first, *others = (_described(engine, response) for response in responses)
    return {"id": input_id, **first} | ({"others": others} if others else {})


def _described(engine: Engine, response: Response) -> dict:
    text = engine.decode_text(response.token_ids)
    return {
        "response": text,
        "missing_gen_emb": response.missing_gen_emb,
        "well_formed": has_format(text) and not response.missing_gen_emb,
        "finish_reason": response.finish_reason,
        "num_tokens": response.num_generated,
        "token_ids": response.token_ids,
    }
