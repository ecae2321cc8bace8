"""examples/grpo.py with the torch engine, seen from outside: what it samples, rewards, logs and leaves behind."""

import json

import pytest
import torch
from grpo_reference import FORMAT, SIDES, Policy, Settings, embedding_reward, train, write_fixed_rollouts
from grpo_world import Setting, records, rollouts, succeed
from programs import GRPO, ROOT, run_in_forks
from safetensors.torch import load_file

from umer1.testing import assert_close

LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, "--micro-batch-size 5"),
    "dp4": (4, "--micro-batch-size 3"),  # one pair a rank
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --max-tokens-per-micro-batch 500"),
    "pp2-vpp": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 64"),
}
# Reward and parts, spread, KL, clip share, entropy, lengths, missing, mismatch, seconds, rates.
FIGURES = (
    "reward reward_format reward_embedding ranking margin reward_std zero_spread_share kl clip_share entropy "
    "response_length cut_off_share missing_gen_emb_share failed_share mismatch_mean mismatch_k3 mismatch_p99 "
    "mismatch_p99_truncated seconds_rollout seconds_score seconds_update seconds_sync generated_tokens_per_second "
    "trained_tokens_per_second loss grad_norm learning_rate iteration consumed_samples bad_samples"
).split()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("grpo"), layers=4)


@pytest.fixture(scope="module")
def runs(setting, tmp_path_factory):
    """layout -> SAVE of two steps with comparison sets of half a batch; each is run once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def find(layout: str):
        if layout not in done:
            save, (processes, flags) = folder / layout, LAYOUTS[layout]
            more = ["--comparison-pairs", "2", "--eval-data-path", str(setting.heldout), "--save", str(save)]
            more += ["--export-hf", str(save / "hf"), *flags.split()]
            out = succeed(setting.flags(*more), processes)
            done[layout] = save, out
        return done[layout]

    return find


def completions(save, iteration: int) -> list[dict]:
    lines = sorted(rollouts(save, iteration), key=lambda line: (line["slot"], line["side"]))
    return [{**each, "at": (line["slot"], line["side"])} for line in lines for each in line["completions"]]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_rollouts_and_rewards_are_the_same_in_every_layout(runs, layout):
    (want, _), (got, _) = runs("one"), runs(layout)
    for iteration in (1, 2):
        theirs, ours = completions(want, iteration), completions(got, iteration)
        assert len(ours) == len(theirs) == 4 * 2 * 3
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["at"] == other["at"] and mine["token_ids"] == other["token_ids"], (iteration, mine["at"])
            assert mine["logprobs"] == pytest.approx(other["logprobs"], abs=2e-4)
            for name, value in other["rewards"].items():
                assert mine["rewards"][name] == pytest.approx(value, abs=1e-5), (iteration, mine["at"], name)
            assert mine["total"] == pytest.approx(other["total"], abs=1e-5)
            # a spread of 1e-3 makes 1e-3 of round-off of 1e-6
            assert mine["advantage"] == pytest.approx(other["advantage"], abs=1e-2)
    for mine, other in zip(records(got), records(want), strict=True):
        assert mine.keys() == other.keys()
        exact = [name for name in other if name.startswith(("eval_", "response", "cut", "missing", "zero", "ranking"))]
        for name in [*exact, "reward", "margin", "entropy", "kl", "loss"]:
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=3e-5), (mine["iteration"], name)


def test_the_first_step_against_plain_transformers(setting, runs):
    """Engine and trainer log-probs, rewards over comparison sets of two pairs, advantages."""
    save, _ = runs("one")
    log = save / "rollouts" / "iter_0000001.jsonl"
    settings = Settings(lr=1e-4, max_completion_length=12, comparison_pairs=2)
    (step,), _ = train(setting.model, setting.data, [log], settings)
    lines, with_embedding = rollouts(save), 0
    for number, side in enumerate(SIDES):
        mine = sorted((line for line in lines if line["side"] == side), key=lambda line: line["slot"])
        for row, completion in enumerate(each for line in mine for each in line["completions"]):
            want = step.old_logprobs[number][row]
            for name in ("logprobs", "old_logprobs"):
                assert_close(name, torch.tensor(completion[name], dtype=torch.float64), want, rtol=0, atol=1e-4)
            assert completion["total"] == pytest.approx(float(step.total[number, row]), abs=2e-5)
            assert completion["advantage"] == pytest.approx(float(step.advantages[number, row]), abs=1e-2)
            with_embedding += completion["status"] == "ok"
    assert 4 < with_embedding < 24, "all or nothing would show little"


def test_the_record(setting, runs):
    save, out = runs("one")
    before, *steps = records(save)
    assert before["iteration"] == 0 and "eval_gen_hit1" in before and "reward" not in before
    assert [record["iteration"] for record in steps] == [1, 2]
    for record in steps:
        assert not [name for name in FIGURES if record.get(name) is None]
        assert record["mismatch_mean"] < 1e-5 and record["mismatch_p99"] == pytest.approx(1.0, abs=1e-3)
    assert "eval_gen_hit1" in steps[-1] and "eval_gen_hit1" not in steps[0]
    seconds = sum(steps[0][f"seconds_{name}"] for name in ("rollout", "score", "update", "sync"))
    assert 0 < seconds <= steps[0]["milliseconds"] / 1000
    every = completions(save, 1)
    assert steps[0]["reward"] == pytest.approx(sum(each["total"] for each in every) / len(every), abs=1e-5)
    sets = {line["dataset"] for line in rollouts(save)}
    assert {key for key in steps[0] if key.startswith("dataset_")} == {f"dataset_reward/{name}" for name in sets}
    for name in sets:
        totals = [each["total"] for line in rollouts(save) if line["dataset"] == name for each in line["completions"]]
        assert steps[0][f"dataset_reward/{name}"] == pytest.approx(sum(totals) / len(totals), abs=1e-5)
    assert steps[0]["response_length"] == pytest.approx(sum(len(each["token_ids"]) for each in every) / len(every))
    cut_off = sum(each["finish_reason"] == "length" for each in every) / len(every)
    assert steps[0]["cut_off_share"] == pytest.approx(cut_off)
    missing = sum(each["status"] != "ok" for each in every) / len(every)
    assert steps[0]["missing_gen_emb_share"] == pytest.approx(missing)
    for name in ("config.yaml", "training.png", "tensorboard", "iter_0000002", "reference/config.json", "hf"):
        assert (save / name).exists(), name
    readable = (save / "rollouts" / "iter_0000001.txt").read_text()
    assert readable.count("advantage ") == 24 and "ranking" in readable
    for word in ("engine               torch", "slow (asked for)", "held-out gen hit@1", "groups without spread"):
        assert word in out, word


@torch.no_grad()
def greedy(policy: Policy, prompt, length: int) -> tuple[list[int], torch.Tensor | None]:
    """The likeliest response, and its embedding."""
    inputs, ids = policy.read(prompt), []
    while len(ids) < length and (not ids or ids[-1] != policy.id("<|im_end|>")):
        embeds, positions = inputs
        row = policy.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))
        later = positions[:, -1:] + 1 + torch.arange(len(ids))
        hidden = policy.model.model.language_model(
            inputs_embeds=torch.cat([embeds, row])[None],
            position_ids=torch.cat([positions, later], dim=1)[:, None],
            use_cache=False,
        ).last_hidden_state[0, -1]
        ids.append(int(policy.model.lm_head(hidden).argmax()))
    return ids, policy.respond(inputs, ids, 1.0)[1]


def test_heldout_retrieval_against_plain_transformers(setting, runs):
    """Two of the pairs have one positive: it stands in the pool once, and is right for both."""
    save, _ = runs("one")
    pairs = json.loads(setting.heldout.read_text())
    targets = [json.dumps([pair[f"pos_{kind}"] for kind in ("text", "image", "video")]) for pair in pairs]
    assert len(set(targets)) == len(pairs) - 1
    for directory, record in ((setting.model, records(save)[0]), (save / "hf", records(save)[-1])):
        policy = Policy(directory)
        prompts = [[policy.prompt_of(setting.heldout.parent, pair, side) for pair in pairs] for side in range(2)]
        answers = [[greedy(policy, prompt, 12) for prompt in side] for side in prompts]
        pool = {target: embedding for target, (_, embedding) in zip(targets, answers[1], strict=True)}
        pool = {target: embedding for target, embedding in pool.items() if embedding is not None}
        hits, margins = [], []
        for own, (_, query) in zip(targets, answers[0], strict=True):
            scores = {} if query is None else {target: float(query @ embedding) for target, embedding in pool.items()}
            hits.append(bool(scores) and max(scores, key=scores.get) == own)
            others = [score for target, score in scores.items() if target != own]
            if own in scores and others:
                margins.append(scores[own] - sum(others) / len(others))
        every = [answer for side in answers for answer in side]
        assert record["eval_queries"] == len(pairs) and record["eval_unreadable"] == 0
        assert record["eval_gen_hit1"] == pytest.approx(sum(hits) / len(hits))
        assert record["eval_gen_margin"] == pytest.approx(sum(margins) / max(len(margins), 1), abs=1e-5)
        assert record["eval_response_length"] == pytest.approx(sum(len(ids) for ids, _ in every) / len(every))
        missing = sum(embedding is None for _, embedding in every) / len(every)
        assert record["eval_missing_gen_emb_share"] == pytest.approx(missing)
        vectors = [[embedding for _, embedding in side] for side in answers]
        total = 0.0
        for side, given in enumerate(answers):
            for row, (ids, embedding) in enumerate(given):
                form = FORMAT.match(policy.tokenizer.decode(ids)) is not None and embedding is not None
                total += form + embedding_reward(vectors[side], vectors[1 - side], row, 1)[0]
        assert record["eval_reward"] == pytest.approx(total / len(every), abs=1e-5)


def test_stop_at_gen_emb_temperature_workers_and_bad_samples(setting, tmp_path):
    """Bad records are replaced alike with and without a worker; log-probs are those at the temperature."""
    found = json.loads(setting.data.read_text())
    found[1]["qry_image"] = "gone.png"
    found[2]["pos_text"] = found[2]["pos_image"] = ""
    found[2]["pos_video"] = [""]
    data = setting.data.parent / "some-bad.json"
    data.write_text(json.dumps(found))
    more = ["--data-path", str(data), "--stop-at-gen-emb", "--temperature", "0.7", "--max-bad-sample-fraction", "1"]
    saves = []
    for workers in ("1", "0"):
        saves.append(tmp_path / workers)
        arguments = setting.flags(*more, "--num-workers", workers, "--save", str(saves[-1]))
        out = succeed(arguments, 1 + int(workers))
        assert "samples were bad" in out and "0 of" not in out.split("samples were bad")[0].splitlines()[-1]
        listed = {json.loads(line)["index"] for line in (saves[-1] / "bad_samples.jsonl").read_text().splitlines()}
        assert listed and listed <= {1, 2}
    with_worker, without = (completions(save, 1) for save in saves)
    assert [each["token_ids"] for each in with_worker] == [each["token_ids"] for each in without]
    policy = Policy(setting.model)
    gen_emb, ended = policy.id("<gen_emb>"), 0
    for line in rollouts(saves[0]):
        assert line["index"] not in {1, 2}
        prompt = policy.read(policy.prompt_of(data.parent, found[line["index"]], SIDES.index(line["side"])))
        for completion in line["completions"]:
            ids = completion["token_ids"]
            assert gen_emb not in ids[:-1] and (completion["finish_reason"] == "stop") == (
                ids[-1] in (gen_emb, policy.id("<|im_end|>"))
            )
            ended += ids[-1] == gen_emb
            with torch.no_grad():
                want, _ = policy.respond(prompt, ids, 0.7)
            for name in ("logprobs", "old_logprobs"):
                assert_close(name, torch.tensor(completion[name], dtype=torch.float64), want, rtol=0, atol=1e-4)
    assert ended > 2


OWN_REWARD = '''
import torch


def shortness(inputs):
    """1 / tokens of each response; called once for each side of a comparison set."""
    assert len(inputs.responses) == len(inputs.lengths) == len(inputs.valid)
    return 1.0 / inputs.lengths.clamp(min=1).float()


def first_alone(inputs):
    """Only the first pair of a comparison set has spread."""
    rows = torch.arange(len(inputs.lengths))
    return torch.where(rows < inputs.num_generations, rows.float(), 0.0)


def too_short(inputs):
    return torch.zeros(1)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Environment in which `own_reward` can be imported."""
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    return {"PYTHONPATH": str(tmp_path)}


def test_a_reward_of_ones_own_and_trained_vision(setting, own, tmp_path):
    rewards = "[{name: 'own_reward:shortness', weight: 2.0}, {name: length, weight: 0.5}]"
    more = ["--rewards", rewards, "--train-vision", "--lr", "1e-3", "--export-hf", str(tmp_path / "hf")]
    succeed(setting.flags(*more, "--save", str(tmp_path / "run")), 2, **own)
    for completion in completions(tmp_path / "run", 1):
        length = len(completion["token_ids"])
        assert completion["rewards"]["own_reward:shortness"] == pytest.approx(1 / length)
        assert completion["total"] == pytest.approx(2 / length - 0.5 * length / 12)
    before, after = (load_file(path / "model.safetensors") for path in (setting.model, tmp_path / "hf"))
    visual = [name for name in before if "visual" in name and "merger" not in name]
    assert visual and all(not torch.equal(before[name], after[name]) for name in visual)


def test_a_reward_of_the_wrong_shape_is_one_message(setting, own, tmp_path):
    done = run_in_forks(GRPO, setting.flags("--rewards", "[{name: 'own_reward:too_short'}]"), 2, **own)
    assert done.returncode != 0 and done.stderr.count("grpo: error:") == 1
    assert "shape (1,)" in done.stderr and "too_short" in done.stderr
    assert "GRPOTrainer" not in done.stderr, "no traceback"


@pytest.fixture(scope="module")
def dynamic(setting, tmp_path_factory):
    """ranks -> (SAVE, exported tensors) of a run in which one pair of each round has spread, at slot 0."""
    folder, done = tmp_path_factory.mktemp("dynamic"), {}
    (folder / "own_reward.py").write_text(OWN_REWARD)

    def find(ranks: int):
        if ranks not in done:
            save = folder / str(ranks)
            more = ["--rewards", "[{name: 'own_reward:first_alone'}]", "--lr", "1e-3", "--save", str(save)]
            more += "--dynamic-sampling --dynamic-sampling-rounds 3 --mini-batches 1 --inner-epochs 2".split()
            arguments = setting.flags(*more, "--export-hf", str(save / "hf"), "--micro-batch-size", "4")
            succeed(arguments, ranks, PYTHONPATH=str(folder))
            done[ranks] = save, load_file(save / "hf" / "model.safetensors")
        return done[ranks]

    return find


@pytest.mark.parametrize("ranks", [4])
def test_dynamic_sampling_is_the_same_at_any_number_of_ranks(setting, dynamic, ranks):
    """With one pair of spread at slot 0 of each round, all ranks but the first end up without pairs."""
    (want_save, want), (save, got) = dynamic(1), dynamic(ranks)
    start = load_file(setting.model / "model.safetensors")
    for mine, other in zip(records(save), records(want_save), strict=True):
        assert mine["rounds"] == other["rounds"] == 3
        assert mine["zero_spread_share"] == other["zero_spread_share"] == pytest.approx(0.75)
        assert mine["trained_tokens"] == other["trained_tokens"] if "trained_tokens" in mine else True
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
    for name in want:
        moved = float((want[name] - start[name]).norm())
        assert float((got[name] - want[name]).norm()) <= 0.02 * moved + 1e-6, name


def replayed(setting, path, tmp_path, ranks: int, *more: str):
    """A run in which the responses of the file answer, and what it printed."""
    arguments = setting.flags("--parity-threshold", "100", "--max-completion-length", "64", *more)
    return succeed([str(path), *arguments], ranks, program=ROOT / "tests" / "replay_engine.py")


def spoilt(setting, path, spoil):
    """Fixed rollouts, each line after `spoil`."""
    write_fixed_rollouts(setting.model, setting.data, path, num_generations=3, faults=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        spoil(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_nothing_but_failed_rollouts(setting, tmp_path):
    """Nothing is learnt and nothing breaks; in bf16, without --save, a log line every second step."""

    def fail(line):
        line["completions"] = [{"status": "failed"}] * 3

    path = spoilt(setting, tmp_path / "fixed.jsonl", fail)
    out = replayed(setting, path, tmp_path, 2, *"--no-fp32 --bf16 --log-interval 2 --train-iters 3".split())
    lines = [line for line in out.splitlines() if "elapsed time" in line]
    assert [line.split("iteration")[1].split("/")[0].strip() for line in lines] == ["2", "3"]
    assert all("failed: 100.0%" in line and "loss: 0.0000" in line for line in lines)
    assert "nothing (no --save)" in out and "torch.bfloat16" in out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_side_that_failed_and_responses_without_tokens(setting, ranks, tmp_path):
    """What has no tokens is in no mean: the loss at ratio 1 is minus the mean advantage of what has some."""

    def spoil(line):
        if line["side"] == "positive":
            line["completions"] = [{"status": "failed"}] * 3
        elif line["slot"] == 1:
            line["completions"][0] |= {"token_ids": [], "logprobs": []}
        if line["side"] == "query":
            line["completions"][2]["token_ids"] = line["completions"][2]["token_ids"][5:]  # of another reward
            line["completions"][2]["logprobs"] = line["completions"][2]["logprobs"][5:]

    path, save = spoilt(setting, tmp_path / "fixed.jsonl", spoil), tmp_path / "run"
    replayed(setting, path, tmp_path, ranks, "--train-iters", "1", "--save", str(save), "--micro-batch-size", "4")
    (record,) = records(save)
    every = [each for each in completions(save, 1) if each["token_ids"]]
    assert len(every) == 4 * 3 - 1 and record["failed_share"] == 0.5
    want = -sum(each["advantage"] for each in every) / len(every)
    assert abs(want) > 0.01 and record["loss"] == pytest.approx(want, abs=1e-4)
