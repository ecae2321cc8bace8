"""Qwen2-VL on megatron-core: packed sequences in, hidden states after the final norm out.

Logits are made by a call of their own for the rows that need them, never for all rows.  One `Qwen2VL` is one pipeline
stage (one virtual stage with interleaving); `build_model` makes those of this process.
"""

import copy
from collections.abc import Callable
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch.nn.functional import pad

from umer1.distributed import megatron_cpu
from umer1.distributed.parallel import ParallelConfig, ParallelState
from umer1.errors import ConfigError
from umer1.models.attention import KVCache, PackedSequences, SDPAPlan, packed_sequences
from umer1.models.backend import CoreAttentionName, block_submodules, uses_te_attention
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.frames import VisionFeatures
from umer1.models.qwen2_vl.head import VocabularyHead
from umer1.models.qwen2_vl.megatron_config import decoder_config, vision_config
from umer1.models.qwen2_vl.vision import VisionTower

# In slots that only fill up the sequence-parallel ranks; megatron's tensor-parallel embedding gives zeros for it.
NO_TOKEN = -1


class Qwen2VL(LanguageModule):
    """One pipeline stage.  T: packed token slots, S: sequences, H: hidden size, R: rows."""

    def __init__(
        self,
        model_config: Qwen2VLConfig,
        parallel: ParallelConfig,
        state: ParallelState,
        *,
        params_dtype: torch.dtype,
        core_attention: CoreAttentionName = "auto",
        vp_stage: int | None = None,
        fp8: FP8Config | None = None,
    ):
        config = decoder_config(model_config, parallel, params_dtype, fp8)
        super().__init__(config, pg_collection=state.groups)
        self.model_type = ModelType.encoder_or_decoder  # asked for by the schedules
        self.model_config = model_config
        self.vp_stage = vp_stage
        last_virtual = (config.virtual_pipeline_model_parallel_size or 1) - 1
        self.pre_process = state.is_first_stage and vp_stage in (None, 0)
        self.post_process = state.is_last_stage and vp_stage in (None, last_virtual)
        self.share_embeddings_and_output_weights = model_config.tie_word_embeddings
        self.te_attention = uses_te_attention(core_attention, params_dtype)
        padded_vocab = model_config.padded_vocab_size(state.tp_size)
        self.local_vocab = padded_vocab // state.tp_size
        # Rows of the vocabulary that this rank's shard really holds; the rest is padding.
        self.real_local_vocab = min(
            max(model_config.vocab_size - state.tp_rank * self.local_vocab, 0), self.local_vocab
        )
        if self.pre_process:
            vision = vision_config(model_config, parallel, params_dtype)
            self.vision = VisionTower(vision, model_config.vision, state, core_attention)
            self.embedding = LanguageModelEmbedding(
                config,
                padded_vocab,
                max_sequence_length=0,
                position_embedding_type="rope",
                # Vision features are put in place while all rows are on every rank.
                scatter_to_sequence_parallel=False,
                tp_group=state.groups.tp,
            )
        num_layers = get_num_layers_to_build(config, vp_stage, state.pp_rank)
        submodules = block_submodules(
            config, num_layers, causal=True, final_norm=self.post_process, core_attention=core_attention
        )
        self.decoder = TransformerBlock(
            config,
            submodules,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=state.groups,
            vp_stage=vp_stage,
        )
        for number, layer in enumerate(self.decoder.layers):
            layer.self_attention.core_attention.cache_layer = number
        if self.post_process:
            self.output_layer = VocabularyHead(
                config.hidden_size,
                padded_vocab,
                config=_of_the_head(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=state.groups.tp,
            )
        self.register_buffer("rotary_frequencies", _rotary_frequencies(model_config).to(state.device), persistent=False)
        self.register_buffer("rotary_axes", _rotary_axes(model_config).to(state.device), persistent=False)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor) -> None:
        """What the schedule received from the stage before ([T / tp if sequence-parallel, 1, H])."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def set_trainable(self, train_vision: bool) -> None:
        """Freeze or free the ViT's blocks and patch embedding; the merger is trained either way."""
        if self.pre_process:
            for part in (self.vision.patch_embed, self.vision.decoder):
                part.requires_grad_(train_vision)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        *,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        vision_rows: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Hidden states of packed sequences.

        `input_ids` int64 [T], `position_ids` int64 [3, T], `cu_seqlens` int32 [S + 1] bounds the sequences.  Vision
        tokens take, in order, the rows made of `vision_features` or of `pixel_values` with `grid_thw`, both as
        `vision_forward` has them.  With a cache: see KVCache.

        `vision_rows` int64 [P / merge**2], ascending: the rows of `input_ids` that take them.  Without it every image
        and video pad does; pads that a policy sampled are no spans, so packed responses need it.  ValueError when the
        number of rows is not what the pixels make.

        Last stage: states after the final norm [T, H], complete on every tensor-parallel rank; their gradient must be
        the same on all of them.  Other stages: what the next one needs, [T (/ tp if sequence-parallel), 1, H].
        """
        tokens = position_ids.shape[1]
        # Sequence parallelism cuts rows equally over ranks; the filling is a sequence of its own and cut off again.
        filling = -tokens % self.tp_group.size() if self.config.sequence_parallel else 0
        packed = self._packed(position_ids, cu_seqlens, max_seqlen, filling, cache)
        hidden = None
        if self.pre_process:
            if vision_features is None and grid_thw is not None and len(grid_thw):
                vision_features = self.vision_forward(pixel_values, grid_thw)
            # A response may hold vision tokens that the model sampled: they are no spans and take no features.
            decoding = cache is not None and cache.longest > 0
            if vision_rows is None and not decoding:
                vision_rows = self._vision_rows(input_ids)
            hidden = self._embed(pad(input_ids, (0, filling), value=NO_TOKEN), vision_features, vision_rows)
        hidden = self.decoder(hidden, None, packed_seq_params=packed)
        if cache is not None:
            cache.advance(cu_seqlens, max_seqlen)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden.squeeze(1)[:tokens]

    def vision_forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> VisionFeatures:
        """Features before the merger; without a graph when the ViT is frozen.  First stage only.

        `pixel_values` [P, patch_dim] of pictures `grid_thw` int64 [V, 3]: of all, or only of the frames that are this
        rank's share (`Frames.own`).
        """
        frozen, frames = not self.vision.patch_embed.weight.requires_grad, self.vision.frames(grid_thw)
        own, grids = frames.own(pixel_values), frames.grids_of(frames.rank)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            rows = self.vision(own, grids)
        return VisionFeatures(rows.detach() if frozen or not torch.is_grad_enabled() else rows, frames)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel logits [R, V_padded / tp] of hidden rows [R, H].  Last stage only.

        Padded vocabulary has the lowest finite logit, so that a softmax over all ranks is that of the real one.  The
        gradient of `rows` comes complete on every tensor-parallel rank.
        """
        logits, _ = self.output_layer(rows, weight=self._shared_weight())
        if self.real_local_vocab < self.local_vocab:
            logits[:, self.real_local_vocab :] = torch.finfo(logits.dtype).min
        return logits

    def through_head(self, operation: Callable, rows: torch.Tensor, *args: Any, **options: Any) -> Any:
        """operation(rows [R, H], the head's weight [V_padded / tp, H], *args, vocab_size=, group=, **options).

        For operations of umer1.ops that never make all logits.  Last stage only.
        """
        vocabulary = dict(vocab_size=self.model_config.vocab_size, group=self.tp_group)
        return self.output_layer(
            rows,
            weight=self._shared_weight(),
            operation=lambda rows, weight: operation(rows, weight, *args, **vocabulary, **options),
        )

    def new_cache(self, num_sequences: int, capacity: int) -> KVCache:
        """An empty cache for this stage's layers and this rank's heads."""
        weight = next(self.decoder.parameters())
        return KVCache(
            len(self.decoder.layers),
            num_sequences,
            capacity,
            self.config.num_query_groups // self.tp_group.size(),
            self.config.kv_channels,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _shared_weight(self) -> torch.Tensor | None:
        """The embedding's weight where the head has none of its own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _packed(
        self, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, filling: int, cache: KVCache | None
    ) -> PackedSequences:
        tokens = position_ids.shape[1]
        # [T, head_dim / 2]: each frequency turns with its section's axis.
        angles = pad(position_ids, (0, filling))[self.rotary_axes].t().float() * self.rotary_frequencies
        if cache is not None:
            plan, slots = cache.plan(cu_seqlens, max_seqlen, tokens), cache.slots(cu_seqlens, tokens)
            return packed_sequences(cu_seqlens, max_seqlen, angles, plan=plan, cache=cache, slots=slots)
        if filling:
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + filling])
            max_seqlen = max(max_seqlen, filling)
        plan = None if self.te_attention else SDPAPlan(cu_seqlens, causal=True)
        return packed_sequences(cu_seqlens, max_seqlen, angles, plan=plan)

    def _vision_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [n]: the image and video pads among [T]."""
        ids = self.model_config
        return ((input_ids == ids.image_token_id) | (input_ids == ids.video_token_id)).nonzero().flatten()

    def _embed(
        self, input_ids: torch.Tensor, vision_features: VisionFeatures | None, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """[T] -> [T (/ tp if sequence-parallel), 1, H], vision features in place at `rows`; None: there are none."""
        hidden = self.embedding(input_ids.unsqueeze(0), None)
        merge = self.model_config.vision.spatial_merge_size
        count = 0 if vision_features is None else int(vision_features.frames.sizes.sum()) // merge**2
        if (0 if rows is None else rows.numel()) != count:
            raise ValueError(f"{0 if rows is None else rows.numel()} vision tokens, but the pixels make {count}")
        if count:
            merged = self.vision.merge(vision_features)
            hidden = hidden.squeeze(1).index_copy(0, rows, merged.to(hidden.dtype)).unsqueeze(1)
        if torch.is_grad_enabled() and not (count and len(vision_features.rows)):
            hidden = hidden + self._no_vision()
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden

    def _no_vision(self) -> torch.Tensor:
        """A zero that every trained vision parameter has a part in.

        megatron's overlapped gradient reduction waits for a gradient of every parameter; a micro-batch without images
        must give one too, and so must a rank that none of them is for.
        """
        trained = [parameter.flatten()[:1] for parameter in self.vision.parameters() if parameter.requires_grad]
        return 0.0 * torch.cat(trained).sum() if trained else torch.zeros(())


def _of_the_head(config):
    """The head's configuration: it works on chosen rows, which every tensor-parallel rank holds in full.

    Its weight's gradient comes through autograd, for the operations that stand for its product know no buffer.
    """
    config = copy.copy(config)
    config.sequence_parallel = config.gradient_accumulation_fusion = False
    return config


def _rotary_frequencies(config: Qwen2VLConfig) -> torch.Tensor:
    """fp32 [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_theta**exponents


def _rotary_axes(config: Qwen2VLConfig) -> torch.Tensor:
    """int64 [head_dim / 2]: the position axis (0 time, 1 height, 2 width) of each frequency."""
    sections = [torch.full((size,), number % 3) for number, size in enumerate(config.mrope_section)]
    return torch.cat(sections)


def build_model(
    config: Qwen2VLConfig,
    parallel_config: ParallelConfig,
    parallel_state_: ParallelState,
    *,
    params_dtype: torch.dtype,
    core_attention: CoreAttentionName = "auto",
    fp8: FP8Config | None = None,
) -> list[Qwen2VL]:
    """This process's pipeline stages, one per virtual stage, in order; not wrapped in DDP, weights zero until loaded.

    Raises ConfigError when the model can't be laid out so.
    """
    problems = parallel_config.violations(config, parallel_state_.world_size)
    if problems:
        raise ConfigError(problems)
    megatron_cpu.enable()
    virtual = parallel_config.virtual_pipeline_size(config.num_layers)
    # megatron's interleaved schedule asks this global; the number of layers was not known when groups were made.
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    stages = range(virtual) if virtual else [None]
    return [
        Qwen2VL(
            config,
            parallel_config,
            parallel_state_,
            params_dtype=params_dtype,
            core_attention=core_attention,
            vp_stage=stage,
            fp8=fp8,
        )
        for stage in stages
    ]
