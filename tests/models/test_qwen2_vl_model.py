"""Qwen2-VL in one process against transformers: hidden states, logits and every gradient."""

import pytest
import qwen2_vl_reference as reference
import torch

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.embedding import last_index, read_embedding
from umer1.models.qwen2_vl.model import build_model
from umer1.testing import assert_close


@pytest.fixture(params=list(reference.CONFIGS))
def models(request):
    """(our stage, transformers' model, our configuration), the same random weights."""
    theirs, config = reference.reference_model(request.param), reference.our_config(request.param)
    parallel = ParallelConfig()
    with init_distributed(parallel, seed=1) as state:
        (ours,) = build_model(config, parallel, state, params_dtype=torch.float32)
        reference.copy_weights([ours], reference.hf_tensors(theirs), config)
        yield ours, theirs, config


def test_hidden_states_logits_and_all_gradients(models):
    ours, theirs, config = models
    items = reference.sequences(config)
    want = reference.reference_hidden(theirs, items)
    got = ours(**reference.pack(items))
    assert_close("hidden", got, want, rtol=1e-5)
    rows = torch.tensor([0, 3, 11, got.shape[0] - 1])
    want_logits, got_logits = theirs.lm_head(want[rows]), ours.logits(got[rows])
    assert_close("logits", got_logits, want_logits, rtol=1e-5)
    generator = torch.Generator().manual_seed(5)
    weight, logit_weight = (torch.randn(x.shape, generator=generator) for x in (want, want_logits))
    ((want * weight).sum() + (want_logits * logit_weight).sum()).backward()
    ((got * weight).sum() + (got_logits * logit_weight).sum()).backward()
    expected = reference.to_ours(reference.hf_tensors(theirs, grad=True), config)
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, expected[name], rtol=2e-5)


def test_order_of_packing_and_lengths_do_not_change_a_sequence(models):
    ours, _, config = models
    items = reference.sequences(config)
    alone = [ours(**reference.pack([item])) for item in items]
    order = [3, 0, 4, 2, 1]
    packed = ours(**reference.pack([items[i] for i in order]))
    assert_close("packed", packed, torch.cat([alone[i] for i in order]), rtol=1e-5)


def test_features_of_a_frozen_tower_are_reused_and_only_the_merger_is_trained(models):
    ours, _, config = models
    ours.set_trainable(train_vision=False)
    batch = reference.pack(reference.sequences(config))
    features = ours.vision_forward(batch["pixel_values"], batch["grid_thw"])
    assert not features.rows.requires_grad
    direct = ours(**batch)
    del batch["pixel_values"], batch["grid_thw"]
    again = ours(**batch, vision_features=features)
    assert torch.equal(again, direct)
    again.square().sum().backward()
    trained = {name for name, parameter in ours.vision.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in ours.vision.named_parameters() if name.startswith("merger.")}
    ours.set_trainable(train_vision=True)
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_a_batch_without_images_gives_vision_parameters_a_zero_gradient(models):
    ours, _, config = models
    items = [item for item in reference.sequences(config) if not item["grid_thw"].shape[0]]
    ours(**reference.pack(items)).sum().backward()
    for name, parameter in ours.vision.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_missing_pixels_are_an_error_and_not_a_silent_change(models):
    ours, _, config = models
    batch = reference.pack(reference.sequences(config))
    with pytest.raises(ValueError, match="vision tokens"):
        ours(**{**batch, "pixel_values": None, "grid_thw": None})


def test_pads_that_a_policy_sampled_are_plain_tokens(models):
    """transformers sees other ids with the same embeddings, which it cannot take for spans."""
    ours, theirs, config = models
    table = theirs.get_input_embeddings().weight
    doubles = {reference.IMAGE: 97, reference.VIDEO: 98}
    with torch.no_grad():
        for pad, double in doubles.items():
            table[double] = table[pad]
    sampled = torch.tensor([5, reference.IMAGE, reference.START, reference.VIDEO, reference.VIDEO, reference.END, 7])
    hidden_pads = torch.tensor([doubles.get(token, token) for token in sampled.tolist()])
    items, plain, rows, start = [], [], [], 0
    for item in reference.sequences(config):
        prompt, positions = item["input_ids"], item["position_ids"]
        following = (positions.max() + 1 + torch.arange(len(sampled))).expand(3, -1)
        longer = item | {"position_ids": torch.cat([positions, following], dim=1)}
        items.append(longer | {"input_ids": torch.cat([prompt, sampled])})
        plain.append(longer | {"input_ids": torch.cat([prompt, hidden_pads])})
        pads = (prompt == reference.IMAGE) | (prompt == reference.VIDEO)
        rows.append(pads.nonzero().flatten() + start)
        start += len(prompt) + len(sampled)
    batch, rows = reference.pack(items), torch.cat(rows)
    assert_close("hidden", ours(**batch, vision_rows=rows), reference.reference_hidden(theirs, plain), rtol=1e-5)
    with pytest.raises(ValueError, match="vision tokens"):
        ours(**batch)
    with pytest.raises(ValueError, match="vision tokens"):
        ours(**batch, vision_rows=rows[1:])
    texts = [item for item in items if not item["grid_thw"].shape[0]]
    ours(**reference.pack(texts), vision_rows=rows[:0]).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.vision.parameters())


def test_bf16_parameters_stay_near_fp32(models):
    ours, _, config = models
    batch = reference.pack(reference.sequences(config))
    want = ours(**batch)
    got = ours.bfloat16()(**batch)
    assert got.dtype == torch.bfloat16
    rows = torch.arange(got.shape[0])
    cosine = (read_embedding(got, rows) * read_embedding(want, rows)).sum(-1)
    assert cosine.min() > 0.99


def test_read_embedding_and_last_index():
    hidden = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    got = read_embedding(hidden.bfloat16(), torch.tensor([2, 0]))
    assert got.dtype == torch.float32
    assert_close("rows", got, torch.tensor([[1.0, 0.0], [0.6, 0.8]]), rtol=1e-6)
    assert last_index(torch.tensor([5, 7, 5, 1]), 5) == 2
    assert last_index(torch.tensor([5, 7]), 9) == -1
