"""`umer1 eval --benchmark mini` end to end on the embedded base and a small benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
from inference_cases import cosine, reference_model, reference_states

from umer1 import conversion
from umer1.checkpoints.fingerprint import model_fingerprint
from umer1.data.media import MediaRoot
from umer1.data.mini_mmeb import MINI_BASE, make_mini_mmeb
from umer1.distributed.parallel import init_distributed
from umer1.errors import UserError
from umer1.evaluation.evaluate import _donated_thoughts, _reread, _Share, until_disc
from umer1.evaluation.mini import main
from umer1.evaluation.tasks import read_benchmark
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig, generate
from umer1.testing import run_distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mini_mmeb(tmp_path_factory.mktemp("mini") / "data", num_train_pairs=4, num_eval_queries=6)


def run(root, output, *flags: str):
    main(
        ["--benchmark", "mini", "--model", str(MINI_BASE), "--data-root", str(root), "--output", str(output)]
        + ["--num-samples", "3", "--max-new-tokens", "24", *flags]
    )


def without_times(result):
    """A result less what differs from run to run and from layout to layout."""
    left_out = ("seconds", "seconds_per_query", "data_parallel_size", "model")
    if isinstance(result, dict):
        return {key: without_times(value) for key, value in result.items() if key not in left_out}
    return pytest.approx(result, abs=2e-6) if isinstance(result, float) else result


def test_results_do_not_depend_on_the_number_of_ranks(root, tmp_path, capsys):
    run(root, tmp_path / "one", "--fp32")
    shown = capsys.readouterr().out
    run_distributed(run, 2, root, tmp_path / "two", "--fp32", "--max-sequences", "7")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert without_times(two) == without_times(one)
    assert (tmp_path / "one" / "results.txt").read_text() == shown
    assert list(one["tasks"]) == ["mini-img", "mini-doc", "mini-vid", "mini-look"]
    assert one["inputs"]["image_max_pixels"] == 65536 and one["inputs"]["num_frames"] == 8
    assert one["tasks"]["mini-doc"]["metric"] == "ndcg@5"
    assert set(one["mean"]["pass@k"]) == {"1", "2"}
    assert set(one["mean"]["splits"]["answer"]) == {"seen", "unseen"}
    assert set(one["mean"]["seconds_per_query"]) == {"disc", "gen", "adaptive"}
    assert set(one["mean"]["self_consistency"]) == {"1", "2"}
    # scored again from the arrays, without a model: the same, and another price is another result
    main(["--stored", str(tmp_path / "one"), "--output", str(tmp_path / "again"), "--seed", "0"])
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == one
    main(
        ["--stored", str(tmp_path / "one"), "--output", str(tmp_path / "dear"), "--adaptive-price", "1"]
        + ["--adaptive-probes", "2"]
    )
    dear = json.loads((tmp_path / "dear" / "results.json").read_text())
    assert dear["mean"]["adaptive"]["reasoned"]["value"] == pytest.approx(2 / 6)
    assert dear["mean"]["score"]["gen"] == one["mean"]["score"]["gen"]
    # the base has never seen the response format
    assert one["mean"]["responses"]["format_rate"]["value"] == 0.0
    assert one["mean"]["responses"]["missing_gen_emb"]["value"] == 1.0


def test_disc_alone_of_a_checkpoint(root, tmp_path, monkeypatch, capsys):
    """Named is the one checkpoint that was scored, with its hash; under torchrun the first process scores again."""
    conversion.main(["--from-hf", str(MINI_BASE), "--to-checkpoint", str(tmp_path / "run")])
    run(root, tmp_path, "--modes", "disc", "--model", str(tmp_path / "run"))
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["mean"]["score"]) == {"disc"} and "responses" not in result["mean"]
    assert Path(result["model"]).parent == tmp_path / "run"
    assert result["model_sha256"] == model_fingerprint(result["model"])
    capsys.readouterr()
    (tmp_path / "refused" / "results.json").mkdir(parents=True)
    with pytest.raises(UserError, match="refused cannot be written.*results.json"):
        main(["--stored", str(tmp_path), "--output", str(tmp_path / "refused")])
    monkeypatch.setenv("RANK", "1")
    main(["--stored", str(tmp_path), "--output", str(tmp_path / "again")])
    assert capsys.readouterr().out == "" and not list((tmp_path / "again").iterdir())


def test_queries_that_do_not_reason_are_prefilled_alone(root):
    """Who reasons gets the same response as if all did; the others their disc embedding and no token."""
    settings = EngineConfig(model=str(MINI_BASE), fp32=True)
    directory = open_directory(settings)
    task = read_benchmark(root / "eval").tasks[0]
    with init_distributed(settings.parallel()) as state:
        engine = load_engine(settings, directory, make_processor(settings, directory), state)
        prompts = [engine.processor.encode_prompt(q.text, q.images, [], MediaRoot(root)) for q in task.queries]
        config, ids = GenerationConfig(max_new_tokens=12, max_sequences=4), [query.id for query in task.queries]
        wanted = np.array([True, False, False, True, False, True])
        everyone, some = (generate(engine, prompts, ids, config, (0.0,), mask) for mask in (None, wanted))
        nobody = generate(engine, prompts, ids, config, (0.0, 0.0), np.zeros(6, dtype=bool))
    for asked, full, part, none in zip(wanted, everyone, some, nobody, strict=True):
        np.testing.assert_allclose(part.disc, full.disc, atol=1e-5)
        np.testing.assert_allclose(none.disc, full.disc, atol=1e-5)
        assert part.responses[0].token_ids == (full.responses[0].token_ids if asked else [])
        assert [response.num_generated for response in none.responses] == [0, 0]
        if asked:
            np.testing.assert_allclose(part.responses[0].embedding, full.responses[0].embedding, atol=1e-5)


def test_unusable_benchmarks_are_named(root, tmp_path):
    with pytest.raises(UserError, match="nowhere.*meta.json: cannot be read"):
        run(tmp_path / "nowhere", tmp_path / "out")
    folder = tmp_path / "eval"
    (folder / "mini-img").mkdir(parents=True)
    meta = json.loads((root / "eval" / "meta.json").read_text())
    meta["tasks"] = {"mini-img": meta["tasks"]["mini-img"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    for name in ("queries", "candidates"):
        text = (root / "eval" / "mini-img" / f"{name}.jsonl").read_text()
        (folder / "mini-img" / f"{name}.jsonl").write_text(text.replace('"label": "img-c', '"label": "lost-'))
    with pytest.raises(UserError, match="no candidate's id"):
        read_benchmark(folder)


def test_other_thoughts_are_read_with_the_own_summary(root):
    """Against transformers' state at <gen_emb> of the edited text; what cannot be edited keeps its own embedding."""
    settings = EngineConfig(model=str(MINI_BASE), fp32=True)
    directory = open_directory(settings)
    task = read_benchmark(root / "eval").tasks[0]
    with init_distributed(settings.parallel()) as state:
        engine = load_engine(settings, directory, make_processor(settings, directory), state)
        media = MediaRoot(root)
        prompts = [engine.processor.encode_prompt(q.text, q.images, [], media) for q in task.queries]
        texts = ["<think> red blue one left,</think><answer> blue six<gen_emb>", "nothing<gen_emb>"]
        own = np.zeros((2, directory.config.hidden_size), dtype=np.float32)
        found = _reread(engine, prompts[:2], texts, [" pink", " pink"], own)
        assert (found[1] == 0).all()
        edited = engine.processor.encode_response(prompts[0], "<think> pink</think><answer> blue six<gen_emb>")
        share = _Share(list(range(6)), list("abcdef"), prompts, 0.0)
        thoughts = [f"<think>{i}</think><answer>x<gen_emb>" for i in range(6)]
        donated = _donated_thoughts(engine, task, share, thoughts, seed=5)
    response = edited.input_ids[edited.prompt_length :].tolist()
    states = reference_states(reference_model(MINI_BASE), prompts[0], response)
    assert cosine(found[0], states[edited.gen_index]) >= 0.99999
    assert sorted(donated) == list("012345") and all(text != str(i) for i, text in enumerate(donated))
    cut = until_disc(prompts[0])
    assert len(cut) == prompts[0].disc_index + 1 and cut.position_ids.shape == (3, len(cut))
