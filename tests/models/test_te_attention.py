"""What Transformer Engine's attention is handed by both transformers: a stand-in that asks for what its API asks for.

The stand-in is called as megatron-core 0.16.1's TEDotProductAttention, which turns causal into padding_causal and
no_mask into padding for packed sequences, and checks what TE's DotProductAttention checks of them and what its kernels
take on trust: that `cu_seqlens` bounds every token and that no segment is longer than `max_seqlen`.
"""

import umer1.megatron_import  # noqa: F401

import pytest
import qwen2_vl_reference as reference
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.enums import AttnMaskType

from umer1 import device
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models import backend
from umer1.models.qwen2_vl import model as model_module
from umer1.models.qwen2_vl import vision as vision_module
from umer1.models.qwen2_vl.megatron_config import decoder_config, vision_config
from umer1.models.qwen2_vl.model import build_model
from umer1.testing import assert_close, run_distributed


class StandInTEDotProductAttention(torch.nn.Module):
    """Attention segment by segment, without any plan of ours."""

    calls: list[tuple[str, int]] = []

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection
    ):
        super().__init__()
        assert attention_type == "self" and softmax_scale is None and hasattr(pg_collection, "tp")
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask) and layer_number >= 1
        self.mask_type, self.head_dim = attn_mask_type, config.kv_channels

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        packed = packed_seq_params
        assert packed.qkv_format == "thd" and query.dim() == key.dim() == value.dim() == 3
        assert attn_mask_type == self.mask_type and attention_mask is attention_bias is None
        bounds = packed.cu_seqlens_q
        assert torch.equal(bounds, packed.cu_seqlens_kv) and bounds.dtype == torch.int32 and bounds.dim() == 1
        assert packed.cu_seqlens_q_padded is packed.cu_seqlens_kv_padded is packed.cp_group is None
        assert bounds[0] == 0 and bounds[-1] == query.shape[0] == key.shape[0]
        assert packed.max_seqlen_q == packed.max_seqlen_kv >= int(bounds.diff().max())
        assert isinstance(packed.max_seqlen_q, int)
        self.calls.append((self.mask_type.name, len(bounds) - 1))
        parts = []
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            scores = q @ k.transpose(1, 2) / self.head_dim**0.5
            if self.mask_type == AttnMaskType.causal:
                later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            parts.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return torch.cat(parts)


def _hidden_and_gradients(state, parallel, config, weights, batch):
    (ours,) = build_model(config, parallel, state, params_dtype=torch.float32)
    cut = dict(tp_rank=state.tp_rank, tp_size=state.tp_size, whole_vision=parallel.vision_data_parallel)
    reference.copy_weights([ours], weights, config, **cut)
    hidden = ours(**batch)
    hidden.square().sum().backward()
    return hidden, {name: parameter.grad for name, parameter in ours.named_parameters()}


def compare(layout):
    """One rank: the model with the stand-in's attention has the states and gradients of the one with SDPA."""
    name = next(iter(reference.CONFIGS))
    theirs, config = reference.reference_model(name), reference.our_config(name)
    weights, parallel = reference.hf_tensors(theirs), ParallelConfig(**layout)
    batch = reference.pack(reference.sequences(config))
    with pytest.MonkeyPatch.context() as patch, init_distributed(parallel, seed=1) as state:
        want, gradients = _hidden_and_gradients(state, parallel, config, weights, batch)
        patch.setattr(transformer_engine, "TEDotProductAttention", StandInTEDotProductAttention)
        for module in (backend, model_module, vision_module):
            patch.setattr(module, "uses_te_attention", lambda core_attention, dtype: True)
        StandInTEDotProductAttention.calls = []
        got, got_gradients = _hidden_and_gradients(state, parallel, config, weights, batch)
    assert_close("hidden", got, want, rtol=1e-5)
    for name, gradient in gradients.items():
        assert_close(name, got_gradients[name], gradient, rtol=2e-5)
    kinds = [kind for kind, _ in StandInTEDotProductAttention.calls]
    filling = -len(batch["input_ids"]) % parallel.tensor_model_parallel_size if parallel.sequence_parallel else 0
    sequences = len(batch["cu_seqlens"]) - 1 + (filling > 0)
    assert kinds.count("no_mask") == config.vision.depth  # each rank has pictures of its own to see
    assert kinds.count("causal") == config.num_layers
    assert {count for kind, count in StandInTEDotProductAttention.calls if kind == "causal"} == {sequences}


def test_both_transformers_hand_over_packed_sequences():
    compare({})


def test_the_filling_of_sequence_parallel_ranks_is_a_segment():
    run_distributed(compare, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, timeout=200)


def test_both_transformers_are_built_of_transformer_engines_layers(monkeypatch):
    """Where it is there, but for fp32.  The spec is megatron's, here one of local layers, told apart by its place."""
    made = []

    def spec():
        made.append(backend.get_gpt_layer_local_spec())
        return made[-1]

    monkeypatch.setattr(device, "has_te", lambda: True)
    monkeypatch.setattr(backend, "get_gpt_layer_with_transformer_engine_spec", spec)
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", StandInTEDotProductAttention)
    config = reference.our_config(next(iter(reference.CONFIGS)))
    for make, causal in ((decoder_config, True), (vision_config, False)):
        fp32, built = (
            backend.block_submodules(
                make(config, ParallelConfig(), dtype), 2, causal=causal, final_norm=causal, core_attention="auto"
            )
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert fp32.layer_specs[0] is not made[-1]
        assert fp32.layer_specs[0].submodules.self_attention.submodules.core_attention.keywords["kernel"] is None
        assert built.layer_specs == [made[-1], made[-1]]
        attention = built.layer_specs[0].submodules.self_attention
        assert attention.params["attn_mask_type"] == (AttnMaskType.causal if causal else AttnMaskType.no_mask)
        assert attention.submodules.core_attention.keywords["kernel"] is StandInTEDotProductAttention
    assert len(made) == 2
