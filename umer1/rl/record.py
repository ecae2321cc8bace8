"""The record of rollouts under SAVE/rollouts: a few prompts of a step with all that was sampled, scored and used.

`iter_0000010.jsonl` holds one `RolloutEntry` a line, enough to redo the step outside of umer1: the prompt comes from
the record of the data file, the responses from their token ids.  `iter_0000010.txt` is the same for people.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from umer1.data.prompts import IMAGE_PAD, VIDEO_PAD
from umer1.files import write_text

SIDES = ("query", "positive")  # by their numbers
_PADS = re.compile(f"((?:{re.escape(IMAGE_PAD)})+|(?:{re.escape(VIDEO_PAD)})+)")


@dataclass(kw_only=True, slots=True)
class ScoredCompletion:
    """One response of L tokens, its rewards and its advantage; a failed one has no more than its status."""

    status: Literal["ok", "missing_gen_emb", "failed"]
    finish_reason: str | None = None  # "stop" or "length"
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # [L], the token that stopped it included
    logprobs: Iterable[float] = ()  # float32 [L], the engine's
    old_logprobs: Iterable[float] | None = None  # float32 [L], the trainer's before the update; None: not kept
    rewards: dict[str, float] = field(default_factory=dict)  # by the term's name, before its weight
    total: float | None = None  # weighted sum of the terms
    advantage: float | None = None


@dataclass(kw_only=True, slots=True)
class RolloutEntry:
    """One prompt of a step and its responses: what a line holds."""

    iteration: int  # the step, from 1
    slot: int  # the pair's place in the global batch
    side: Literal["query", "positive"]
    dataset: str
    index: int  # the record's position in the data file
    prompt: str  # as text; runs of vision pads are written as one
    prompt_tokens: int  # with every vision pad
    completions: list[ScoredCompletion]  # in the order of generation


def write_rollouts(directory: str | Path, entries: list[RolloutEntry]) -> None:
    """Write the entries of one step to `directory`/iter_NNNNNNN.jsonl and .txt, each complete or not at all.

    A step that is run again after a resume replaces its files.  ValueError for entries of several steps or of none.
    """
    iterations = {entry.iteration for entry in entries}
    if len(iterations) != 1:
        raise ValueError(f"entries of one step are wanted, not of {sorted(iterations)}")
    stem = Path(directory) / f"iter_{iterations.pop():07d}"
    lines = (json.dumps(_as_json(entry), ensure_ascii=False) for entry in entries)
    write_text(stem.with_suffix(".jsonl"), "".join(line + "\n" for line in lines))
    write_text(stem.with_suffix(".txt"), "\n".join(_as_text(entry) for entry in entries))


def _as_json(entry: RolloutEntry) -> dict:
    line = asdict(entry)
    line["prompt"] = _PADS.sub(lambda run: IMAGE_PAD if run[0].startswith(IMAGE_PAD) else VIDEO_PAD, entry.prompt)
    for completion in line["completions"]:
        for key in ("logprobs", "old_logprobs"):
            if completion[key] is not None:
                completion[key] = [_float32(value) for value in completion[key]]
        completion["rewards"] = {name: _finite(value) for name, value in completion["rewards"].items()}
        for key in ("total", "advantage"):
            completion[key] = _finite(completion[key])
    return line


def _float32(value: float) -> float | None:
    """The shortest number that reads back as this float32."""
    return _finite(str(np.float32(value)))


def _finite(value: float | str | None) -> float | None:
    """JSON has no NaN or infinity."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _as_text(entry: RolloutEntry) -> str:
    title = f"step {entry.iteration}, pair {entry.slot} ({entry.dataset}, record {entry.index}), {entry.side}"
    prompt = _PADS.sub(_count_pads, entry.prompt)
    lines = [f"=== {title}: {entry.prompt_tokens} tokens", *_indented(prompt, "  | "), ""]
    for number, completion in enumerate(entry.completions):
        lines += [f"[{number}] {_figures(completion)}", *_indented(completion.text, "    "), ""]
    return "\n".join(lines)


def _count_pads(run: re.Match) -> str:
    pad = IMAGE_PAD if run[0].startswith(IMAGE_PAD) else VIDEO_PAD
    count = len(run[0]) // len(pad)
    return pad if count == 1 else f"{pad} x {count}"


def _figures(completion: ScoredCompletion) -> str:
    if completion.status == "failed":
        return "failed, left out"
    parts = [f"advantage {_signed(completion.advantage)}", f"reward {_signed(completion.total)}"]
    parts += [f"{name} {_signed(value)}" for name, value in completion.rewards.items()]
    parts.append(f"{len(completion.token_ids)} tokens")
    if completion.finish_reason == "length":
        parts.append("cut off")
    if completion.status == "missing_gen_emb":
        parts.append("no <gen_emb>")
    return ", ".join(parts)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _indented(text: str, indent: str) -> list[str]:
    """Lines with the control characters that a model may emit spelt out: they would act on a terminal."""
    spelt = ("".join(char if char.isprintable() else repr(char)[1:-1] for char in line) for line in text.split("\n"))
    return [f"{indent}{line}" if line else indent.rstrip() for line in spelt]
