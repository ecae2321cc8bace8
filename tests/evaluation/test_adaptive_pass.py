"""A pass of adaptive mode: the responses of those that reason, by whichever way puts fewer tokens through the model."""

import numpy as np
import pytest

from umer1.data.media import MediaRoot
from umer1.data.mini_mmeb import MINI_BASE, make_mini_mmeb
from umer1.distributed.parallel import init_distributed
from umer1.evaluation import evaluate
from umer1.evaluation.tasks import read_benchmark
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig, generate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(engine, prompts, ids)."""
    root = make_mini_mmeb(tmp_path_factory.mktemp("mini") / "data", num_train_pairs=4, num_eval_queries=6)
    settings = EngineConfig(model=str(MINI_BASE), fp32=True)
    directory = open_directory(settings)
    task = read_benchmark(root / "eval").tasks[0]
    with init_distributed(settings.parallel()) as state:
        engine = load_engine(settings, directory, make_processor(settings, directory), state)
        prompts = [engine.processor.encode_prompt(q.text, q.images, [], MediaRoot(root)) for q in task.queries]
        yield engine, prompts, [query.id for query in task.queries]


@pytest.mark.parametrize("wanted", [(0, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0), (1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1)])
def test_responses_are_those_of_reasoning_for_all(world, monkeypatch, wanted):
    """Where at most one of six reasons, all are read up to <disc_emb>; where five or six do, none is read twice."""
    engine, prompts, ids = world
    config, mask = GenerationConfig(max_new_tokens=8, max_sequences=4), np.array(wanted, dtype=bool)
    everyone = generate(engine, prompts, ids, config, (0.0,))
    embed_disc, read = evaluate._embed_disc, []

    def watched(engine, shown):
        read.append((shown, embed_disc(engine, shown)))

    monkeypatch.setattr(evaluate, "_embed_disc", watched)
    found = evaluate.adaptive_pass(engine, prompts, ids, config, mask)
    assert [shown for shown, _ in read] == ([prompts] if sum(wanted) < 2 else [])
    for _, disc in read:
        np.testing.assert_allclose(disc, [outcome.disc for outcome in everyone], atol=1e-5)
    expected = [outcome for outcome, asked in zip(everyone, mask, strict=True) if asked]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.responses[0].token_ids == other.responses[0].token_ids
        np.testing.assert_allclose(one.responses[0].embedding, other.responses[0].embedding, atol=1e-5)
