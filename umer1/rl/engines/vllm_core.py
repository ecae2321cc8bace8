"""vLLM itself, inside its process: built on a directory without weights, fed with ids and pictures."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from vllm import EngineArgs, SamplingParams
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from umer1 import device

_MAX_MEDIA = 999  # of one prompt; the prompt's length is what limits them


@dataclass(kw_only=True, slots=True)
class EngineSettings:
    """What the vLLM engine is built with."""

    model: str  # a directory with config, tokenizer and preprocessor files (vllm_assets); no weights are read
    dtype: str
    max_model_len: int
    max_sequences: int
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.4
    sleep: bool = False  # whether sleep() is to give back a GPU's memory


@dataclass(slots=True)
class Sample:
    """One finished response."""

    request: int
    number: int  # of the prompt's samples
    token_ids: np.ndarray  # int32 [L]
    logprobs: np.ndarray  # float32 [L]
    finish_reason: str


class BadPrompt(Exception):
    """vLLM does not take this prompt; others are not touched."""


def sample_seed(seed: int, key: str, number: int) -> int:
    """63 bits that differ for every (seed, prompt, sample): a response does not depend on what else is in the batch."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class VLLMCore:
    """One engine; not safe for use from several threads."""

    def __init__(self, settings: EngineSettings):
        on_gpu = device.has_cuda()
        arguments: dict[str, Any] = dict(
            model=settings.model,
            load_format="dummy",
            dtype=settings.dtype,
            seed=0,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_sequences,
            # Whole prompts at once: vLLM cannot take a chunked prompt of a seeded request on the CPU (its generators
            # have no offset to go back by).
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=max(2048, settings.max_model_len, settings.max_sequences),
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=not on_gpu,
            skip_mm_profiling=not on_gpu,
            enable_sleep_mode=settings.sleep and on_gpu,
            limit_mm_per_prompt={"image": _MAX_MEDIA, "video": _MAX_MEDIA},
            mm_processor_cache_gb=0,  # a prompt's pictures are processed once for all its samples as it is
            generation_config="vllm",  # nothing of generation_config.json: no bans, no other temperature
            # Pictures are normalised by the processor: with load_format dummy, vLLM would fill the normalisation's mean
            # and deviation, buffers of the model, with random numbers as well, and say nothing.
            mm_device_do_normalize=False,
            logprobs_mode="processed_logprobs",  # log softmax of logits / temperature, what is sampled from
            worker_extension_cls="umer1.rl.engines.vllm_worker.WorkerExtension",
            disable_log_stats=True,
        )
        known = {item.name for item in fields(EngineArgs)}  # a setting that an older vLLM lacks, it does not need
        arguments = {name: value for name, value in arguments.items() if name in known}
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self.sleeps = settings.sleep and on_gpu

    # -- generation --------------------------------------------------------------------------------------------------

    def add(self, index: int, key: str, ids: list[int], images: list, videos: list, sampling: dict[str, Any]) -> int:
        """Queue all samples of a prompt; returns the expanded prompt's length.  Raises BadPrompt.

        ids: vision blocks with one pad each; images uint8 [H, W, 3], videos uint8 [frames, H, W, 3], resized already.
        """
        media = {name: items for name, items in (("image", images), ("video", videos)) if items}
        prompt = {"prompt_token_ids": ids} | ({"multi_modal_data": media} if media else {})
        renderer = self.engine.renderer
        try:
            parsed = parse_model_prompt(self.engine.model_config, prompt)
            (rendered,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)
            for number in range(sampling["num_generations"]):
                self.engine.add_request(f"{index}/{number}", rendered, _parameters(key, number, sampling))
        except Exception as error:  # vLLM, the processors and torch have no common type for what is wrong with input
            raise BadPrompt(f"{type(error).__name__}: {error}") from error
        return len(rendered["prompt_token_ids"])

    def run(self, keep_on: Callable[[], bool]) -> Iterator[list[Sample]]:
        """Generate what is queued; yields responses as they end.  When `keep_on` says no, the rest is dropped."""
        try:
            while self.engine.has_unfinished_requests() and keep_on():
                finished = [_sample(output) for output in self.engine.step() if output.finished]
                if finished:
                    yield finished
        finally:
            self.drop()

    def drop(self) -> None:
        """Forget all requests."""
        waiting = list(self.engine.output_processor.request_states)
        self.engine.abort_request(waiting, internal=True)

    # -- weights -----------------------------------------------------------------------------------------------------

    def call(self, method: str, *arguments: Any) -> Any:
        """A WorkerExtension method on every worker; the first worker's answer."""
        return self.engine.collective_rpc(method, args=arguments)[0]

    def forget(self) -> None:
        """Drop what was computed under earlier weights: the prefix cache, and vision features by picture."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    # -- memory ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give back the GPU's memory, weights included: they come anew with the next update."""
        if self.sleeps:
            self.engine.sleep(2)

    def wake(self, what: str) -> None:
        """what: "weights" before an update, "kv_cache" after it."""
        if self.sleeps:
            self.engine.wake_up([what])


def _parameters(key: str, number: int, sampling: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=sampling["temperature"],
        top_p=1.0,
        top_k=0,
        max_tokens=sampling["max_completion_length"],
        stop_token_ids=sampling["stop_ids"],
        ignore_eos=True,  # the tokenizer's end is a stop only where stop_ids say so
        seed=sample_seed(sampling["seed"], key, number),
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(output: Any) -> Sample:
    index, _, number = output.request_id.partition("/")
    completion = output.outputs[0]
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    return Sample(
        request=int(index),
        number=int(number),
        token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        finish_reason=str(completion.finish_reason),
    )
