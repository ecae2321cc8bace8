"""`--data-path`: one file, several, or several with weights, as Megatron writes them."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from umer1.rules import path_problems

_FORMS = "give PATH, PATH PATH ..., or WEIGHT PATH WEIGHT PATH ..."


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file and its share of the training, None where every pair counts the same."""

    path: Path
    weight: float | None = None


def data_files(words: Iterable[str]) -> list[DataFile]:
    """The files that the words of --data-path name, weights brought to the sum 1; ValueError, a fault an argument."""
    words = list(words)
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        found = [DataFile(Path(word)) for word in words]
    else:
        misplaced = [
            f"data_path: {word!r} stands where {'a weight' if place % 2 == 0 else 'a path'} is expected"
            for place, (word, number) in enumerate(zip(words, numbers, strict=True))
            if (number is None) == (place % 2 == 0)
        ]
        if len(words) % 2:
            misplaced.append(f"data_path has {len(words)} words: with weights, each path needs one")
        if misplaced:
            raise ValueError(*[f"{problem}; {_FORMS}" for problem in misplaced])
        found = [DataFile(Path(word), weight) for word, weight in zip(words[1::2], numbers[::2], strict=True)]
    problems = [
        f"data_path: the weight of {file.path} is {file.weight}; it must be above 0 and finite"
        for file in found
        if file.weight is not None and not 0 < file.weight < math.inf
    ]
    rule = "does not exist; give a JSON list or JSONL file of pairs"
    problems += [problem for file in found for problem in path_problems("data_path", file.path, Path.exists, rule)]
    places = [os.path.realpath(file.path) for file in found]
    twice = {str(file.path) for file, place in zip(found, places, strict=True) if places.count(place) > 1}
    problems += [f"data_path names {path} more than once; give it one weight" for path in sorted(twice)]
    if problems:
        raise ValueError(*problems)
    total = sum(file.weight or 0.0 for file in found)
    return [DataFile(file.path, file.weight and file.weight / total) for file in found]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
