"""Rollouts of the torch engine against transformers, at every layout, and weights that reach it from any trainer."""

import time
from functools import partial

import numpy as np
import pytest
import torch
from inference_cases import prompts, reference_inputs, reference_model, tokenizer, write_inputs
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.schema import Prompt
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import export_hf, load_hf, stream_hf
from umer1.rl.config import RolloutConfig
from umer1.rl.engines.torch_engine import TorchEngine
from umer1.rl.types import Interrupted, Request, Sampling
from umer1.rl.weight_sync import WeightSync
from umer1.testing import run_distributed

TOKENS = 12
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "TP2, sequence parallel": {**TP2, "sequence_parallel": True, "recompute_granularity": "full"},
    "PP2, virtual stages": {**PP2, "num_layers_per_virtual_pipeline_stage": 1},
    "TP2 PP2, uneven": {**TP2, **PP2, "decoder_first_pipeline_num_layers": 1},
    "DP4": {},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model directory, {key: prompt})."""
    folder = tmp_path_factory.mktemp("rollouts")
    directory = make_tiny_directory(folder / "model", embedding_tokens=True, layers=4, seed=3)
    write_inputs(folder)
    return directory, prompts(directory, folder)


def sampling(path, **changes):
    stop = tokenizer(path).token_to_id("<|im_end|>")
    fields = dict(num_generations=3, max_completion_length=TOKENS, temperature=1.0, stop_ids=(stop,), seed=5)
    return Sampling(**(fields | changes))


def rollouts(path, wanted, drawn, layout=None, *, per_replica=False, config=None, stop=lambda: False):
    """One rank: a trainer's model of `layout` loaded and synced to an engine; its answers to each of `drawn`."""
    parallel = ParallelConfig(**(layout or {}))
    directory = HFDirectory.open(path)
    with init_distributed(parallel) as state:
        models = build_model(directory.config, parallel, state, params_dtype=torch.float32)
        load_hf(models, directory, state)
        engine = TorchEngine(
            config or RolloutConfig(), directory, parallel, state, params_dtype=torch.float32, seq_length=256
        )
        engine.sleep()
        engine.wake()
        assert WeightSync(engine, state, timeout=100.0)(models) > 0
        requests = [Request(key, Prompt(sequence)) for key, sequence in wanted.items()]
        if per_replica:
            requests = requests[state.dp_rank :: state.dp_size]
        answers = [engine.generate(requests, each, stop) for each in drawn]
        return {request.key: [answer[i] for answer in answers] for i, request in enumerate(requests)}


def forward_logprobs(model, prompt, response, temperature):
    """transformers' teacher-forced log-probs of `response`, and the likeliest token at each place, [L] both."""
    inputs = reference_inputs(model, prompt, response)
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    chosen = logits[len(prompt) - 1 : -1].div(temperature).log_softmax(-1)
    return chosen.gather(1, ids[0, len(prompt) :, None]).squeeze(1), chosen.argmax(1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_and_logprobs_equal_transformers(case, temperature):
    path, wanted = case
    found = rollouts(path, wanted, [sampling(path, temperature=temperature)])
    model = reference_model(path)
    vision = {model.config.image_token_id, model.config.video_token_id}
    compared = 0
    for key, ((completions),) in found.items():
        for made in completions:
            assert made.finish_reason == ("stop" if len(made.token_ids) < TOKENS else made.finish_reason)
            assert made.logprobs.dtype == np.float32 and len(made.logprobs) == len(made.token_ids) <= TOKENS
            if vision & set(made.token_ids):  # transformers takes them for spans without features
                continue
            want, likeliest = forward_logprobs(model, wanted[key], made.token_ids, temperature or 1.0)
            assert np.abs(made.logprobs - want.numpy()).max() < 1e-4, key
            assert temperature or made.token_ids == likeliest.tolist(), key
            compared += 1
    assert compared > len(found)


def test_samples_follow_the_models_distribution(case):
    """First tokens of 4,000 samples against the softmax at temperature 2: every frequency within 5 standard errors."""
    path, wanted = case
    count = 4000
    drawn = sampling(path, num_generations=count, max_completion_length=1, temperature=2.0)
    ((completions,),) = rollouts(path, {"text": wanted["text"]}, [drawn]).values()
    tokens = np.array([made.token_ids[0] for made in completions])
    model = reference_model(path)
    with torch.no_grad():
        mass = model(input_ids=wanted["text"].input_ids[None]).logits[0, -1].div(2.0).softmax(-1).numpy()
    seen = np.bincount(tokens, minlength=len(mass)) / count
    assert (np.abs(seen - mass) <= 5 * np.sqrt(mass * (1 - mass) / count) + 1 / count).all()
    assert {made.finish_reason for made in completions} <= {"stop", "length"}
    spare = len(mass) - tokenizer(path).get_vocab_size()
    assert spare == 4 and seen[-spare:].sum() > 0  # the whole vocabulary, rows without a token included


def test_layouts_give_the_same_rollouts(case):
    """Keys, seed and number decide: not TP, PP, SP, virtual stages, how prompts are shared out, or their company."""
    path, wanted = case
    drawn = [sampling(path), sampling(path, seed=6)]
    alone = rollouts(path, wanted, drawn)
    assert tokens_of(alone, 0) != tokens_of(alone, 1)
    for key in ("image", "video"):
        one = rollouts(path, {key: wanted[key]}, drawn)
        assert tokens_of(one, 0) == {key: tokens_of(alone, 0)[key]}
    for rank, by_layout in enumerate(run_distributed(run_layouts, 4, path, wanted, drawn, timeout=300)):
        for name, found in by_layout.items():
            assert found.keys() == (set(wanted) if name != "DP4" else set(list(wanted)[rank::4]))
            for number in range(len(drawn)):
                want = {key: tokens for key, tokens in tokens_of(alone, number).items() if key in found}
                assert tokens_of(found, number) == want, name
            for key, answers in found.items():
                for got, expected in zip(answers[0], alone[key][0], strict=True):
                    assert np.abs(got.logprobs - expected.logprobs).max() < 1e-4, name


def run_layouts(path, wanted, drawn):
    return {name: rollouts(path, wanted, drawn, layout, per_replica=name == "DP4") for name, layout in LAYOUTS.items()}


def tokens_of(found, number):
    return {key: [made.token_ids for made in answers[number]] for key, answers in found.items()}


def test_sampled_vision_pads_do_not_break_generation(case, monkeypatch):
    """Every response is image pads: each is fed back as a plain token and the cache goes on."""
    path, wanted = case
    pad = HFDirectory.open(path).config.image_token_id
    from umer1.inference import engine as module

    monkeypatch.setattr(module, "choose", lambda logits, *rest: torch.full((len(logits),), pad))
    found = rollouts(path, {key: wanted[key] for key in ("text", "image")}, [sampling(path)])
    for ((completions),) in found.values():
        assert all(made.token_ids == [pad] * TOKENS and made.finish_reason == "length" for made in completions)


def test_stop_ids_end_a_response_and_are_kept(case):
    path, wanted = case
    (free,) = [rollouts(path, wanted, [sampling(path, stop_ids=())])]
    second = free["text"][0][0].token_ids[1]
    (cut,) = [rollouts(path, wanted, [sampling(path, stop_ids=(second,))])]
    for key, (completions,) in cut.items():
        for got, whole in zip(completions, free[key][0], strict=True):
            ids = whole.token_ids
            end = ids.index(second) + 1 if second in ids else len(ids)
            assert got.token_ids == ids[:end] and got.finish_reason == ("stop" if second in ids else "length")
            assert np.allclose(got.logprobs, whole.logprobs[:end], atol=1e-5)


class Countdown:
    """Says stop at its `calls`-th call; -1: never."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self):
        self.calls -= 1
        return self.calls == 0


def test_stop_reaches_all_ranks_of_a_replica(case):
    path, wanted = case
    with pytest.raises(Interrupted):
        rollouts(path, wanted, [sampling(path, max_completion_length=100)], stop=Countdown(3))
    assert run_distributed(interrupted_on_one_rank, 2, path, wanted) == [True, True]


def interrupted_on_one_rank(path, wanted):
    last = torch.distributed.get_rank() == 1
    long = sampling(path, max_completion_length=100, stop_ids=())
    try:
        rollouts(path, wanted, [long], PP2, stop=Countdown(3 if last else -1))
    except Interrupted:
        return True
    return False


def test_what_is_not_there_in_time_is_none(case, monkeypatch):
    path, wanted = case
    config = RolloutConfig(rollout_timeout_seconds=100.0)
    clock = iter([0.0, 1.0, 2.0, *[200.0] * 10_000])
    from umer1.rl.engines import torch_engine

    class Clock:
        monotonic = staticmethod(partial(next, clock))

    monkeypatch.setattr(torch_engine, "time", Clock)
    stop = tokenizer(path).token_to_id("<|im_end|>")
    found = rollouts(path, wanted, [sampling(path, max_completion_length=40, num_generations=8)], config=config)
    made = [completion for ((completions),) in found.values() for completion in completions]
    assert any(completion is None for completion in made)
    assert all(completion is None or completion.token_ids[-1] == stop for completion in made)


def engine_weights(path, layout):
    """One rank: what the trainer streams and what the engine holds after three syncs, weights changed between."""
    parallel = ParallelConfig(**layout)
    directory = HFDirectory.open(path)
    with init_distributed(parallel) as state:
        models = build_model(directory.config, parallel, state, params_dtype=torch.bfloat16)
        load_hf(models, directory, state)
        engine = TorchEngine(RolloutConfig(), directory, parallel, state, params_dtype=torch.bfloat16, seq_length=64)
        sync = WeightSync(engine, state, timeout=100.0)
        for number in range(3):
            with torch.no_grad():
                for model in models:
                    for parameter in model.parameters():
                        parameter.mul_(1.0 + 0.25 * number)
            sync(models)
            engine.sleep()
            sync(models)
        want = {name: tensor.clone() for name, tensor in stream_hf(models, state)}
        return want, {name: tensor.clone() for name, tensor in export_hf([engine.model], state)}


def several_engine_weights(path, layouts):
    return [engine_weights(path, layout) for layout in layouts]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_reach_the_engine_bit_for_bit(tmp_path, tied):
    path = make_tiny_directory(tmp_path / "model", layers=4, tied=tied)
    layouts = [layout for name, layout in LAYOUTS.items() if not name.startswith("TP2 PP2")]
    for want, got in run_distributed(several_engine_weights, 2, path, layouts, timeout=300)[0]:
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_engine_without_weights_refuses(case):
    path, _ = case
    parallel, directory = ParallelConfig(), HFDirectory.open(path)
    with init_distributed(parallel) as state:
        engine = TorchEngine(RolloutConfig(), directory, parallel, state, params_dtype=torch.float32, seq_length=64)
        with pytest.raises(RuntimeError, match="no weights"):
            engine.generate([], sampling(path), time.monotonic)
        engine.close()
        engine.close()
