"""The teacher of `umer1 annotate`: where it is, what it is asked, and how patiently."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from umer1.rl.engines.vllm_install import has_vllm, how_to_install
from umer1.rules import bound_problems, path_problems

TEACHER_PROMPT = (
    "The above is one input for a search system: text, pictures, frames of a video, or several of them together. Think "
    "about what it shows, says and asks for, inside <think> </think> tags. Then give, inside <answer> </answer> tags, "
    "one word or one sentence that sums up the entire input."
)


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that writes reasoning and summary, behind an OpenAI-compatible endpoint"""

    endpoint: str | None = None
    """Base address, such as http://localhost:8000/v1; /chat/completions is added."""
    teacher_model: str | None = None
    """The model's name at the endpoint; with --serve-teacher, its directory."""
    serve_teacher: bool = False
    """Run the teacher by vLLM in a process of this command, which ends with it, in place of --endpoint."""
    vllm_arguments: str = ""
    """With --serve-teacher: further arguments of vLLM's server; written with =, --vllm-arguments="--dtype float32"."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; none is sent without it. The key is never written."""
    teacher_prompt: str = TEACHER_PROMPT
    """What the teacher is asked, after the input."""
    teacher_temperature: float = 0.8
    """Temperature of sampling."""
    teacher_top_p: float = 0.6
    """Nucleus of sampling."""
    max_answer_tokens: int = 8704
    """Most tokens of an answer; one that is cut off there is filtered."""
    keep_special_tokens: bool = False
    """Have the server write special tokens out, as vLLM and SGLang do when they are asked (skip_special_tokens): the
    <think> of GLM-4.1V is one. With --serve-teacher they always are."""
    max_image_pixels: int = 1_048_576
    """A larger picture is scaled down to this before it is sent."""
    max_frame_pixels: int = 262_144
    """The same for a frame of a video."""
    max_source_pixels: int = 100_000_000
    """A picture whose header claims more is refused before it is decoded."""
    video_as: Literal["images", "video_url"] = "images"
    """How frames are sent: as pictures, or as one video_url of JPEG frames, which vLLM understands."""
    concurrency: int = 32
    """Requests under way at once."""
    request_timeout_seconds: float = 600.0
    """Seconds of one request, from its first byte to the answer's last."""
    connect_timeout_seconds: float = 10.0
    """Seconds to reach the endpoint."""
    max_attempts: int = 8
    """Times one side is asked before it counts as failed (an answer, good or bad, is never asked for again)."""
    backoff_seconds: float = 1.0
    """Longest wait before the second attempt; it doubles with each further one, and chance picks a part of it."""
    max_backoff_seconds: float = 60.0
    """Longest such wait. A server's Retry-After is kept to, up to an hour."""
    stop_after_failures: int = 32
    """Sides in a row, failed or refused, that end the run; the same command goes on from there."""
    input_token_price: float = 0.0
    """Price of a million tokens sent, for the cost shown."""
    output_token_price: float = 0.0
    """Price of a million tokens written by the teacher."""
    progress_seconds: float = 5.0
    """Seconds between lines of progress."""

    def violations(self) -> list[str]:
        found = [
            f"--{name.replace('_', '-')} is required"
            for name in ("endpoint", "teacher_model")
            if not getattr(self, name) and not (name == "endpoint" and self.serve_teacher)
        ]
        if self.serve_teacher:
            found += self._serving_violations()
        if self.endpoint and (problem := _endpoint_problem(self.endpoint)):
            found.append(f"endpoint={self.endpoint!r} {problem}; use http[s]://HOST[:PORT]/v1")
        if self.api_key_env:
            found += _key_problem(self.api_key_env)
        found += bound_problems(self, 784, "max_image_pixels", "max_frame_pixels")
        counts = ("max_answer_tokens", "max_source_pixels", "concurrency", "max_attempts", "stop_after_failures")
        found += bound_problems(self, 1, *counts)
        positive = ("request_timeout_seconds", "connect_timeout_seconds", "backoff_seconds", "max_backoff_seconds")
        found += [
            f"{name}={getattr(self, name)} must be above 0" for name in positive if not 0 < getattr(self, name) < 1e6
        ]
        at_least_0 = ("teacher_temperature", "input_token_price", "output_token_price", "progress_seconds")
        found += [
            f"{name}={getattr(self, name)} must be 0 or above"
            for name in at_least_0
            if not 0 <= getattr(self, name) < 1e6
        ]
        if not 0 < self.teacher_top_p <= 1:
            found.append(f"teacher_top_p={self.teacher_top_p} must be above 0 and at most 1")
        return found

    def __post_init__(self) -> None:
        self.keep_special_tokens = self.keep_special_tokens or self.serve_teacher

    def _serving_violations(self) -> list[str]:
        found = []
        if self.endpoint or self.api_key_env:
            found.append("serve_teacher starts an endpoint of its own; leave out --endpoint and --api-key-env")
        rule = "is not a directory, which --serve-teacher needs"
        found += path_problems("teacher_model", self.teacher_model, Path.is_dir, rule)
        if not has_vllm():
            found.append(f"serve_teacher needs vLLM: {how_to_install()}")
        try:
            shlex.split(self.vllm_arguments)
        except ValueError as error:
            found.append(f"vllm_arguments={self.vllm_arguments!r}: {error}")
        return found


def _key_problem(name: str) -> list[str]:
    """The key itself is in no message."""
    key = os.environ.get(name)
    if not key:
        return [f"api_key_env={name}: that environment variable is not set"]
    if not re.fullmatch("[!-~]+", key):
        return [f"api_key_env={name}: that variable holds what no header can carry (a line break, a blank, ...)"]
    return []


def _endpoint_problem(endpoint: str) -> str | None:
    try:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return "is no address"
        parts.hostname.encode("idna")
        if not re.fullmatch("[!-~]*", parts.path):
            return "has a path that is not plain ASCII; write it percent-encoded"
        if parts.username or parts.password:
            return "holds a password; name a variable with --api-key-env instead"
        return "must have no ? and no #" if parts.query or parts.fragment else None
    except ValueError as error:
        return f"is no address ({error})"
