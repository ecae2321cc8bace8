"""Requests as the engine takes them, and its answers put in order."""

import logging
from typing import Any

import numpy as np
import torch

from umer1.models.qwen2_vl.directory import SpecialTokens
from umer1.rl.engines.vllm_wire import Message, WireError
from umer1.rl.types import Completion, Request

logger = logging.getLogger(__name__)


def prompt_message(request: Request, special: SpecialTokens) -> tuple[dict[str, Any], list[memoryview]]:
    """(fields, bodies) of a "prompt" message: ids with one pad for each vision block, and the resized pictures."""
    prompt = request.prompt
    media = [np.ascontiguousarray(array) for array in (*prompt.images, *prompt.videos)]
    fields = dict(
        key=request.key,
        ids=unexpanded(prompt.sequence.input_ids, special).tolist(),
        images=[list(array.shape) for array in prompt.images],
        videos=[list(array.shape) for array in prompt.videos],
    )
    return fields, [array.data for array in media]


def unexpanded(input_ids: torch.Tensor, special: SpecialTokens) -> torch.Tensor:
    """`input_ids` int64 [L] with every run of image or video pads shortened to one: the engine expands it itself."""
    pad = (input_ids == special.image_pad) | (input_ids == special.video_pad)
    again = pad.clone()
    again[:1] = False
    again[1:] &= input_ids[1:] == input_ids[:-1]
    return input_ids[~again]


class Answers:
    """Completions by request and number; None where there is none.  `mismatch`: why the engine's prompts are wrong."""

    def __init__(self, requests: list[Request], num_generations: int):
        self.requests = requests
        self.found: list[list[Completion | None]] = [[None] * num_generations for _ in requests]
        self.failures: dict[str, str] = {}  # by the request's key
        self.mismatch = ""
        self.finished = False

    def take(self, message: Message) -> None:
        """Raises WireError on what is no answer."""
        try:
            if message.op == "length":
                self._compare(message.fields["request"], message.fields["tokens"])
            elif message.op == "failed":
                self.failures[self.requests[message.fields["request"]].key] = str(message.fields["reason"])
            elif message.op == "completions":
                self._completions(message)
            elif message.op == "finished":
                self.finished = True
            else:
                raise WireError(f"{message.op[:40]!r} in the midst of answers")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WireError(f"an answer that makes no sense: {error!r}") from None

    def _compare(self, index: int, tokens: int) -> None:
        request = self.requests[index]
        if tokens != len(request.prompt.sequence):
            self.mismatch = self.mismatch or (
                f"prompt {request.key}: vLLM makes {tokens} tokens of it, the trainer {len(request.prompt.sequence)}; "
                "both must see the same prompt. Tokenizer, preprocessor settings and vLLM's version belong together "
                "(docs/grpo.md)."
            )

    def _completions(self, message: Message) -> None:
        pairs = zip(message.bodies[::2], message.bodies[1::2], strict=True)
        for (index, number, reason), (ids, scores) in zip(message.fields["samples"], pairs, strict=True):
            token_ids, logprobs = np.frombuffer(ids, dtype=np.int32), np.frombuffer(scores, dtype=np.float32)
            if len(token_ids) != len(logprobs) or index < 0 or number < 0:
                raise ValueError(f"{len(token_ids)} tokens with {len(logprobs)} log-probs")
            if reason not in ("stop", "length") or not np.isfinite(logprobs).all():
                self.failures[self.requests[index].key] = f"a response ended by {reason!r}, or without finite log-probs"
                continue
            self.found[index][number] = Completion(token_ids.tolist(), logprobs.copy(), reason)

    def log_failures(self, rank: int, *, late: bool) -> None:
        """One line for what is missing."""
        missing = sum(completion is None for answer in self.found for completion in answer)
        if late:
            logger.warning("rank %d: %d responses were not there in time and are left out", rank, missing)
        elif missing:
            key, reason = next(iter(self.failures.items()), ("?", "no reason given"))
            logger.warning("rank %d: %d responses failed and are left out; %s: %s", rank, missing, key, reason)
