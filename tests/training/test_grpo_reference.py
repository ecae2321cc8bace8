"""The GRPO reference against numbers worked by hand and against transformers' own forward."""

import json

import pytest
import torch
from grpo_reference import (
    Policy,
    Settings,
    embedding_reward,
    group_advantages,
    response_loss,
    train,
    write_fixed_rollouts,
    write_rl_pairs,
)
from sft_reference import SUFFIX
from tiny_qwen2_vl import make_tiny_directory

SIZE = 4


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Model, data of four pairs, and rollouts with every fault."""
    folder = tmp_path_factory.mktemp("grpo_reference")
    model = make_tiny_directory(folder / "model", layers=2)
    data = write_rl_pairs(folder / "data", 4)
    return model, data, write_fixed_rollouts(model, data, folder / "rollouts.jsonl", num_generations=SIZE)


def plane(*degrees: float | None) -> list[torch.Tensor | None]:
    """Unit vectors in a plane at these angles."""
    angles = [None if angle is None else torch.deg2rad(torch.tensor(angle, dtype=torch.float64)) for angle in degrees]
    return [None if angle is None else torch.stack([angle.cos(), angle.sin()]) for angle in angles]


def test_embedding_reward_by_hand():
    own = plane(0.0, 0.0, 90.0, 90.0)
    # positives cos 0 and cos 60 = 1, .5; negatives cos 90 and cos 45: one positive and one negative are the best two
    other = plane(0.0, 60.0, 90.0, 45.0)
    reward, ranking, margin = embedding_reward(own, other, 0, 2)
    assert ranking == 0.5
    assert margin == pytest.approx(1.5 / 2 - 0.5**0.5 / 2, abs=1e-12)
    assert reward == pytest.approx(ranking * margin, abs=1e-12)
    # all equal: the lower index wins, so pair 0 ranks and pair 1 does not
    same = plane(0.0, 0.0, 0.0, 0.0)
    assert [embedding_reward(same, same, row, 2)[1] for row in range(4)] == [1.0, 1.0, 0.0, 0.0]
    # a missing one leaves the sets of the others, and has nothing itself
    assert embedding_reward(plane(0.0, None, 90.0, 90.0), other, 1, 2) == (0.0, 0.0, 0.0)
    reward, ranking, margin = embedding_reward(own, plane(None, 60.0, 90.0, None), 0, 2)
    assert (ranking, margin) == (1.0, pytest.approx(0.5, abs=1e-12))
    assert embedding_reward(own, plane(None, None, 0.0, 1.0), 0, 2) == (0.0, 0.0, 0.0)
    assert embedding_reward(own, plane(0.0, 60.0, None, None), 0, 2)[2] == pytest.approx(0.75, abs=1e-12)


def test_advantages_by_hand():
    total = torch.tensor([1.0, 3.0, 100.0, 5.0, 2.0, 2.0, 7.0, 8.0], dtype=torch.float64)
    there = [True, True, False, False, True, True, True, False]
    got = group_advantages(total, there, 4)
    assert got[:4].tolist() == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0.0, 0.0], abs=1e-12)
    spread = (50 / 3 / 2) ** 0.5
    assert got[6] == pytest.approx((7 - 11 / 3) / (spread + 1e-4), abs=1e-12) and got[7] == 0.0


def test_response_loss_by_hand():
    new, old = (torch.tensor(values, dtype=torch.float64).log() for values in ([0.6, 0.2], [0.4, 0.4]))
    settings = Settings(lr=0.0, beta=0.0, epsilon=0.2, epsilon_high=0.3)
    # ratios 1.5 and 0.5; a good response is clipped above at 1.3, a bad one below at 0.8
    assert float(response_loss(new, old, old, 2.0, old, settings)) == pytest.approx(-(2.6 + 1.0) / 2)
    assert float(response_loss(new, old, old, -1.0, old, settings)) == pytest.approx((1.5 + 0.8) / 2)
    settings.loss_normalisation, settings.max_completion_length = "constant", 10
    assert float(response_loss(new, old, old, 2.0, old, settings)) == pytest.approx(-0.36)
    settings.beta = 0.5  # k3 of reference / policy ratios 2/3 and 2
    k3 = [ratio - torch.tensor(ratio).log().item() - 1 for ratio in (2 / 3, 2.0)]
    assert float(response_loss(new, old, old, 2.0, old, settings)) == pytest.approx(-0.36 + 0.05 * sum(k3))
    settings.importance_cap = 1.6  # old / engine 2 and 0.5
    engine = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    want = -(2.6 * 1.6 + 1.0 * 0.5) / 10 + 0.05 * sum(k3)
    assert float(response_loss(new, old, old, 2.0, engine, settings)) == pytest.approx(want)


def test_forward_is_transformers_own(case):
    """Every kind of prompt; the response holds `<gen_emb>`, and no pad, which transformers would take for a picture."""
    model, data, _ = case
    policy = Policy(model)
    answer = "<think>one red</think><answer>two<gen_emb>"
    ids = policy.tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    for record in json.loads(data.read_text()):
        images = record["qry_image"]
        images = [path for path in ([images] if isinstance(images, str) else images) if path]
        video = [path for path in record["qry_video"] if path]
        human = "<image>" * len(images) + "<video>" * bool(video) + f"{record['qry_text']}\n<disc_emb>\n{SUFFIX}"
        with torch.no_grad():
            want = policy.forward(data.parent, human, answer, images, video)
            prompt = policy.prompt_of(data.parent, record, 0)
            logprobs, embedding = policy.respond(policy.read(prompt), ids, 2.0)
        start = want["prompt"]
        assert [*prompt[0], *ids] == want["ids"]
        logits = want["logits"][start - 1 : -1] / 2.0
        chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, chosen, rtol=0, atol=1e-12)
        hidden = want["hidden"][start + ids.index(policy.id("<gen_emb>"))]
        torch.testing.assert_close(embedding, hidden / hidden.norm(), rtol=0, atol=1e-12)


def test_first_step(case):
    model, data, rollouts = case
    settings = Settings(lr=1e-3, comparison_pairs=2)
    (step,), after = train(model, data, [rollouts], settings)
    lines = [json.loads(line) for line in rollouts.read_text().splitlines()]
    sides = [line for side in ("query", "positive") for line in lines if line["side"] == side]
    statuses = [completion["status"] for line in sides for completion in line["completions"]]
    assert {"ok", "missing_gen_emb", "failed"} == set(statuses)
    there = torch.tensor([status == "ok" for status in statuses]).view(2, -1)
    assert not step.total[~there].any() and not step.rewards["embedding"][~there].any()
    assert 0 < step.rewards["format"].sum() < there.sum()  # one kind of fault has an embedding and no format
    assert step.total.equal(step.rewards["format"] + step.rewards["ranking"] * step.rewards["margin"])
    assert len(step.total[there].unique()) > 8
    # at ratio 1 and without KL the loss is minus the mean advantage
    count = torch.tensor([status != "failed" for status in statuses]).view(2, -1).sum(1)
    assert step.losses[0] == pytest.approx(float(-(step.advantages.sum(1) / count).mean()), abs=1e-12)
    _, before = train(model, data, [], settings)
    moved = {name for name in after if not after[name].equal(before[name])}
    assert any("visual.merger" in name for name in moved) and not any("visual.blocks" in name for name in moved)
    assert any("layers.0" in name for name in moved)


def test_settings_change_the_weights(case):
    """From the second epoch on the ratio, the clip and the KL are at work; every option leads elsewhere."""
    model, data, rollouts = case
    settings = {"lr": 2e-3, "inner_epochs": 2}
    options = [
        {},
        {"beta": 0.5},
        {"epsilon": 0.02},
        {"epsilon_high": 0.01},
        {"loss_normalisation": "constant"},
        {"importance_cap": 1.02},
        {"weights": {"format": 1.0}},
        {"temperature": 0.7},
        {"comparison_pairs": 2},
        {"mini_batches": [[0, 1], [2, 3]]},
    ]
    found = [train(model, data, [rollouts], Settings(**settings, **option)) for option in options]
    tables = [weights["model.language_model.embed_tokens.weight"] for _, weights in found]
    for one in range(len(options)):
        for other in range(one):
            assert not tables[one].equal(tables[other]), (options[one], options[other])


def test_a_small_step_lowers_the_loss(case):
    model, data, rollouts = case
    (step,), _ = train(model, data, [rollouts], Settings(lr=1e-5, inner_epochs=2))
    assert step.losses[1] < step.losses[0] - 1e-4
    assert step.grad_norms[0] > 0.01
    (parts,), _ = train(model, data, [rollouts], Settings(lr=0.0, mini_batches=[[0, 2], [3, 1]]))
    assert len(parts.losses) == 2 and parts.losses[0] != parts.losses[1]
    assert parts.advantages.equal(step.advantages)
