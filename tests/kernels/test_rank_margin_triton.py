"""The reward's Triton kernels against fp64: in the interpreter where there is no GPU, natively where there is one."""

import math
import secrets

import numpy as np
import pytest
import torch
from rank_margin_reference import Case, draw_case, with_tolerance

from umer1.ops.rank_margin_reward import rank_margin_reward, rank_margin_rewards

pytest.importorskip("triton")
from umer1_kernels import rank_margin  # noqa: E402  (only where triton is)
from umer1_kernels.variants import INTERPRETED  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# A GPU compiles a kernel for each size of a group, which takes seconds: few cases, in tests that can run side by side.
CASES, TESTS = (100, 5) if INTERPRETED else (5, 6)
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# Errors of fp32 sums of up to 70 products of unit vectors; distinct similarities that are closer may swap their ranks.
SIMILARITY_ERROR = 2e-6
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU and no interpreter")


def on_device(case: Case) -> tuple:
    options = {name: value.to(DEVICE) for name, value in case.options.items()}
    return (case.query.to(DEVICE), case.target.to(DEVICE), case.size), options


def plain_margin_error(case: Case, margin: np.ndarray) -> float:
    """The largest error of the margins that torch finds in fp32, from a matrix product of fp32 numbers."""
    part = {name: torch.from_numpy(value) for name, value in case.arrays().items()}
    similarity = case.query.float() @ case.target.float().T
    pair = torch.arange(len(similarity)) // case.size
    own = (pair[:, None] == pair) & part["target_valid"]
    other = (part["target_ids"][pair][:, None] != part["target_ids"][pair]) & part["target_valid"]
    means = [(similarity * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in (own, other)]
    scored = part["query_valid"] & own.any(1)
    return float(np.abs(torch.where(scored, means[0] - means[1], 0.0).double().numpy() - margin).max())


def assert_equals_reference(case: Case, got) -> int:
    """Compare one side; returns how many rankings round-off could have changed."""
    reward, ranking, margin = (values.cpu().double().numpy() for values in got)
    low, high, want = with_tolerance(case, SIMILARITY_ERROR)
    assert all(values.dtype == torch.float32 for values in got), case
    scale = float(case.query.double().norm(dim=1).max() * case.target.double().norm(dim=1).max())
    error = np.abs(margin - want).max()
    assert error <= 2 * plain_margin_error(case, want) + 4 * 2.0**-24 * scale, f"{case}: margin off by {error}"
    inside = (ranking >= low - 1e-7) & (ranking <= high + 1e-7)
    assert inside.all(), f"{case}: rankings of rows {np.flatnonzero(~inside).tolist()}"
    np.testing.assert_allclose(reward, ranking * margin, rtol=2.0**-22, atol=1e-30, err_msg=f"{case}: reward")
    return int((low != high).sum())


def more(number: int):
    """A parameter of which the first one is enough where all are compiled alike."""
    return pytest.param(number, marks=pytest.mark.thorough) if INTERPRETED and number else number


@pytest.fixture(autouse=True)
def sums_do_not_depend_on_the_place(monkeypatch):
    """Equal rows must have equal products wherever they stand in a tile, as on a GPU.

    The interpreter multiplies by NumPy, whose BLAS sums the rows at a tile's edge in another order on some processors.
    In fp64, rounded once, they are equal.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("part", map(more, range(TESTS)))
def test_random_cases_equal_fp64(part):
    """Both sides from one launch; every 25th case has several tiles in either direction."""
    rankings = unclear = 0
    for number in range(CASES):
        case = draw_case(secrets.randbits(32), 40 if number % 25 == 0 else 8, 70, NARROW)
        arguments, options = on_device(case)
        for side, got in zip(
            (case, case.swapped()), rank_margin_rewards(*arguments, impl="triton", **options), strict=True
        ):
            unclear += assert_equals_reference(side, got)
            rankings += len(case.query)
    assert unclear < rankings / 20, "too many similarities close to each other: the rankings were hardly tested"


def test_one_side_alone_is_the_same():
    for size in (1, 3, 9):
        query, target = torch.randn(2, 27, 20, device=DEVICE)
        alone = rank_margin_reward(query, target, size, "triton")
        both = rank_margin_rewards(query, target, size, "triton")
        swapped = rank_margin_reward(target, query, size, "triton")
        assert all(map(torch.equal, alone, both[0])), size
        # The other way round the same similarities stand in other tiles: they may differ by round-off.
        torch.testing.assert_close(swapped.margin, both[1].margin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", NARROW)
def test_copies_tie_in_every_tile(dtype):
    """Three vectors, each many times, in tiles that are cut by the edge too: only the index tells them apart."""
    generator = torch.Generator().manual_seed(secrets.randbits(32))
    few = torch.nn.functional.normalize(torch.randn(3, 147, generator=generator), dim=-1).to(dtype)
    query, target = few[torch.randint(0, 3, (2, 75), generator=generator)]
    case = Case(seed=0, kind="copies", size=5, query=query, target=target, options={})
    arguments, _ = on_device(case)
    for side, got in zip((case, case.swapped()), rank_margin_rewards(*arguments, "triton"), strict=True):
        low, high, _ = with_tolerance(side, SIMILARITY_ERROR)
        assert (low == high).all()
        np.testing.assert_allclose(got.ranking.cpu().numpy(), low, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_no_reward_look_good(value):
    """As in plain torch: a bad target spoils all it is compared with, a bad query itself, an invalid one nothing."""
    query, target = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(secrets.randbits(32))).to(DEVICE)
    ids = torch.tensor([0, 0, 1, 2], device=DEVICE)
    clean = rank_margin_rewards(query, target, 3, "triton", target_ids=ids)
    bad = target.clone()
    bad[4, 2] = value
    got, other = rank_margin_rewards(query, bad, 3, "triton", target_ids=ids)
    spoilt = torch.arange(12, device=DEVICE) >= 3  # pair 0 has pair 1's id and is not compared with it
    assert got.reward[spoilt].isnan().all() and got.ranking[spoilt].isnan().all()
    assert not got.margin[spoilt].isfinite().any()
    assert all(torch.equal(values[~spoilt], want[~spoilt]) for values, want in zip(got, clean[0], strict=True))
    itself = torch.arange(12, device=DEVICE) == 4
    assert other.reward.isnan().equal(itself) and other.ranking.isnan().equal(itself)
    assert other.margin.isfinite().equal(~itself)
    valid = dict(target_valid=~itself)
    got = rank_margin_rewards(query, bad, 3, "triton", **valid)
    for side, want in zip(got, rank_margin_rewards(query, target, 3, "triton", **valid), strict=True):
        assert all(map(torch.equal, side, want))


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter: needs a GPU")
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("pairs,dimension", [(16, 1536), (256, 1536), (255, 1535)])
def test_sizes_that_are_trained_equal_torch(pairs, dimension, dtype):
    """Copies among the targets, so that there are ties between tiles; few other similarities are that close."""
    rows = pairs * 8
    query, target = torch.nn.functional.normalize(torch.randn(2, rows, dimension, device=DEVICE), dim=-1).to(dtype)
    target = target[torch.randint(0, rows // 2, (rows,), device=DEVICE)]
    got = rank_margin_rewards(query, target, 8, "triton")
    for side, want in zip(got, rank_margin_rewards(query, target, 8, "torch"), strict=True):
        torch.testing.assert_close(side.margin, want.margin, rtol=1e-4, atol=2e-6)
        assert (side.ranking != want.ranking).float().mean() < 1e-3  # similarities closer than fp32 tells apart


def test_inputs_need_not_be_contiguous():
    query, target = torch.randn(2, 7, 12, device=DEVICE)
    got = rank_margin_reward(query.T, target.T, 4, "triton")
    want = rank_margin_reward(query.T.contiguous(), target.T.contiguous(), 4, "triton")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("rows,columns", [(16, 16), (32, 16), (64, 64), (128, 64)])
def test_the_tiles_of_own_pairs_are_enough(rows, columns):
    """The second dimension of the first launch: the tiles that hold the pairs of one block of rows."""
    form = rank_margin.Config(rows, columns, 32, 4, 3)
    for size in (*range(1, 140), 192, 256, 300, 512):
        most = 0
        for first in range(0, 6 * rows * size, rows)[:200]:
            columns_of_pairs = first // size * size, ((first + rows - 1) // size + 1) * size
            most = max(most, (columns_of_pairs[1] - 1) // columns - columns_of_pairs[0] // columns + 1)
        assert most <= rank_margin.own_tiles(size, form) <= most + 3, size
