"""Runs a model over one task of a benchmark, in disc and in gen mode, and hands scoring what it needs.

Every data-parallel rank takes a share of the queries and candidates; rank 0 gets everything.  A prompt is decoded once
and serves both modes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot
from umer1.data.prompts import has_format
from umer1.data.schema import Sequence
from umer1.errors import UserError
from umer1.evaluation.adaptive import AdaptiveRule, adaptive_scores
from umer1.evaluation.modes import (
    AdaptiveTiming,
    GenOutputs,
    ModeEmbeddings,
    TaskOutputs,
    derangement,
    reasoning_of,
    replace_thoughts,
)
from umer1.evaluation.retrieval import similarity
from umer1.evaluation.tasks import Task
from umer1.inference.engine import Engine
from umer1.inference.generate import Generated, GenerationConfig, Response, generate
from umer1.inference.inputs import Input
from umer1.inference.replicas import gather_to_first, share_with_all


@dataclass(kw_only=True, slots=True)
class GenSettings:
    """How gen mode is evaluated."""

    generation: GenerationConfig  # temperature is not used: one greedy response, and the samples
    num_samples: int
    sample_temperature: float
    seed: int  # of who gets whose thoughts
    adaptive: AdaptiveRule


@dataclass(slots=True)
class _Share:
    """This rank's part of a list of inputs: positions in it, ids, prompts, and the seconds it took to decode them."""

    positions: list[int]
    ids: list[str]
    prompts: list[Sequence]
    seconds: float


def run_task(engine: Engine, task: Task, media: MediaRoot, gen: GenSettings | None) -> TaskOutputs | None:
    """Embeddings and responses of one task; None on every rank but 0.  `gen` None: disc mode alone."""
    queries, candidates = (_prepare(engine, task, items, media) for items in (task.queries, task.candidates))
    disc, disc_seconds = _timed(lambda: _embed_disc(engine, queries.prompts))
    local: dict[str, dict] = {
        "queries": {"positions": queries.positions, "disc": disc},
        "candidates": {"positions": candidates.positions, "disc": _embed_disc(engine, candidates.prompts)},
        "seconds": {"disc": queries.seconds + disc_seconds, "count": len(queries.positions)},
    }
    if gen is not None:
        _run_gen(engine, task, queries, candidates, gen, local)
    parts = gather_to_first(local, engine.state)
    outputs = _outputs(task, parts, gen) if parts else None
    if gen is not None:
        _time_adaptive(engine, queries, gen, outputs)
    return outputs


def _prepare(engine: Engine, task: Task, items: list[Input], media: MediaRoot) -> _Share:
    state = engine.state
    positions = list(range(state.dp_rank, len(items), state.dp_size))
    start = time.perf_counter()
    prompts = []
    for position in positions:
        item = items[position]
        try:
            videos = [item.video] if item.video else []
            prompts.append(engine.processor.encode_prompt(item.text, item.images, videos, media))
        except BadSample as error:
            raise UserError(
                f"{task.name}: input {item.id!r} cannot be scored: {error}; generate the data anew"
            ) from None
    seconds = time.perf_counter() - start
    return _Share(positions, [f"{task.name}/{items[i].id}" for i in positions], prompts, seconds)


def _timed(function: Callable[[], object]) -> tuple:
    """(result, seconds); results are on the CPU, so the device is done when they are."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def until_disc(prompt: Sequence) -> Sequence:
    """The prompt up to its `<disc_emb>`, all that disc mode needs."""
    end = prompt.disc_index + 1
    return replace(
        prompt,
        input_ids=prompt.input_ids[:end],
        labels=prompt.labels[:end],
        position_ids=prompt.position_ids[:, :end],
        prompt_length=end,
    )


def _embed_disc(engine: Engine, prompts: list[Sequence]) -> np.ndarray:
    return engine.embed([until_disc(prompt) for prompt in prompts], [prompt.disc_index for prompt in prompts])


def _run_gen(
    engine: Engine, task: Task, queries: _Share, candidates: _Share, gen: GenSettings, local: dict[str, dict]
) -> None:
    """Greedy responses of queries and candidates, samples of the queries, and the queries with other thoughts."""
    generated, seconds = _timed(lambda: generate(engine, queries.prompts, queries.ids, gen.generation, (0.0,)))
    local["seconds"]["gen"] = queries.seconds + seconds
    greedy = [outcome.responses[0] for outcome in generated]
    texts = [engine.decode_text(response.token_ids) for response in greedy]
    targets = generate(engine, candidates.prompts, candidates.ids, gen.generation, (0.0,))
    temperatures = (gen.sample_temperature,) * gen.num_samples
    sampled = generate(engine, queries.prompts, queries.ids, gen.generation, temperatures) if temperatures else []
    own = _rows([outcome.embedding("append") for outcome in generated], engine)
    donors = _donated_thoughts(engine, task, queries, texts, gen.seed)
    local["queries"] |= {
        "gen": own,
        "texts": texts,
        "empty_thoughts": _reread(engine, queries.prompts, texts, [""] * len(texts), own),
        "shuffled_thoughts": _reread(engine, queries.prompts, texts, donors, own),
        "lengths": np.array([response.num_generated for response in greedy]),
        "missing": np.array([response.missing_gen_emb for response in greedy]),
        "well_formed": np.array([is_well_formed(r, text) for r, text in zip(greedy, texts, strict=True)]),
        "samples": np.stack([_rows([r.embedding for r in s.responses], engine) for s in sampled])
        if sampled
        else np.zeros((len(texts), 0, own.shape[1]), dtype=np.float32),
        "sample_texts": [[engine.decode_text(r.token_ids) for r in outcome.responses] for outcome in sampled]
        or [[] for _ in texts],
    }
    local["candidates"]["gen"] = _rows([outcome.embedding("append") for outcome in targets], engine)


def adaptive_pass(
    engine: Engine, prompts: list[Sequence], ids: list[str], generation: GenerationConfig, wanted: np.ndarray
) -> list[Generated]:
    """Greedy responses of the prompts that are `wanted` (bool [Q]), in order; every prompt is read up to `<disc_emb>`.

    Where most reason, each prompt is prefilled whole, once, and those that reason go on from its cache.  Where few do,
    all are read up to `<disc_emb>` alone, and those that reason begin anew in batches of their own: whichever puts
    fewer tokens through the model.
    """
    to_disc = sum(prompt.disc_index + 1 for prompt in prompts)
    spared = sum(len(prompt) for prompt, reasons in zip(prompts, wanted, strict=True) if not reasons)
    if to_disc < spared:
        _embed_disc(engine, prompts)
        places = np.flatnonzero(wanted).tolist()
        return generate(engine, [prompts[i] for i in places], [ids[i] for i in places], generation, (0.0,))
    found = generate(engine, prompts, ids, generation, (0.0,), wanted)
    return [outcome for outcome, reasons in zip(found, wanted, strict=True) if reasons]


def _time_adaptive(engine: Engine, queries: _Share, gen: GenSettings, outputs: TaskOutputs | None) -> None:
    """Enter how long adaptive mode takes: all queries in disc mode, and a response for those that reason.

    The decisions are made beforehand, from the lists that are there by now; making them takes microseconds a query.
    """
    reasoned = None
    if outputs is not None:
        lists = (similarity(mode.queries, mode.candidates) for mode in (outputs.disc, outputs.gen.embeddings))
        reasoned = adaptive_scores(*lists, gen.adaptive).reasoned
    reasoned = share_with_all(reasoned, engine.state)[0]
    wanted = reasoned[queries.positions]
    _, seconds = _timed(lambda: adaptive_pass(engine, queries.prompts, queries.ids, gen.generation, wanted))
    parts = gather_to_first((queries.seconds + seconds, len(queries.positions)), engine.state)
    if outputs is not None:
        total, count = (sum(values) for values in zip(*parts, strict=True))
        outputs.timing = AdaptiveTiming(reasoned, total / count)


def is_well_formed(response: Response, text: str) -> bool:
    """the paper's format, written by the model itself to the end."""
    return not response.missing_gen_emb and has_format(text)


def _rows(embeddings: list[np.ndarray], engine: Engine) -> np.ndarray:
    """[N, H], also of no embeddings at all: a rank may have no share."""
    return np.stack(embeddings) if embeddings else np.zeros((0, engine.model_config.hidden_size), dtype=np.float32)


def _donated_thoughts(engine: Engine, task: Task, queries: _Share, texts: list[str], seed: int) -> list[str]:
    """For each local query the reasoning that another query of the task wrote; the same at any number of ranks."""
    everyone: dict[int, str] = {}
    for part in share_with_all(dict(zip(queries.positions, map(reasoning_of, texts), strict=True)), engine.state):
        everyone |= part
    donor = derangement(len(task.queries), seed)
    return [everyone[int(donor[position])] for position in queries.positions]


def _reread(
    engine: Engine, prompts: list[Sequence], texts: list[str], thoughts: list[str], own: np.ndarray
) -> np.ndarray:
    """Teacher-forced gen embeddings [N, H] of each response with other thoughts and its own summary.

    A response whose thoughts cannot be replaced (none in it, or it spells a reserved token) keeps its `own` embedding.
    """
    found = own.copy()
    places, sequences = [], []
    for place, (prompt, text, thought) in enumerate(zip(prompts, texts, thoughts, strict=True)):
        edited = replace_thoughts(text, thought)
        if edited == text:
            continue
        try:
            sequence = engine.processor.encode_response(prompt, edited)
        except BadSample:
            continue
        places.append(place)
        sequences.append(sequence)
    if places:
        found[places] = engine.embed(sequences, [sequence.gen_index for sequence in sequences])
    return found


def _outputs(task: Task, parts: list[dict], gen: GenSettings | None) -> TaskOutputs:
    """Put the ranks' shares back into the task's order."""

    def merge(side: str, key: str, count: int) -> list:
        rows: list = [None] * count
        for part in parts:
            for position, row in zip(part[side]["positions"], part[side][key], strict=True):
                rows[position] = row
        return rows

    def queries(key: str) -> np.ndarray:
        return np.stack(merge("queries", key, len(task.queries)))

    def both(key: str) -> ModeEmbeddings:
        return ModeEmbeddings(queries(key), np.stack(merge("candidates", key, len(task.candidates))))

    def seconds(mode: str) -> float:
        count = sum(part["seconds"]["count"] for part in parts)
        return sum(part["seconds"][mode] for part in parts) / count

    outputs = TaskOutputs(
        metric=task.metric,
        labels=np.array(task.labels),
        disc=both("disc"),
        disc_seconds_per_query=seconds("disc"),
        groups=task.groups,
    )
    if gen is not None:
        outputs.gen = GenOutputs(
            embeddings=both("gen"),
            empty_thoughts=queries("empty_thoughts"),
            shuffled_thoughts=queries("shuffled_thoughts"),
            samples=queries("samples"),
            texts=merge("queries", "texts", len(task.queries)),
            sample_texts=merge("queries", "sample_texts", len(task.queries)),
            lengths=queries("lengths"),
            well_formed=queries("well_formed"),
            missing=queries("missing"),
            seconds_per_query=seconds("gen"),
        )
    return outputs
