"""Generation and gen embeddings against transformers: greedy tokens, states, sampling, policies."""

import pytest
import torch
from inference_cases import (
    cosine,
    prompts,
    reference_inputs,
    reference_model,
    reference_states,
    tokenizer,
    write_inputs,
)
from safetensors.torch import load_file, save_file
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import init_distributed
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig, generate
from umer1.testing import run_distributed

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model directory, {id: prompt}, transformers' model)."""
    folder = tmp_path_factory.mktemp("generate")
    directory = make_tiny_directory(folder / "model", embedding_tokens=True, heads=4, kv_heads=2)
    write_inputs(folder)
    return directory, prompts(directory, folder), reference_model(directory)


def run(directory, wanted, configs, tp=1, pp=1, **limits):
    """One list of results per configuration."""
    settings = EngineConfig(
        model=str(directory), fp32=True, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **limits
    )
    opened = open_directory(settings)
    with init_distributed(settings.parallel()) as state:
        engine = load_engine(settings, opened, make_processor(settings, opened), state)
        return [
            generate(engine, list(wanted.values()), list(wanted), config, temperatures)
            for config, temperatures in configs
        ]


def token_ids(results):
    return [[response.token_ids for response in result.responses] for result in results]


def reference_greedy(model, prompt, count):
    """transformers' greedy tokens by whole forward passes; its model ends at its own end token."""
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count and model.generation_config.eos_token_id not in made[-1:]:
            made.append(int(model(**reference_inputs(model, prompt, made), use_cache=False).logits[0, -1].argmax()))
    return made


def last_position(directory, prompt, response):
    """Row of the response's last <gen_emb> in prompt and response."""
    gen_emb = tokenizer(directory).token_to_id("<gen_emb>")
    return len(prompt) + max(i for i, token in enumerate(response.token_ids) if token == gen_emb)


def test_greedy_tokens_and_gen_embeddings_equal_transformers(case):
    directory, wanted, model = case
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, stop_at_gen_emb=False)
    (results,) = run(directory, wanted, [(config, None)])
    im_end = model.generation_config.eos_token_id
    for (name, prompt), result in zip(wanted.items(), results, strict=True):
        response = result.responses[0]
        want = reference_greedy(model, prompt, NEW_TOKENS)
        got = response.token_ids[: response.num_generated] + ([im_end] if response.finish_reason == "im_end" else [])
        assert got == want, name
        states = reference_states(model, prompt, response.token_ids)
        assert cosine(response.embedding, states[last_position(directory, prompt, response)]) >= 0.99999, name
        assert cosine(result.disc, states[prompt.disc_index]) >= 0.99999, name


def test_the_last_gen_emb_of_the_response_counts_and_is_read_where_it_stands(case):
    """Responses forced to hold several <gen_emb>: the embedding is that of the last one, equal to transformers'."""
    directory, wanted, model = case
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, stop_at_gen_emb=False, temperature=3.0)
    (results,) = run(directory, wanted, [(config, (3.0,) * 24)])
    seen = set()
    for (name, prompt), result in zip(wanted.items(), results, strict=True):
        # transformers takes sampled vision tokens for spans without features and refuses them
        vision = (model.config.image_token_id, model.config.video_token_id)
        for response in [r for r in result.responses if not set(vision) & set(r.token_ids)][:8]:
            states = reference_states(model, prompt, response.token_ids)
            assert cosine(response.embedding, states[last_position(directory, prompt, response)]) >= 0.99999, name
        seen |= {response.finish_reason for response in result.responses}
    assert seen >= {"length"}


def test_layouts_and_batches_give_the_same_responses(case):
    """Sampled tokens depend on seed, id and sample number: not on TP, PP, budgets, order or company."""
    directory, wanted, _ = case
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=1.0)
    configs = [(config, (0.0, 1.0, 1.0))]
    (alone,) = run(directory, wanted, configs)
    want = token_ids(alone)
    assert len({tuple(ids) for responses in want for ids in responses}) > len(want)
    backwards = dict(reversed(wanted.items()))
    (other,) = run(directory, backwards, configs, max_tokens_per_batch=100, kv_cache_gib=1e-4)
    assert token_ids(other)[::-1] == want
    (one,) = run(directory, {"image": wanted["image"]}, configs)
    assert token_ids(one) == [want[list(wanted).index("image")]]
    seeded = GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=1.0, generation_seed=1)
    (reseeded,) = run(directory, wanted, [(seeded, (0.0, 1.0, 1.0))])
    assert [r[0] for r in token_ids(reseeded)] == [r[0] for r in want]  # greedy has no seed
    assert token_ids(reseeded) != want
    for ranks in run_distributed(run_layouts, 4, directory, wanted, configs, timeout=300):
        for name, (results,) in ranks.items():
            assert token_ids(results) == want, name
            for result, expected in zip(results, alone, strict=True):
                for response, other in zip(result.responses, expected.responses, strict=True):
                    assert cosine(response.embedding, torch.from_numpy(other.embedding)) >= 0.99999, name


def run_layouts(directory, wanted, configs):
    layouts = {"TP2xPP2": (2, 2), "TP2": (2, 1), "PP2": (1, 2)}
    return {name: run(directory, wanted, configs, tp=tp, pp=pp) for name, (tp, pp) in layouts.items()}


def test_missing_gen_emb_policies(case):
    """A random model seldom writes <gen_emb>: appended and read there, the disc embedding, or nothing."""
    directory, wanted, _ = case
    configs = [
        (GenerationConfig(max_new_tokens=4, missing_gen_emb=policy), None) for policy in ("append", "disc", "error")
    ]
    appended, disc, error = run(directory, wanted, configs)
    gen_emb = tokenizer(directory).token_to_id("<gen_emb>")
    for closed, fallen_back, failed in zip(appended, disc, error, strict=True):
        (response,) = closed.responses
        assert response.missing_gen_emb and response.token_ids[-1] == gen_emb
        assert response.num_generated == len(response.token_ids) - 1 <= 4
        assert response.token_ids[:-1] == fallen_back.responses[0].token_ids == failed.responses[0].token_ids
        assert (fallen_back.embedding("disc") == fallen_back.disc).all()
        assert failed.embedding("error") is None and failed.responses[0].missing_gen_emb


def test_a_response_stops_at_gen_emb_or_goes_on(tmp_path):
    """A model whose head prefers <gen_emb>, then <|im_end|>, whatever it reads."""
    directory = make_tiny_directory(tmp_path / "model", embedding_tokens=True, tied=False)
    write_inputs(tmp_path)
    wanted = {"text": prompts(directory, tmp_path)["text"]}
    ids = tokenizer(directory)
    gen_emb, im_end = ids.token_to_id("<gen_emb>"), ids.token_to_id("<|im_end|>")
    prefer(directory, gen_emb)
    stop = GenerationConfig(max_new_tokens=5)
    go_on = GenerationConfig(max_new_tokens=5, stop_at_gen_emb=False)
    (stopped,), (continued,) = run(directory, wanted, [(stop, None), (go_on, None)])
    assert stopped.responses[0].token_ids == [gen_emb] and stopped.responses[0].finish_reason == "gen_emb"
    assert continued.responses[0].token_ids == [gen_emb] * 5 and continued.responses[0].finish_reason == "length"
    assert not stopped.responses[0].missing_gen_emb
    prefer(directory, im_end)
    ((ended,),) = run(directory, wanted, [(stop, None)])
    assert ended.responses[0].token_ids == [gen_emb] and ended.responses[0].finish_reason == "im_end"
    assert ended.responses[0].missing_gen_emb and ended.responses[0].num_generated == 0


def test_vision_tokens_may_be_sampled_but_rows_without_tokens_may_not(tmp_path):
    directory = make_tiny_directory(tmp_path / "model", embedding_tokens=True, tied=False)
    write_inputs(tmp_path)
    wanted = {"image": prompts(directory, tmp_path)["image"]}
    ids = tokenizer(directory)
    pad = ids.token_to_id("<|image_pad|>")
    prefer(directory, pad)
    ((made,),) = run(directory, wanted, [(GenerationConfig(max_new_tokens=5), None)])
    assert made.responses[0].token_ids == [pad] * 5 + [ids.token_to_id("<gen_emb>")]
    prefer(directory, ids.get_vocab_size() + 1)
    ((made,),) = run(directory, wanted, [(GenerationConfig(max_new_tokens=5), (0.0, 1.0, 1.0))])
    assert all(token < ids.get_vocab_size() for response in made.responses for token in response.token_ids)


def prefer(directory, token):
    """Rewrite the weights so that the model wants one token whatever it reads: every state is one direction."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "model.norm.weight", "lm_head.weight")):
            value.zero_()
        if name.endswith("embed_tokens.weight"):
            value[:, 0] = 1.0
        if name.endswith("norm.weight") and "layers" not in name and "visual" not in name:
            value.zero_()
            value[0] = 1.0
        if name.endswith("lm_head.weight"):
            value[token, 0] = 100.0
    save_file(tensors, path, metadata={"format": "pt"})
