"""InfoNCE over ranks against the formula on one process, in fp64: loss and the gradient of every embedding."""

import math

import pytest
import torch
import torch.distributed as dist

from umer1.losses.contrastive import LossConfig, contrastive_gradients, infonce_reference, local_infonce
from umer1.testing import assert_close, run_distributed

TEMPERATURE = 0.05


def make_batch(pairs: int, negatives: int, seed: int = 0, equal: bool = False):
    """[2, S, D] embeddings (disc, gen) in the order queries, positives, negatives, and target ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 2 * pairs + negatives, 24, generator=generator, dtype=torch.float64)
    ids = torch.arange(pairs + negatives)
    if equal:
        ids = torch.randint(0, max(2, pairs // 2), (pairs + negatives,), generator=generator)
    return torch.nn.functional.normalize(rows, dim=-1), ids


def reference(rows: torch.Tensor, pairs: int, weights, ids=None):
    """Loss and gradients by autograd through the formula."""
    leaf = rows.clone().requires_grad_()
    log_scale = torch.tensor(-math.log(TEMPERATURE), dtype=torch.float64, requires_grad=True)
    losses = []
    for kind in leaf:
        query, positive, negative = kind.split([pairs, pairs, kind.shape[0] - 2 * pairs])
        temperature = torch.exp(-log_scale)
        losses.append(infonce_reference(query, positive, negative, temperature=temperature, target_ids=ids))
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return torch.stack(losses).detach(), *torch.autograd.grad(total, (leaf, log_scale))


@pytest.mark.parametrize("pairs,negatives,equal", [(1, 0, False), (7, 0, False), (6, 5, False), (9, 4, True)])
def test_one_process_equals_the_formula(pairs, negatives, equal):
    rows, ids = make_batch(pairs, negatives, seed=pairs, equal=equal)
    weights = (1.0, 0.5)
    losses, gradient, scale_gradient = reference(rows, pairs, weights, ids if equal else None)
    got = contrastive_gradients(
        rows,
        pairs,
        weights,
        log_scale=torch.tensor(-math.log(TEMPERATURE), dtype=torch.float64),
        num_pairs=pairs,
        group=None,
        target_ids=ids if equal else None,
    )
    assert_close("losses", got.losses, losses, rtol=1e-6)
    assert_close("embeddings", got.embeddings, gradient, rtol=1e-10)
    assert_close("logit scale", got.logit_scale, scale_gradient, rtol=1e-10)


def test_hand_computed_two_pairs():
    """q1 = p1 = e1, q2 = p2 = e2: both directions give log(1 + exp(-1/t)) for each pair."""
    eye = torch.eye(2, dtype=torch.float64)
    loss, statistics = local_infonce(eye, eye, eye[:0], logit_scale=2.0, num_pairs=2, group=None)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)))
    assert statistics.tolist() == [2.0, 2.0, 0.0, 2.0]  # positives' sum, hits, negatives' sum and count


def test_masked_targets_are_no_negatives():
    """With every target equal nothing is left to compare with: the loss is 0 although the similarities are not."""
    rows, _ = make_batch(5, 0)
    ids = torch.zeros(5, dtype=torch.int64)
    loss, statistics = local_infonce(
        rows[0, :5], rows[0, 5:], rows[0, :0], logit_scale=20.0, num_pairs=5, group=None, target_ids=ids
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert statistics[3] == 0


SPLITS = {1: [(5, 3)], 2: [(3, 0), (3, 4)], 4: [(1, 2), (3, 0), (2, 1), (2, 5)]}  # (pairs, negatives) by rank


def rank_share(world: int, equal: bool):
    """This rank's part of one global batch: its losses, gradients and the gathered order."""
    splits = SPLITS[world]
    pairs, negatives = sum(p for p, _ in splits), sum(n for _, n in splits)
    rows, ids = make_batch(pairs, negatives, seed=3, equal=equal)
    rank = dist.get_rank()
    before_p, before_n = sum(p for p, _ in splits[:rank]), sum(n for _, n in splits[:rank])
    own_p, own_n = splits[rank]
    index = torch.cat(
        [
            torch.arange(before_p, before_p + own_p),
            pairs + torch.arange(before_p, before_p + own_p),
            2 * pairs + torch.arange(before_n, before_n + own_n),
        ]
    )
    share = contrastive_gradients(
        rows[:, index],
        own_p,
        (1.0, 0.5),
        log_scale=torch.tensor(-math.log(TEMPERATURE), dtype=torch.float64),
        num_pairs=pairs,
        group=dist.group.WORLD,
        target_ids=ids[index[own_p:] - pairs] if equal else None,
    )
    losses, gradient, scale_gradient = reference(rows, pairs, (1.0, 0.5), ids if equal else None)
    total, scale = share.losses.clone(), share.logit_scale.clone()
    dist.all_reduce(total)
    dist.all_reduce(scale)
    assert_close("losses", total, losses, rtol=1e-6)
    assert_close("embeddings", share.embeddings, gradient[:, index], rtol=1e-10)
    assert_close("logit scale", scale, scale_gradient, rtol=1e-10)
    return True


def all_shares(world: int):
    """Both maskings, and ranks of which none has a row."""
    nothing = torch.zeros(1, 0, 3)
    share = contrastive_gradients(nothing, 0, (1.0,), log_scale=torch.tensor(0.0), num_pairs=1, group=dist.group.WORLD)
    assert share.embeddings.shape == (1, 0, 3) and share.losses.tolist() == [0.0] and not share.statistics.any()
    return rank_share(world, False) and rank_share(world, True)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_ragged_rows_equal_one_process(world):
    assert run_distributed(all_shares, world, world) == [True] * world


def test_a_wrong_gradient_would_be_seen():
    """The comparison above fails on the classical fault, a gradient too small by the number of ranks."""
    rows, _ = make_batch(4, 0)
    _, gradient, _ = reference(rows, 4, (1.0, 1.0))
    with pytest.raises(AssertionError):
        assert_close("embeddings", gradient / 2, gradient, rtol=1e-10)


def test_loss_config_says_all_that_is_wrong():
    config = LossConfig(variant="ume", contrastive_temperature=0.0, ce_weight=-1.0)
    assert len(config.violations()) == 3
    assert not LossConfig(variant="dume").violations()
    assert LossConfig(variant="dume").weights() == (1.0, 0.0, 0.0)
