"""The words of the rollout phase, and what every rollout engine can do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from umer1.data.schema import Prompt

Stop = Callable[[], bool]
"""Asked every fraction of a second during long work: whether to break off."""


class EngineDied(Exception):
    """The engine's process is gone (or cannot be reached); it may be restarted.  The text has its last words."""


class Interrupted(Exception):
    """Generation was broken off because `Stop` said so."""


@dataclass(slots=True)
class Completion:
    """One sampled response of L tokens."""

    token_ids: list[int]  # [L] as sampled, the token that stopped it included
    logprobs: np.ndarray  # float32 [L]: log softmax of the raw logits / temperature, at the engine
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered.  `key` names it: sampling depends on the key, the seed and the sample's number."""

    key: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn."""

    num_generations: int
    max_completion_length: int  # tokens, the stop token included
    temperature: float  # 0 takes the likeliest token
    stop_ids: tuple[int, ...]  # a response ends right after one of them
    seed: int


class RolloutEngine(Protocol):
    """What turns prompts into responses under the weights that were loaded last."""

    name: str
    collective: bool
    """True: all ranks of a copy of the model call `generate` with the same requests and get the same answers.
    False: each rank has an engine of its own and gives it its own requests."""

    def start(self, stop: Stop) -> None:
        """Wait until it can be used, which every other method does by itself.  Raises EngineDied, Interrupted."""

    def generate(self, requests: list[Request], sampling: Sampling, stop: Stop) -> list[list[Completion | None]]:
        """`num_generations` responses per request; None for one that failed or timed out.

        Raises EngineDied, Interrupted; UserError when an expanded prompt differs from the trainer's.
        """

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Take over all weights (Hugging Face name, whole tensor), forget what was cached under the old ones.

        Returns checksums (`umer1.rl.checksum`): under a tensor's name of what arrived, under "engine:" + name of what
        the running model holds; any subset.  Raises EngineDied.
        """

    def sleep(self) -> None:
        """Give back memory while the trainer works."""

    def wake(self) -> None:
        """Take it again; weights have to be loaded before the next `generate`."""

    def restart(self) -> None:
        """Start anew after EngineDied; weights have to be loaded before the next `generate`."""

    def close(self) -> None:
        """End it; may be called twice."""
