"""How a step travels from a worker process: pixels in shared memory, the many small tensors as arrays.

Each shared tensor holds a file descriptor, of which a process may have few: a packed micro-batch has one tensor of
pixels, and the pixels of all prompts of a step go as one.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from umer1.data.loader import SlotFiller, StepData


class Packing:
    """A SlotFiller whose steps are ready to be sent."""

    def __init__(self, filler: "SlotFiller"):
        self.filler = filler

    def __getitem__(self, step: int) -> tuple["StepData", torch.Tensor | None]:
        data = self.filler[step]
        for batch in data.batches:
            _replace_fields(batch, _to_array, skip="pixel_values")
        sequences = _sequences(data)
        pixels = torch.cat([sequence.pixel_values for sequence in sequences]) if sequences else None
        for sequence in sequences:
            sequence.pixel_values = len(sequence.pixel_values)
            _replace_fields(sequence, _to_array)
        return data, pixels


def unpacked(step: Any) -> "StepData":
    """The step as the maker made it; one that was never sent is returned as it is."""
    if not isinstance(step, tuple):
        return step
    data, pixels = step
    for batch in data.batches:
        _replace_fields(batch, _to_tensor)
    sequences = _sequences(data)
    parts = pixels.split([sequence.pixel_values for sequence in sequences]) if sequences else ()
    for sequence, part in zip(sequences, parts, strict=True):
        sequence.pixel_values = part
        _replace_fields(sequence, _to_tensor)
    return data


def as_it_is(step: Any) -> Any:
    """DataLoader's collate function."""
    return step


def _sequences(data: "StepData") -> list[Any]:
    return [prompt.sequence for pair in data.pairs for prompt in (pair.query, pair.positive)]


def _replace_fields(item: Any, change: Any, skip: str = "") -> None:
    for field in fields(item):
        if field.name != skip:
            setattr(item, field.name, change(getattr(item, field.name)))


def _to_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
