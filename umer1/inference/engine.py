"""A loaded model on this rank and what it takes to run it: forward passes through tensor- and pipeline-parallel ranks.

All ranks of one copy of the model make the same calls with the same arguments.  Every result comes back on each of
them, except hidden states, which only the last pipeline stage has (None elsewhere).
"""

import json
from dataclasses import dataclass

import umer1.megatron_import  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from umer1 import device as devices
from umer1.checkpoints.source import load_model_weights, open_model
from umer1.data.images import ImageConfig
from umer1.data.input_settings import settle_inputs
from umer1.data.processor import Processor
from umer1.data.schema import Sequence
from umer1.distributed.parallel import ParallelConfig, ParallelState, launched_world_size
from umer1.errors import ConfigError
from umer1.inference.sampling import choose
from umer1.models.attention import KVCache
from umer1.models.embedding import read_embedding
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.model import Qwen2VL, build_model
from umer1.rules import bound_problems


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """Which model runs, in which precision and layout, under which limits"""

    model: str | None = None
    """Hugging Face Qwen2-VL directory, or a checkpoint of umer1 (a --save directory or one iter_* in it)."""
    fp32: bool = False
    """fp32 weights and arithmetic (the default without a GPU)."""
    bf16: bool = False
    """bf16 weights and arithmetic (the default on a GPU)."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Ranks that the decoder's layers are cut into; processes beyond both sizes work on other inputs."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline rank, for an uneven split."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline rank, for an uneven split."""
    distributed_timeout_minutes: int = 60
    """Minutes after which a collective that some rank did not join ends the run."""
    max_input_tokens: int = 12288
    """Prompts longer than this are bad inputs."""
    max_tokens_per_batch: int = 16384
    """Prompt tokens that go through the model at once (a longer prompt goes alone)."""
    max_patches_per_batch: int = 65536
    """Image patches that go through the ViT at once (an image with more goes alone)."""
    kv_cache_gib: float = 8.0
    """Memory for keys and values during generation, per process."""
    min_pixels: int | None = None
    """Fewest pixels of an image after resizing; unset: as the model's directory says."""
    max_pixels: int | None = None
    """Most pixels of an image after resizing; unset: as the model's directory says."""
    video_min_pixels: int | None = None
    """Fewest pixels of a video frame after resizing; unset: as the model's directory says."""
    video_max_pixels: int | None = None
    """Most pixels of a video frame after resizing; unset: as the model's directory says."""
    num_frames: int | None = None
    """Frames that are taken from a video file, or from a folder of frames (MMEB-V2, annotate), evenly spaced; lists of
    frames in an input are taken as they are.  Unset: as the model's directory says, else 8."""
    blank_image_for_text: bool | None = None
    """Give every input without media a 28 x 28 white image, as upstream does.  Unset: as the model's directory says,
    else off."""

    def violations(self) -> list[str]:
        found = [] if self.model else ["--model is required"]
        if self.fp32 and self.bf16:
            found.append("fp32 and bf16 are both set; choose one")
        found += bound_problems(
            self, 1, "max_input_tokens", "max_tokens_per_batch", "max_patches_per_batch", "num_frames"
        )
        if not 0 < self.kv_cache_gib < float("inf"):
            found.append(f"kv_cache_gib={self.kv_cache_gib} must be a finite number above 0")
        return found + self.parallel().violations(world_size=launched_world_size())

    @property
    def dtype(self) -> torch.dtype:
        if self.fp32 or self.bf16:
            return torch.float32 if self.fp32 else torch.bfloat16
        return devices.default_dtype()

    def parallel(self) -> ParallelConfig:
        """The layout; sequence parallelism would save nothing where no activations are kept."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            decoder_first_pipeline_num_layers=self.decoder_first_pipeline_num_layers,
            decoder_last_pipeline_num_layers=self.decoder_last_pipeline_num_layers,
            distributed_timeout_minutes=self.distributed_timeout_minutes,
        )


def open_directory(config: EngineConfig) -> HFDirectory:
    """Configuration and tokenizer of the model; ConfigError when the layout does not fit it."""
    directory = open_model(config.model)
    problems = config.parallel().violations(directory.config, launched_world_size())
    if problems:
        raise ConfigError(problems)
    return directory


def make_processor(config: EngineConfig, directory: HFDirectory) -> Processor:
    """The processor of the model's directory under the bounds of `config`, whose open settings are filled in."""
    settle_inputs(config, directory)
    return Processor(
        directory.tokenizer,
        directory.special,
        directory.config,
        ImageConfig.of_directory(directory, config),
        max_length=config.max_input_tokens,
        blank_image_for_text=config.blank_image_for_text,
    )


def load_engine(config: EngineConfig, directory: HFDirectory, processor: Processor, state: ParallelState) -> "Engine":
    """Build this rank's part of the model and fill it."""
    model = build_frozen_model(directory.config, config.parallel(), state, config.dtype)
    load_model_weights([model], config.model, directory, state)
    return Engine(model, directory, processor, state, config)


def build_frozen_model(
    config: Qwen2VLConfig, parallel: ParallelConfig, state: ParallelState, dtype: torch.dtype
) -> Qwen2VL:
    """This rank's part of a model that is never trained, weights zero; `parallel` has no virtual stages."""
    # A trainer in this process may have virtual stages; megatron keeps their number in one global.
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    (model,) = build_model(config, parallel, state, params_dtype=dtype)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    return model.eval().requires_grad_(False)


class Engine:
    """See the module's docstring.  `stop_ids`: tokens that end a response."""

    def __init__(
        self,
        model: Qwen2VL,
        directory: HFDirectory,
        processor: Processor,
        state: ParallelState,
        config: EngineConfig,
    ):
        self.model, self.processor, self.state, self.config = model, processor, state, config
        self.model_config, self.special, self.tokenizer = directory.config, directory.special, directory.tokenizer
        self.dtype = next(model.decoder.parameters()).dtype
        self.stop_ids = np.array(sorted(_stop_ids(directory)))
        rows = self.model_config.padded_vocab_size(state.tp_size)
        self._unused = torch.ones(rows, dtype=torch.bool)  # rows of the table that no token has
        self._unused[list(self.tokenizer.get_vocab(with_added_tokens=True).values())] = False
        self._unused = self._unused.to(state.device)
        layers = -(-self.model_config.num_layers // state.pp_size)
        heads = self.model_config.num_query_groups // state.tp_size
        token_bytes = 2 * layers * heads * self.model_config.head_dim * self.dtype.itemsize
        self.max_cache_tokens = int(config.kv_cache_gib * 2**30) // token_bytes

    def decode_text(self, token_ids: list[int]) -> str:
        """Text of a response, special tokens included."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    # -- prompts and teacher-forced sequences ------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(self, sequences: list[Sequence], rows: list[int]) -> np.ndarray:
        """Embeddings float32 [S, H], L2-normalised, of `sequences` at their token rows `rows`."""
        found = torch.zeros(len(sequences), self.model_config.hidden_size, device=self.state.device)
        for batch in self._micro_batches(sequences):
            hidden, starts = self._forward([sequences[i] for i in batch])
            if hidden is not None:
                places = torch.tensor([start + rows[i] for start, i in zip(starts, batch, strict=True)])
                found[batch] = read_embedding(hidden, places.to(hidden.device))
        return self.from_last_stage(found).cpu().numpy()

    def _micro_batches(self, sequences: list[Sequence]) -> list[list[int]]:
        """Positions in `sequences`, in order, in groups under the budgets of tokens and patches."""
        batches: list[list[int]] = []
        tokens = patches = 0
        for index, sequence in enumerate(sequences):
            tokens += len(sequence)
            patches += len(sequence.pixel_values)
            over = tokens > self.config.max_tokens_per_batch or patches > self.config.max_patches_per_batch
            if over or not batches:
                batches.append([])
                tokens, patches = len(sequence), len(sequence.pixel_values)
            batches[-1].append(index)
        return batches

    def _forward(
        self, sequences: list[Sequence], cache: KVCache | None = None
    ) -> tuple[torch.Tensor | None, list[int]]:
        """(hidden states [T, H] of the packed sequences on the last stage, each one's first row)."""
        lengths = [len(sequence) for sequence in sequences]
        bounds = np.cumsum([0, *lengths])
        vision = {}
        if self.state.is_first_stage and any(len(sequence.grid_thw) for sequence in sequences):
            vision["pixel_values"] = torch.cat([s.pixel_values for s in sequences]).to(self.state.device)
            vision["grid_thw"] = torch.cat([s.grid_thw for s in sequences]).to(self.state.device)
        if self.state.is_first_stage:
            vision["vision_rows"] = self._vision_rows(sequences, bounds).to(self.state.device)
        hidden = self._run(
            torch.cat([sequence.input_ids for sequence in sequences]),
            torch.cat([sequence.position_ids for sequence in sequences], dim=1),
            torch.from_numpy(bounds.astype(np.int32)),
            max(lengths),
            cache,
            **vision,
        )
        return hidden, bounds[:-1].tolist()

    def _vision_rows(self, sequences: list[Sequence], bounds: np.ndarray) -> torch.Tensor:
        """int64 [n]: the rows of the packed sequences that pictures fill; pads in a response are no spans."""
        pads = torch.tensor([self.special.image_pad, self.special.video_pad])
        rows = [torch.isin(s.input_ids[: s.prompt_length], pads).nonzero().flatten() for s in sequences]
        return torch.cat([found + int(start) for found, start in zip(rows, bounds[:-1], strict=True)])

    def _run(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        cache: KVCache | None,
        **vision: torch.Tensor,
    ) -> torch.Tensor | None:
        """One forward pass through all stages: hidden states [T, H] on the last one."""
        state = self.state
        if not state.is_first_stage:
            shape = (input_ids.numel(), 1, self.model_config.hidden_size)
            received = torch.empty(shape, dtype=self.dtype, device=state.device)
            dist.recv(received, src=dist.get_global_rank(state.groups.pp, state.pp_rank - 1), group=state.groups.pp)
            self.model.set_input_tensor(received)
        output = self.model(
            input_ids.to(state.device),
            position_ids.to(state.device),
            cu_seqlens.to(state.device),
            max_seqlen,
            cache=cache,
            **vision,
        )
        if state.is_last_stage:
            return output
        next_rank = dist.get_global_rank(state.groups.pp, state.pp_rank + 1)
        dist.send(output.contiguous(), dst=next_rank, group=state.groups.pp)
        return None

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as the last pipeline stage has them, on every stage (in place)."""
        if self.state.pp_size > 1:
            dist.broadcast(values, src=self.state.last_stage_rank, group=self.state.groups.pp)
        return values

    # -- generation --------------------------------------------------------------------------------------------------

    def prefill(self, prompts: list[Sequence], capacity: int) -> tuple[KVCache, torch.Tensor | None, torch.Tensor]:
        """Run prompts into a new cache of `capacity` tokens each.

        Returns the cache, the last token's hidden state of each prompt [N, H] (last stage) and the disc embeddings
        float32 [N, H].
        """
        cache = self.model.new_cache(len(prompts), capacity)
        disc = torch.zeros(len(prompts), self.model_config.hidden_size, device=self.state.device)
        last = []
        for batch in self._micro_batches(prompts):
            part = cache.part(batch[0], batch[-1] + 1)
            hidden, starts = self._forward([prompts[i] for i in batch], part)
            cache.extend(part, batch[0])
            if hidden is not None:
                places = torch.tensor(starts, device=hidden.device)
                rows = torch.tensor([prompts[i].disc_index for i in batch], device=hidden.device)
                disc[batch] = read_embedding(hidden, places + rows)
                lengths = torch.tensor([len(prompts[i]) for i in batch], device=hidden.device)
                last.append(hidden.index_select(0, places + lengths - 1))
        return cache, torch.cat(last) if last else None, self.from_last_stage(disc)

    def decode(self, tokens: np.ndarray, positions: np.ndarray, cache: KVCache) -> torch.Tensor | None:
        """Feed one token to each cached sequence: hidden states [N, H] on the last stage.

        `tokens` and `positions` int64 [N]; text advances all three M-RoPE axes together.
        """
        count = len(tokens)
        bounds = torch.arange(count + 1, dtype=torch.int32)
        return self._run(torch.from_numpy(tokens), torch.from_numpy(positions).expand(3, -1), bounds, 1, cache)

    def choose(
        self, hidden: torch.Tensor | None, temperatures: np.ndarray, uniforms: np.ndarray, top_p: float
    ) -> np.ndarray:
        """Next tokens int64 [N], the same on every rank; `hidden` [N, H] on the last stage, None elsewhere.

        Rows of the table that no token has are never chosen.
        """
        chosen = torch.zeros(len(temperatures), dtype=torch.int64, device=self.state.device)
        if hidden is not None:
            logits = self._all_logits(hidden).masked_fill_(self._unused, torch.finfo(torch.float32).min)
            heat = torch.from_numpy(temperatures).to(self.state.device)
            chosen = choose(logits, heat, torch.from_numpy(uniforms).to(self.state.device), top_p)
        return self._from_one_rank(chosen, hidden is not None).cpu().numpy()

    def sample(
        self, hidden: torch.Tensor | None, temperatures: np.ndarray, uniforms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Next tokens int64 [N] from the model's whole vocabulary and their log-probs float32 [N]; as `choose`.

        A log-prob is that of the softmax of the raw logits / temperature.  Temperature 0 takes the likeliest token,
        with its log-prob at 1.
        """
        state = self.state
        # One fp64 tensor for both, so that they travel together: token ids are exact in it.
        drawn = torch.zeros(2, len(temperatures), dtype=torch.float64, device=state.device)
        if hidden is not None:
            logits = self._all_logits(hidden)[:, : self.model_config.vocab_size]
            heat = torch.from_numpy(temperatures).to(state.device)
            chosen = choose(logits, heat, torch.from_numpy(uniforms).to(state.device), 1.0)
            scaled = logits / heat.masked_fill(heat == 0, 1.0)[:, None]
            drawn[0] = chosen
            drawn[1] = scaled.gather(1, chosen[:, None]).squeeze(1) - scaled.logsumexp(dim=1)
        tokens, logprobs = self._from_one_rank(drawn, hidden is not None).cpu().numpy()
        return tokens.astype(np.int64), logprobs.astype(np.float32)

    def _from_one_rank(self, values: torch.Tensor, is_last_stage: bool) -> torch.Tensor:
        """`values` as the first tensor-parallel rank of the last stage has them, everywhere (in place).

        A running sum on a GPU may round differently from call to call: one rank decides.
        """
        if is_last_stage and self.state.tp_size > 1:
            dist.broadcast(values, src=dist.get_global_rank(self.state.groups.tp, 0), group=self.state.groups.tp)
        return self.from_last_stage(values)

    def _all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, padded vocabulary], gathered over the tensor-parallel ranks."""
        logits = self.model.logits(hidden).float()
        if self.state.tp_size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.state.tp_size)]
        dist.all_gather(parts, logits.contiguous(), group=self.state.groups.tp)
        return torch.cat(parts, dim=-1)


def _stop_ids(directory: HFDirectory) -> set[int]:
    """`<|im_end|>` and what generation_config.json names as ends."""
    listed = json.loads(directory.assets.get("generation_config.json", "{}")).get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    return {directory.special.im_end, *(token for token in listed if isinstance(token, int))}
