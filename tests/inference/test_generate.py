"""Generation and gen embeddings against transformers: greedy tokens, states, sampling, policies."""

import pytest
import torch
from inference_cases import cosine, prompts, reference_model, reference_states, vision_arguments, write_inputs
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import init_distributed
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig, generate

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
    """transformers.generate's greedy tokens, rows beyond the tokenizer left out as our engine does."""
    ids = prompt.input_ids[None]
    extra = vision_arguments(prompt, model.config.video_token_id)
    if extra:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int() + 2 * (
            ids == model.config.video_token_id
        ).int()
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **extra
    )
    return made[0, ids.shape[1] :].tolist()


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
        last = max(i for i, token in enumerate(response.token_ids) if token == 415 or i == len(response.token_ids) - 1)
        assert cosine(response.embedding, states[len(prompt) + last]) >= 0.99999, name
        assert cosine(result.disc, states[prompt.disc_index]) >= 0.99999, name
