"""Operations inside a function that torch.compile takes: a graph break is allowed, another number is not."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compiling

from umer1.ops.infonce import infonce
from umer1.ops.rank_margin_reward import rank_margin_reward, rank_margin_rewards


@pytest.fixture(autouse=True)
def compiled():
    with compiling():
        yield


@pytest.mark.parametrize("with_negatives", [False, True])
def test_infonce(with_negatives):
    generator = torch.Generator().manual_seed(3)
    query, key, negatives = (torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(3))

    def caller(query, key, negatives):
        query, key, negatives = (F.normalize(2 * rows, dim=-1) for rows in (query, key, negatives))
        more = {"negatives": negatives} if with_negatives else {}
        return 3 * infonce(query, key, temperature=0.05, **more) + query.sum()

    def run(function):
        leaves = [rows.clone().requires_grad_() for rows in (query, key, negatives)]
        loss = function(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]

    want, got = run(caller), run(torch.compile(caller, backend="aot_eager"))
    for expected, found in zip(want, got, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_rewards(both):
    generator = torch.Generator().manual_seed(4)
    query, target = (torch.randn(8, 5, generator=generator) for _ in range(2))

    def caller(query, target):
        query, target = F.normalize(query, dim=-1), F.normalize(target, dim=-1)
        found = rank_margin_rewards(query, target, 2) if both else [rank_margin_reward(query, target, 2)]
        return [side.reward + side.ranking - side.margin for side in found]

    for expected, found in zip(
        caller(query, target), torch.compile(caller, backend="aot_eager")(query, target), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
