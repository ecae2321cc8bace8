"""The cache of keys and values: hidden states of step-by-step decoding equal those of one full forward pass."""

import pytest
import qwen2_vl_reference as reference
import torch

from umer1.distributed.parallel import ParallelConfig, ParallelState, init_distributed
from umer1.models.qwen2_vl.model import Qwen2VL, build_model
from umer1.testing import assert_close, run_distributed

NAME = "tied_gqa"
CAPACITY = 40


def build(parallel: ParallelConfig, state: ParallelState) -> Qwen2VL:
    config = reference.our_config(NAME)
    (model,) = build_model(config, parallel, state, params_dtype=torch.float32)
    weights = reference.hf_tensors(reference.reference_model(NAME))
    cut = dict(tp_rank=state.tp_rank, tp_size=state.tp_size, whole_vision=parallel.vision_data_parallel)
    reference.copy_weights([model], weights, config, **cut)
    return model.eval()


def grown(item: dict, tokens: list[int]) -> dict:
    """The sequence with `tokens` appended as text."""
    first = int(item["position_ids"].max()) + 1
    positions = torch.arange(first, first + len(tokens)).expand(3, -1)
    return dict(
        item,
        input_ids=torch.cat([item["input_ids"], torch.tensor(tokens, dtype=torch.long)]),
        position_ids=torch.cat([item["position_ids"], positions], dim=1),
    )


def decode(model: Qwen2VL, cache, tokens: list[int], positions: list[int]) -> torch.Tensor:
    bounds = torch.arange(len(tokens) + 1, dtype=torch.int32)
    return model(torch.tensor(tokens), torch.tensor(positions).expand(3, -1), bounds, 1, cache=cache)


def check_decoding(settings: dict) -> None:
    parallel = ParallelConfig(**settings)
    with init_distributed(parallel, seed=1) as state, torch.no_grad():
        model = build(parallel, state)
        items = reference.sequences(model.model_config)[:4]
        cache = model.new_cache(len(items), CAPACITY)
        prompts = reference.pack(items)
        hidden = model(**prompts, cache=cache)
        assert_close("prefill", hidden, model(**prompts), rtol=1e-5)
        # Two samples of each prompt, which part at the first token; then one of three is dropped.
        cache.replicate(2)
        live = [grown(item, []) for item in items for _ in range(2)]
        for step in range(5):
            tokens = [(7 * i + 3 * step + 1) % 80 for i in range(len(live))]
            positions = [int(item["position_ids"].max()) + 1 for item in live]
            got = decode(model, cache, tokens, positions)
            live = [grown(item, [token]) for item, token in zip(live, tokens, strict=True)]
            full = reference.pack(live)
            want = model(**full)[full["cu_seqlens"][1:].long() - 1]
            assert_close(f"step {step}", got, want, rtol=1e-5)
            if step == 2:
                rows = [i for i in range(len(live)) if i % 3]
                cache.select(torch.tensor(rows))
                live = [live[i] for i in rows]
        assert cache.lengths.tolist() == [item["input_ids"].numel() for item in live]


def test_decoding_equals_full_forward():
    check_decoding({})


def check_layouts() -> None:
    check_decoding(dict(tensor_model_parallel_size=2))
    check_decoding(dict(tensor_model_parallel_size=2, sequence_parallel=True))


def test_decoding_with_tensor_parallelism():
    run_distributed(check_layouts, 2)


def test_greedy_tokens_equal_transformers_generate():
    theirs = reference.reference_model(NAME)
    parallel = ParallelConfig()
    with init_distributed(parallel, seed=1) as state, torch.no_grad():
        model = build(parallel, state)
        items = reference.sequences(model.model_config)[:3]
        cache = model.new_cache(len(items), CAPACITY)
        batch = reference.pack(items)
        last = model(**batch, cache=cache)[batch["cu_seqlens"][1:].long() - 1]
        positions = [int(item["position_ids"].max()) for item in items]
        generated = []
        for _ in range(8):
            tokens = model.logits(last).argmax(-1).tolist()
            generated.append(tokens)
            positions = [position + 1 for position in positions]
            last = decode(model, cache, tokens, positions)
        for number, item in enumerate(items):
            media = {}
            if item["grid_thw"].shape[0]:
                kinds = (item["input_ids"] == reference.IMAGE).int()[None]
                media = dict(
                    pixel_values=item["pixel_values"], image_grid_thw=item["grid_thw"], mm_token_type_ids=kinds
                )
            # The mask is given: transformers would guess one from tokens that equal the padding's id.
            ids = item["input_ids"][None]
            settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
            want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **media, **settings)
            assert [step[number] for step in generated] == want[0, item["input_ids"].numel() :].tolist()


def test_prefill_in_parts_and_misuse():
    parallel = ParallelConfig()
    with init_distributed(parallel, seed=1) as state, torch.no_grad():
        model = build(parallel, state)
        items = reference.sequences(model.model_config)[:3]
        whole, parts = model.new_cache(3, CAPACITY), model.new_cache(3, CAPACITY)
        model(**reference.pack(items), cache=whole)
        for start, stop in ((0, 1), (1, 3)):
            part = parts.part(start, stop)
            model(**reference.pack(items[start:stop]), cache=part)
            parts.extend(part, start)
        assert torch.equal(parts.lengths, whole.lengths)
        tokens, positions = [5, 6, 7], [int(item["position_ids"].max()) + 1 for item in items]
        assert_close("parts", decode(model, parts, tokens, positions), decode(model, whole, tokens, positions))
        with pytest.raises(ValueError, match="2 tokens for 3 cached sequences"):
            decode(model, whole, [1, 2], [20, 20])
        with pytest.raises(ValueError, match="longer than the cache's capacity 4"):
            model(**reference.pack(items), cache=model.new_cache(3, 4))
        full = model.new_cache(1, items[0]["input_ids"].numel())
        model(**reference.pack(items[:1]), cache=full)
        with pytest.raises(ValueError, match="the cache is full"):
            decode(model, full, [1], [20])
