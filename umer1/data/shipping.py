"""How pairs travel between processes: all pixels as one tensor, the many small tensors as arrays.

From a worker process to its trainer pixels go through shared memory, where each tensor holds a file descriptor, of
which a process may have few; from rank to rank, as one tensor of the process group's.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from umer1.data.packing import sequences_of
from umer1.data.schema import EncodedPair, PromptPair, Sequence

if TYPE_CHECKING:
    from umer1.data.loader import SlotFiller, StepData

Pairs = list[EncodedPair] | list[PromptPair]


def packed(pairs: Pairs) -> torch.Tensor | None:
    """Make `pairs` light, in place; float32 [P, patch_dim], their pixels one after the other (None without pairs)."""
    sequences = _sequences(pairs)
    pixels = torch.cat([sequence.pixel_values for sequence in sequences]) if sequences else None
    for sequence in sequences:
        sequence.pixel_values = len(sequence.pixel_values)
        _replace_fields(sequence, _to_array)
    return pixels


def unpacked(pairs: Pairs, pixels: torch.Tensor | None) -> None:
    """Undo `packed`, in place; the pixels are parts of the tensor, on its device."""
    sequences = _sequences(pairs)
    parts = pixels.split([sequence.pixel_values for sequence in sequences]) if sequences else ()
    for sequence, part in zip(sequences, parts, strict=True):
        sequence.pixel_values = part
        _replace_fields(sequence, _to_tensor)


class Sending:
    """A SlotFiller whose steps are ready to leave a worker."""

    def __init__(self, filler: "SlotFiller"):
        self.filler = filler

    def __getitem__(self, step: int) -> tuple["StepData", torch.Tensor | None]:
        data = self.filler[step]
        return data, packed(data.pairs)


def arrived(step: Any) -> "StepData":
    """The step as the maker made it; one that was never sent is returned as it is."""
    if not isinstance(step, tuple):
        return step
    data, pixels = step
    unpacked(data.pairs, pixels)
    return data


def as_it_is(step: Any) -> Any:
    """DataLoader's collate function."""
    return step


def _sequences(pairs: Pairs) -> list[Sequence]:
    found = []
    for pair in pairs:
        found += [pair.query.sequence, pair.positive.sequence] if isinstance(pair, PromptPair) else sequences_of(pair)
    return found


def _replace_fields(item: Any, change: Any) -> None:
    for field in fields(item):
        setattr(item, field.name, change(getattr(item, field.name)))


def _to_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
