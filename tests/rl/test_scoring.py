"""Scoring a step: comparison sets, components, failed and missing rollouts, terms of one's own, configuration."""

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch

from umer1.configuration import load_config, to_yaml
from umer1.errors import ConfigError, UserError
from umer1.ops.rank_margin_reward import rank_margin_reward
from umer1.rl.rewards import format_reward
from umer1.rl.scoring import RewardConfig, RewardTerm, StepRollouts, load_reward, score_step

GOOD, BAD = "<think>a</think><answer>b<gen_emb>", "nothing <gen_emb>"
SIZE, LONGEST = 3, 20


def make_rollouts(pairs: int, *, seed: int = 0, all_there: bool = False) -> StepRollouts:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, pairs * SIZE)
    valid = torch.rand(shape, generator=generator) < (2.0 if all_there else 0.8)
    has_embedding = torch.rand(shape, generator=generator) < (2.0 if all_there else 0.8)
    rows = torch.nn.functional.normalize(torch.randn(*shape, 8, generator=generator), dim=-1)
    rows[~(valid & has_embedding)] = math.nan  # what stands there must not matter
    form = torch.rand(shape, generator=generator) < 0.5
    return StepRollouts(
        responses=[[GOOD if good else BAD for good in side] for side in form.tolist()],
        lengths=torch.randint(0, LONGEST + 1, shape, generator=generator),
        embeddings=rows,
        valid=valid,
        has_embedding=has_embedding,
        target_ids=torch.randint(0, 3, (pairs,), generator=generator),
    )


def score(rollouts: StepRollouts, config: RewardConfig):
    return score_step(rollouts, config, num_generations=SIZE, max_completion_length=LONGEST)


def part(rollouts: StepRollouts, rows: slice, pairs: slice) -> StepRollouts:
    return StepRollouts(
        responses=[side[rows] for side in rollouts.responses],
        lengths=rollouts.lengths[:, rows],
        embeddings=rollouts.embeddings[:, rows],
        valid=rollouts.valid[:, rows],
        has_embedding=rollouts.has_embedding[:, rows],
        target_ids=rollouts.target_ids[pairs],
    )


def test_default_is_format_plus_embedding_for_both_sides():
    rollouts = make_rollouts(4, all_there=True)
    got = score(rollouts, RewardConfig(comparison_pairs=4))
    assert list(got.components) == ["format", "embedding"]
    for side in range(2):
        reward, ranking, margin = rank_margin_reward(rollouts.embeddings[side], rollouts.embeddings[1 - side], SIZE)
        form = format_reward(rollouts.responses[side])
        assert torch.equal(got.components["format"][side], form)
        assert torch.equal(got.components["embedding"][side], reward)
        assert torch.equal(got.ranking[side], ranking) and torch.equal(got.margin[side], margin)
        assert torch.equal(got.total[side], form + reward)


def test_sets_are_consecutive_pairs_and_know_nothing_of_each_other():
    rollouts, names = make_rollouts(8), ("format", "embedding", "ranking", "margin", "threshold", "length")
    terms = [RewardTerm(name=name, weight=0.5 + number) for number, name in enumerate(names)]
    config = RewardConfig(rewards=terms, comparison_pairs=2, exclude_equal_targets=True)
    whole = score(rollouts, config)
    for pair in range(0, 8, 2):
        rows = slice(pair * SIZE, (pair + 2) * SIZE)
        alone = score(part(rollouts, rows, slice(pair, pair + 2)), config)
        assert torch.equal(whole.total[:, rows], alone.total)
        assert all(torch.equal(whole.components[name][:, rows], alone.components[name]) for name in names)
    together = score(rollouts, dataclasses.replace(config, comparison_pairs=8))
    assert not torch.equal(together.total, whole.total)
    weighted = sum((0.5 + number) * whole.components[name] for number, name in enumerate(names))
    torch.testing.assert_close(whole.total, weighted)


def test_failed_and_missing_rollouts_are_left_out_of_every_comparison():
    rollouts = make_rollouts(4)
    got = score(rollouts, RewardConfig(comparison_pairs=4, rewards=[RewardTerm(name=n) for n in ("format", "length")]))
    embedded = rollouts.valid & rollouts.has_embedding
    assert (~rollouts.valid).any() and (rollouts.valid & ~embedded).any()
    for values in (got.components["format"], got.ranking, got.margin):
        assert (values[~embedded] == 0).all() and torch.isfinite(values).all()
    assert (got.total[~rollouts.valid] == 0).all()
    # The length of a response without <gen_emb> still counts.
    missing = rollouts.valid & ~embedded
    assert torch.equal(got.total[missing], -rollouts.lengths[missing].float() / LONGEST)
    for side in range(2):
        clean = [values.nan_to_num() for values in (rollouts.embeddings[side], rollouts.embeddings[1 - side])]
        valid = dict(query_valid=embedded[side], target_valid=embedded[1 - side])
        assert torch.equal(got.ranking[side], rank_margin_reward(*clean, SIZE, **valid)[1])


def test_equal_targets_are_left_out_only_when_asked():
    rollouts = dataclasses.replace(make_rollouts(6, all_there=True), target_ids=torch.tensor([7, 8, 7, 9, 9, 8]))
    plain, other = (score(rollouts, RewardConfig(comparison_pairs=3, exclude_equal_targets=on)) for on in (False, True))
    assert not torch.equal(plain.margin, other.margin)
    for start in (0, 3):
        rows = slice(start * SIZE, (start + 3) * SIZE)
        query, target = rollouts.embeddings[:, rows]
        _, _, margin = rank_margin_reward(query, target, SIZE, target_ids=rollouts.target_ids[start : start + 3])
        assert torch.equal(other.margin[0, rows], margin)


def test_rollouts_that_are_no_whole_sets():
    with pytest.raises(ValueError, match="sets of 9"):
        score(make_rollouts(4), RewardConfig(comparison_pairs=3))


def shortest_first(inputs):
    """A term as a user would write it."""
    return 1.0 / (1.0 + inputs.lengths) + inputs.side


def too_short(inputs):
    return inputs.lengths[:-1].float()


def no_tensor(inputs):
    return [0.0] * len(inputs.responses)


def not_finite(inputs):
    return torch.where(inputs.lengths == inputs.lengths.max(), math.nan, 0.0)


def test_a_term_of_ones_own():
    rollouts = make_rollouts(4, all_there=True)
    config = RewardConfig(rewards=[RewardTerm(name=f"{__name__}:shortest_first", weight=2.0)], comparison_pairs=2)
    assert not config.violations()
    got = score(rollouts, config)
    want = 2.0 / (1.0 + rollouts.lengths) + torch.tensor([[0.0], [2.0]])
    torch.testing.assert_close(got.total, want)


@pytest.mark.parametrize(
    "name,message", [("too_short", "shape \\(11,\\)"), ("no_tensor", "a list"), ("not_finite", "not finite")]
)
def test_a_term_that_returns_nonsense_is_named(name, message):
    rollouts = make_rollouts(4, all_there=True)
    config = RewardConfig(rewards=[RewardTerm(name=f"{__name__}:{name}")], comparison_pairs=4)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        score(rollouts, config)


def test_embeddings_that_are_not_finite_are_an_error():
    rollouts = make_rollouts(4, all_there=True)
    rollouts.embeddings[0, 5] = math.nan
    with pytest.raises(UserError, match="embedding is not finite"):
        score(rollouts, RewardConfig(comparison_pairs=4))


@pytest.mark.parametrize(
    "name,message",
    [
        ("formt", "no reward; use format, embedding"),
        (":f", "no reward"),
        ("nowhere_at_all:f", "nowhere_at_all cannot be imported.*PYTHONPATH"),
        ("math:nothing", "math has no function nothing"),
        ("math:pi", "math has no function pi"),
    ],
)
def test_a_reward_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


def test_a_module_that_fails_is_a_message(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="broken_reward cannot be imported .ZeroDivisionError"):
        load_reward("broken_reward:f")


def test_configuration_says_all_that_is_wrong():
    terms = [("format", math.inf), ("format", 1.0), ("nowhere_at_all:f", 1.0)]
    config = RewardConfig(
        rewards=[RewardTerm(name=name, weight=weight) for name, weight in terms],
        comparison_pairs=1,
        reward_similarity_threshold=1.5,
    )
    assert len(config.violations()) == 5
    assert not RewardConfig().violations()
    assert "empty" in RewardConfig(rewards=[]).violations()[0]
    assert "all weights are 0" in RewardConfig(rewards=[RewardTerm(name="format", weight=0.0)]).violations()[0]


def test_global_batch_is_a_multiple_of_the_comparison_set():
    config = RewardConfig()
    assert not config.batch_violations(16) and not config.batch_violations(64)
    assert config.batch_violations(24) == [
        "global_batch_size=24 is not a multiple of comparison_pairs=16; use --comparison-pairs 12, or "
        "--global-batch-size 32"
    ]
    assert not config.batch_violations(13) and config.pairs_compared(13) == 13  # fewer than 16: all of them
    (wrong,) = RewardConfig(comparison_pairs=8).batch_violations(13)
    assert "--comparison-pairs 13" not in wrong and "--global-batch-size 16" in wrong


@dataclass(kw_only=True, slots=True)
class Config:
    reward: RewardConfig = field(default_factory=RewardConfig)

    def violations(self):
        return self.reward.violations()


def test_flags_and_yaml(tmp_path):
    config = load_config(
        Config, ["--rewards", "[{name: margin, weight: 2}, {name: length}]", "--comparison-pairs", "4"]
    )
    assert config.reward.rewards == [RewardTerm(name="margin", weight=2.0), RewardTerm(name="length", weight=1.0)]
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Config, ["--config", str(path)]) == config
    with pytest.raises(ConfigError, match="'fromat' is no reward"):
        load_config(Config, ["--rewards", "[{name: fromat}]"])
