"""Embeds one side of one task on all ranks, saving as it goes."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from umer1.data.media import MediaRoot
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.coverage import Kept
from umer1.evaluation.mmeb_v2.parts import Done, Parts
from umer1.evaluation.mmeb_v2.types import Item
from umer1.inference.embedders import Embedder
from umer1.inference.engine import Engine
from umer1.inference.generate import GenerationConfig
from umer1.inference.inputs import BadInput, Input
from umer1.inference.planning import Cost, plan_batches
from umer1.inference.replicas import on_first
from umer1.inference.runner import Runner, inspect_together
from umer1.progress import Progress

_SHOWN = 20  # inputs that one message lists
# vLLM takes new sequences while others go on: a batch of several times its slots keeps them filled.
_SLOTS = 4
# Generation wants many prompts at once: pixels of this many forward passes may wait in memory (about 5 GB, 3 batches).
_DECODED = 16


@dataclass(frozen=True, slots=True)
class Side:
    """The queries or the candidates of a task, in one mode."""

    task: str
    side: Literal["qry", "tgt"]
    mode: Literal["disc", "gen"]
    keys: list[int] | list[str]  # number of each query, name of each candidate
    inputs: list[Input]
    fingerprint: str  # the data's version
    identity: str  # of model, data, settings and keys: what results must have been made for
    generates: bool  # whether a response is sampled; else the state is one of what is there

    @property
    def name(self) -> str:
        """Also the stem of its files."""
        return side_name(self.task, self.side, self.mode)


def side_name(task: str, side: str, mode: str) -> str:
    return f"{task}_{side}_{mode}"


def make_side(kept: Kept, side: Literal["qry", "tgt"], mode: Literal["disc", "gen"], settings: str) -> Side:
    """The inputs of a side.  settings: a hash of the model and of all that the vectors of this mode depend on."""
    task = kept.task
    if side == "qry":
        keys, items = kept.numbers, [query.item for query in task.queries]
    else:
        keys, items = [c.name for c in task.candidates], [c.item for c in task.candidates]
    name = task.spec.name
    inputs = [
        _input(f"{name}/{side}/{key}", item, place) for place, (key, item) in enumerate(zip(keys, items, strict=True))
    ]
    digest = hashlib.sha256(json.dumps([settings, task.fingerprint, name, side, mode, keys]).encode())
    return Side(name, side, mode, keys, inputs, task.fingerprint, digest.hexdigest(), generates=mode == "gen")


def _input(name: str, item: Item, position: int) -> Input:
    return Input(name, item.text, item.images, item.video, position + 1)


class SideEncoder:
    """Embeds sides with one engine; every method is collective.

    embedder: what embeds, in place of the engine itself.  allow_bad: leave out inputs that turn out unusable; otherwise
    they end the run, with `flag` as the setting that would let them pass.  save_every: inputs of each copy of the model
    between two saves.
    """

    def __init__(
        self,
        engine: Engine,
        media: MediaRoot,
        generation: GenerationConfig,
        *,
        embedder: Embedder | None,
        allow_bad: bool,
        flag: str,
        save_every: int,
        num_workers: int,
        progress: Progress,
    ):
        self.engine, self.media, self.generation, self.embedder = engine, media, generation, embedder
        self.allow_bad, self.flag, self.save_every = allow_bad, flag, save_every
        self.num_workers, self.progress = num_workers, progress

    def encode(self, side: Side, parts: Parts) -> Done:
        """All results by position on rank 0, nothing elsewhere.

        They stay in `parts` until the caller removes them; what is there from an earlier run is taken over.
        """
        state = self.engine.state
        _, finished = _read(parts, state)
        costs, bad = inspect_together(side.inputs, side.mode, self.media, self.engine.processor, state)
        self._refuse(side, bad)
        self.progress.skip(len(finished | {entry.line - 1 for entry in bad}))
        runner = Runner(
            self.engine,
            side.inputs,
            self.media,
            generation=self.generation if side.generates else None,
            skip_bad=self.allow_bad,
            num_workers=self.num_workers,
            embedder=self.embedder,
            progress=self.progress,
        )
        for batches in self._rounds(self._plan(costs, side.generates), finished):
            begin = time.perf_counter()
            encoded, corrupt = runner.run(batches)
            self._refuse(side, corrupt)
            made = Done(encoded, corrupt, time.perf_counter() - begin)
            on_first(lambda made=made: _keep(side, made, parts), state)
        done, _ = _read(parts, state)
        done.bad += bad  # headers are looked at by every run, and what they show is in no part
        done.encoded.sort(key=lambda item: item.position)
        done.bad.sort(key=lambda entry: entry.line)
        return done

    def _plan(self, costs: list[Cost | None], generates: bool) -> list[list[int]]:
        """Batches for `Runner.run`.  A forward pass is cut to its budgets by the engine itself: a batch that generates
        is bounded by its cache and by what its pixels take in memory."""
        config, slots = self.engine.config, self.generation.max_sequences
        tokens, patches = config.max_tokens_per_batch, config.max_patches_per_batch
        if generates:
            tokens, patches = self.engine.max_cache_tokens, patches * _DECODED
            slots *= _SLOTS if self.embedder else 1
        groups = self.engine.state.dp_size
        return plan_batches(costs, max_tokens=tokens, max_patches=patches, max_inputs=slots, num_groups=groups)

    def _rounds(self, batches: list[list[int]], finished: set[int]) -> Iterator[list[list[int]]]:
        """The batches between two saves, less what is finished: a run that goes on has those of an unbroken one."""
        size = self.engine.state.dp_size
        found: list[list[int]] = []
        for start in range(0, len(batches), size):
            found += batches[start : start + size]
            if start + size >= len(batches) or sum(map(len, found)) >= self.save_every * size:
                left = [[position for position in batch if position not in finished] for batch in found]
                if any(left):
                    yield [batch for batch in left if batch]
                found = []

    def _refuse(self, side: Side, bad: list[BadInput]) -> None:
        if bad and not self.allow_bad:
            lines = [f"  {entry.id}: {entry.cause}: {entry.detail}" for entry in bad[:_SHOWN]]
            lines += [f"  and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
            raise UserError(
                f"{side.task}: {len(bad)} of {len(side.inputs)} inputs cannot be embedded; mend their files, or leave "
                f"them out and have them counted by {self.flag}:\n" + "\n".join(lines)
            )


def _read(parts: Parts, state: ParallelState) -> tuple[Done, set[int]]:
    """(what is in the parts, on rank 0; the positions that are finished, on every rank)."""
    found: list[Done] = []

    def read() -> set[int]:
        found.append(parts.read())
        return found[0].positions()

    positions = on_first(read, state)
    return (found[0] if found else Done()), positions


def _keep(side: Side, made: Done, parts: Parts) -> None:
    norms = np.array([np.linalg.norm(item.embedding) for item in made.encoded])
    broken = [item.id for item, good in zip(made.encoded, np.abs(norms - 1.0) < 1e-3, strict=True) if not good]
    if broken:
        raise UserError(
            f"{side.task}: the states are not finite for {len(broken)} of {len(made.encoded)} inputs "
            f"({', '.join(broken[:5])}, ...): the weights are damaged, or bf16 is too narrow for them (try --fp32)"
        )
    parts.write(made)
