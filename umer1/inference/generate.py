"""Batched generation with a KV cache, and the embeddings that are read on the way.

The hidden state behind `<gen_emb>` is read in the very step that feeds the token to the model: attention is causal,
so this is the state that a teacher-forced forward of prompt and response has there, without running one.  The disc
state is read from the prompt's forward in the same way.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from umer1.data.schema import Sequence
from umer1.inference.engine import Engine
from umer1.inference.sampling import sample_key, uniform
from umer1.models.embedding import read_embedding
from umer1.models.qwen2_vl.positions import next_position
from umer1.rules import bound_problems

# Rows of finished sequences are dropped from the cache once they make up this share of it: each drop copies the cache.
_DROP_SHARE = 0.25


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How responses are generated"""

    max_new_tokens: int = 1024
    """Most tokens of a response; one without <gen_emb> by then is closed as --missing-gen-emb says."""
    temperature: float = 0.0
    """0 takes the likeliest token at each step; above 0 samples."""
    top_p: float = 1.0
    """When sampling, keep the likeliest tokens whose probabilities reach this sum."""
    generation_seed: int = 0
    """Seed of sampling; a response depends on it and on the input's id, not on the batch or the number of ranks."""
    stop_at_gen_emb: bool = True
    """Stop right after <gen_emb>: what follows cannot change the embedding.  Otherwise go on to <|im_end|>."""
    missing_gen_emb: Literal["append", "disc", "error"] = "append"
    """A response without <gen_emb>: append = close it with one and read there, disc = use the disc embedding, error."""
    mean_of_samples: int = 1
    """Self-consistency: an input's gen embedding is the normalised mean over this many sampled responses."""
    max_sequences: int = 256
    """Most responses that are generated at once."""

    def violations(self) -> list[str]:
        found = []
        found += bound_problems(self, 1, "max_new_tokens", "max_sequences", "mean_of_samples")
        if not 0.0 <= self.temperature < float("inf"):
            found.append(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.mean_of_samples > 1 and self.temperature == 0:
            found.append(f"mean_of_samples={self.mean_of_samples} needs --temperature above 0")
        if not 0.0 < self.top_p <= 1.0:
            found.append(f"top_p={self.top_p} must be above 0 and at most 1")
        return found


@dataclass(slots=True)
class Response:
    """One generated response, up to and without `<|im_end|>`."""

    token_ids: list[int]  # with the `<gen_emb>` that closed it, if one had to be appended
    num_generated: int  # tokens the model chose itself
    missing_gen_emb: bool  # the model wrote no `<gen_emb>`
    finish_reason: str  # "gen_emb", "im_end" or "length"
    embedding: np.ndarray | None  # float32 [H], L2-normalised; None only under the policies disc and error


@dataclass(slots=True)
class Generated:
    """What one prompt gave."""

    responses: list[Response]  # one per requested temperature
    disc: np.ndarray  # float32 [H]: the prompt's disc embedding

    def embedding(self, policy: str, sample: int = 0) -> np.ndarray | None:
        """The gen embedding of a response under a policy for a missing `<gen_emb>`; None under the policy error."""
        found = self.responses[sample].embedding
        return self.disc if found is None and policy == "disc" else found


def generate(
    engine: Engine,
    prompts: list[Sequence],
    ids: list[str],
    config: GenerationConfig,
    temperatures: tuple[float, ...] | None = None,
    wanted: np.ndarray | None = None,
) -> list[Generated]:
    """One response per prompt and entry of `temperatures` (default: config.temperature alone).

    `wanted` bool [len(prompts)]: the others are read for their disc embedding alone, their responses stay empty.
    `ids` name the prompts for seeding; response number i of a prompt is sample i of its id.  Every rank of the model's
    replica calls this with the same arguments and gets the same result.
    """
    temperatures = (config.temperature,) if temperatures is None else temperatures
    results: list[Generated | None] = [None] * len(prompts)
    for batch in generation_batches(engine, prompts, config, len(temperatures)):
        loop = Loop(engine, [prompts[i] for i in batch], [ids[i] for i in batch], config, temperatures)
        if wanted is not None:
            loop.state[np.repeat(~wanted[batch], len(temperatures))] = Loop.DEAD
        for index, generated in zip(batch, loop.run(), strict=True):
            results[index] = generated
    return results


def generation_batches(
    engine: Engine, prompts: list[Sequence], config: GenerationConfig, num_samples: int
) -> list[list[int]]:
    """Positions of `prompts` in batches of like length whose caches fit the engine's budget."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches: list[list[int]] = []
    for index in order:
        longest = len(prompts[batches[-1][0]]) if batches else 0
        capacity = longest + config.max_new_tokens + 1
        rows = (len(batches[-1]) + 1) * num_samples if batches else 0
        if not batches or rows > config.max_sequences or rows * capacity > engine.max_cache_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


class Loop:
    """The generation of one batch: N prompts with k samples each are R = N * k rows.

    A row's state says what happens after the step that feeds its pending token: it goes on sampling (RUN), is fed a
    closing `<gen_emb>` (CLOSE), or is over (LAST).  A row that is over (DEAD) stays in the cache until enough of them
    are dropped together.  All decisions are made from token ids on the CPU, the same on every rank.

    What is read and chosen on the way are methods of their own (`_read`, `_choose`, `_take`, `_give_up`), so that
    rollouts of reinforcement learning share the loop.
    """

    RUN, CLOSE, LAST, DEAD = range(4)

    def __init__(
        self,
        engine: Engine,
        prompts: list[Sequence],
        ids: list[str],
        config: GenerationConfig,
        temperatures: tuple[float, ...],
    ):
        self.engine, self.prompts, self.config = engine, prompts, config
        self.gen_emb = engine.special.gen_emb
        self.samples = len(temperatures)
        rows = len(prompts) * self.samples
        self.temperatures = np.tile(np.array(temperatures, dtype=np.float32), len(prompts))
        keys = [sample_key(config.generation_seed, name, i) for name in ids for i in range(self.samples)]
        self.keys = np.array(keys, dtype=np.uint64)
        starts = [next_position(prompt.position_ids) for prompt in prompts]
        self.positions = np.repeat(np.array(starts, dtype=np.int64), self.samples)  # of the next token to feed
        self.tokens = np.zeros((rows, config.max_new_tokens + 1), dtype=np.int64)
        self.counts = np.zeros(rows, dtype=np.int64)
        self.embedded = np.zeros(rows, dtype=bool)  # holds a <gen_emb>
        self.appended = np.zeros(rows, dtype=bool)  # was closed by us
        self.reasons = np.full(rows, "length", dtype=object)
        self.pending = np.zeros(rows, dtype=np.int64)
        self.state = np.full(rows, self.RUN)
        self.embeddings = torch.zeros(rows, engine.model_config.hidden_size, device=engine.state.device)

    def run(self) -> list[Generated]:
        return self._results(self._generate())

    @torch.inference_mode()
    def _generate(self) -> torch.Tensor:
        """Everything up to the results; returns the prompts' disc embeddings float32 [N, H]."""
        capacity = max(len(prompt) for prompt in self.prompts) + self.config.max_new_tokens + 1
        cache, hidden, disc = self.engine.prefill(self.prompts, capacity)
        if self.samples > 1:
            cache.replicate(self.samples)
            hidden = None if hidden is None else hidden.repeat_interleave(self.samples, dim=0)
        live = np.arange(len(self.counts))  # the rows that the cache holds, in its order
        step = 0
        self._advance(live, hidden, step)
        while (alive := self.state[live] != self.DEAD).any() and not self._give_up(step):
            if alive.mean() <= 1.0 - _DROP_SHARE:
                cache.select(torch.from_numpy(np.flatnonzero(alive)))
                live = live[alive]
            hidden = self.engine.decode(self.pending[live], self.positions[live], cache)
            self.positions[live] += 1
            step += 1
            self._read(live, hidden)
            self._advance(live, hidden, step)
        return disc

    def _give_up(self, step: int) -> bool:
        """Whether to leave the rows that are not over as they are; asked before each step."""
        return False

    def _read(self, live: np.ndarray, hidden: torch.Tensor | None) -> None:
        """Keep the embedding of every live row whose `<gen_emb>` was just fed; the last one of a row stays."""
        fed = np.flatnonzero((self.pending[live] == self.gen_emb) & (self.state[live] != self.DEAD))
        if hidden is not None and fed.size:
            rows = torch.from_numpy(fed).to(hidden.device)
            self.embeddings[torch.from_numpy(live[fed]).to(hidden.device)] = read_embedding(hidden, rows)

    def _advance(self, live: np.ndarray, hidden: torch.Tensor | None, step: int) -> None:
        """Choose the next pending token and state of each live row; `hidden` [len(live), H] on the last stage."""
        state = self.state[live]
        self.state[live[state == self.LAST]] = self.DEAD
        self._close(live[state == self.CLOSE])
        running = np.flatnonzero(state == self.RUN)
        if not running.size:
            return
        rows = live[running]
        if hidden is not None and running.size < len(live):
            hidden = hidden[torch.from_numpy(running).to(hidden.device)]
        self._take(rows, self._choose(rows, hidden, uniform(self.keys[rows], step)))

    def _choose(self, rows: np.ndarray, hidden: torch.Tensor | None, uniforms: np.ndarray) -> np.ndarray:
        """The next token of each running row."""
        return self.engine.choose(hidden, self.temperatures[rows], uniforms, self.config.top_p)

    def _take(self, rows: np.ndarray, chosen: np.ndarray) -> None:
        """Enter the tokens that the model chose for running rows."""
        config = self.config
        stopped = np.isin(chosen, self.engine.stop_ids)
        self.reasons[rows[stopped]] = "im_end"
        self._end(rows[stopped])
        rows, chosen = rows[~stopped], chosen[~stopped]
        self._append(rows, chosen)
        is_gen = chosen == self.gen_emb
        if config.stop_at_gen_emb:
            self.reasons[rows[is_gen]] = "gen_emb"
            self.state[rows[is_gen]] = self.LAST
            rows, is_gen = rows[~is_gen], is_gen[~is_gen]
        full = self.counts[rows] == config.max_new_tokens
        self.state[rows[full & is_gen]] = self.LAST
        rest = rows[full & ~is_gen]
        to_close = ~self.embedded[rest] & (config.missing_gen_emb == "append")
        self.state[rest[to_close]] = self.CLOSE
        self.state[rest[~to_close]] = self.DEAD

    def _end(self, rows: np.ndarray) -> None:
        """The model ended these responses: they are over, or closed first when they lack `<gen_emb>`."""
        to_close = ~self.embedded[rows] & (self.config.missing_gen_emb == "append")
        self._close(rows[to_close])
        self.state[rows[~to_close]] = self.DEAD

    def _close(self, rows: np.ndarray) -> None:
        self._append(rows, np.full(len(rows), self.gen_emb))
        self.appended[rows] = True
        self.state[rows] = self.LAST

    def _append(self, rows: np.ndarray, chosen: np.ndarray) -> None:
        self.tokens[rows, self.counts[rows]] = chosen
        self.counts[rows] += 1
        self.pending[rows] = chosen
        self.embedded[rows] |= chosen == self.gen_emb

    def _results(self, disc: torch.Tensor) -> list[Generated]:
        embeddings = self.engine.from_last_stage(self.embeddings).cpu().numpy()
        disc_rows = disc.cpu().numpy()
        responses = [
            Response(
                token_ids=self.tokens[row, : self.counts[row]].tolist(),
                num_generated=int(self.counts[row] - self.appended[row]),
                missing_gen_emb=bool(self.appended[row] or not self.embedded[row]),
                finish_reason=self.reasons[row],
                embedding=embeddings[row] if self.embedded[row] else None,
            )
            for row in range(len(self.counts))
        ]
        k = self.samples
        return [Generated(responses[i * k : (i + 1) * k], disc_rows[i]) for i in range(len(self.prompts))]
