"""Gen mode with vLLM: it writes the responses, umer1's own engine reads all their states in one batched forward.

One vLLM engine in a child of each process (umer1/rl/engines), filled with the weights that umer1's engine holds.
"""

import time
from dataclasses import replace
from pathlib import Path

from umer1 import device
from umer1.data.media import MediaRoot
from umer1.data.schema import Prompt, Sequence
from umer1.errors import UserError
from umer1.inference.embedders import Embedded, mean_embedding, response_line, videos
from umer1.inference.engine import Engine, make_processor
from umer1.inference.generate import GenerationConfig, Response
from umer1.inference.inputs import Input
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.config import RolloutConfig
from umer1.rl.engines.vllm_assets import check_positions
from umer1.rl.engines.vllm_engine import VLLMEngine
from umer1.rl.types import Completion, EngineDied, Request, Sampling
from umer1.rl.weight_sync import WeightSync

_LOAD_SECONDS = 600.0  # for all weights, once


class VLLMEmbedder:
    """An Embedder; see the module's docstring.  Construction is collective: every rank starts its engine.

    timeout_seconds: for one batch.  gpu_memory: the share of a GPU's memory that vLLM may take.  log_path: where the
    child's output goes.
    """

    def __init__(
        self,
        engine: Engine,
        directory: HFDirectory,
        generation: GenerationConfig,
        *,
        timeout_seconds: float,
        gpu_memory: float,
        log_path: Path,
    ):
        self.engine, self.generation, self.directory = engine, generation, directory
        # a prompt of the longest kind, the response, and the <gen_emb> that closes it
        longest = engine.config.max_input_tokens + generation.max_new_tokens + 1
        parts = engine.config.max_input_tokens, generation.max_new_tokens
        check_positions(directory, longest, "--max-input-tokens {} + --max-new-tokens {} + 1".format(*parts))
        self.reader = make_processor(replace(engine.config, max_input_tokens=longest), directory)
        self.stop_ids = tuple(engine.stop_ids.tolist())
        if generation.stop_at_gen_emb:
            self.stop_ids += (engine.special.gen_emb,)
        settings = RolloutConfig(
            rollout_max_sequences=generation.max_sequences,
            rollout_gpu_memory_utilization=gpu_memory,
            rollout_timeout_seconds=timeout_seconds,
        )
        self.client = VLLMEngine(
            settings,
            directory,
            dtype=engine.dtype,
            max_model_len=longest,
            rank=engine.state.rank,
            local_rank=device.local_rank(),
            log_path=log_path,
            image_config=engine.processor.image_config,
        )
        try:
            WeightSync(self.client, engine.state, _LOAD_SECONDS)([engine.model])
        except EngineDied as error:
            self.close()
            raise UserError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def prepare(self, item: Input, media: MediaRoot | None) -> Prompt:
        return self.engine.processor.encode_rollout_prompt(item.text, item.images, videos(item), media)

    def embed(self, items: list[Input], prompts: list[Prompt]) -> list[Embedded]:
        requests = [Request(item.id, prompt) for item, prompt in zip(items, prompts, strict=True)]
        sampling = Sampling(
            num_generations=self.generation.mean_of_samples,
            max_completion_length=self.generation.max_new_tokens,
            temperature=self.generation.temperature,
            stop_ids=self.stop_ids,
            seed=self.generation.generation_seed,
        )
        begin = time.monotonic()
        try:
            answers = self.client.generate(requests, sampling, lambda: False)
        except EngineDied as error:
            raise UserError(str(error)) from None
        lost = [item.id for item, completions in zip(items, answers, strict=True) if None in completions]
        if lost:
            raise UserError(
                f"vLLM gave no response to {len(lost)} of {len(items)} inputs in {time.monotonic() - begin:.0f} s, "
                f"{lost[0]} among them; the engine's log is {self.client.log_path}"
            )
        responses = [[self.response(completion) for completion in completions] for completions in answers]
        rows, sequences = zip(
            *(self._read(prompt, one) for prompt, several in zip(prompts, responses, strict=True) for one in several),
            strict=True,
        )
        states = iter(self.engine.embed(list(sequences), list(rows)))
        found = []
        for item, several in zip(items, responses, strict=True):
            error = self.generation.missing_gen_emb == "error" and any(one.missing_gen_emb for one in several)
            mean = mean_embedding([next(states) for _ in several])
            found.append((None if error else mean, response_line(self.engine, item.id, several)))
        return found

    def response(self, completion: Completion) -> Response:
        """A completion in the words of umer1's own generation: without its end, closed by the policy."""
        tokens, gen_emb = list(completion.token_ids), self.engine.special.gen_emb
        reason = "length"
        if tokens and tokens[-1] in self.engine.stop_ids:
            tokens.pop()
            reason = "im_end"
        elif self.generation.stop_at_gen_emb and gen_emb in tokens:
            reason = "gen_emb"
        missing, generated = gen_emb not in tokens, len(tokens)
        if missing and self.generation.missing_gen_emb == "append":
            tokens.append(gen_emb)
        return Response(tokens, generated, missing, reason, embedding=None)

    def _read(self, prompt: Prompt, response: Response) -> tuple[int, Sequence]:
        """(the row that is read, the whole sequence): the last `<gen_emb>`, or `<disc_emb>` where there is none."""
        sequence = self.reader.encode_response(prompt.sequence, response.token_ids)
        return (sequence.gen_index if sequence.gen_index >= 0 else sequence.disc_index), sequence

    def close(self) -> None:
        """End the child; may be called twice."""
        self.client.close()
