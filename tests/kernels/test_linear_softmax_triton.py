"""The passes over logits in Triton: in the interpreter where there is no GPU, natively where there is one."""

import math
import random

import pytest
import torch
from linear_cross_entropy_cases import DTYPES, check_case, make_case

from umer1.ops import linear_softmax_torch
from umer1.ops.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from umer1.ops.linear_softmax import Statistics
from umer1.testing import assert_close

pytest.importorskip("triton")
from umer1_kernels import linear_softmax  # noqa: E402  (only where triton is)
from umer1_kernels.variants import INTERPRETED  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
LARGEST = (60, 300) if INTERPRETED else (600, 5000)  # of one dimension: a row is a program of the interpreter
CASES, TESTS = 20, 25
IMPLS = ("triton",) if INTERPRETED else ("triton", "torch")  # plain torch's products on a GPU are tested here alone
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU and no interpreter")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("part", [0, *(pytest.param(number, marks=pytest.mark.thorough) for number in range(1, TESTS))])
def test_random_cases_equal_fp64(part, impl):
    """On a GPU the gradients' products are from 16-bit operands; the interpreter's are from fp32 ones."""
    start = random.SystemRandom().randrange(1 << 30)
    for seed in range(start, start + CASES):
        case = make_case(seed, DTYPES[:3], LARGEST)
        case = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in case.items()}
        check_case(case, tensor_cores=not INTERPRETED, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1, 4095, 4097, 9001])
def test_passes_equal_torch_in_fp64(columns, dtype):
    """Two blocks with rows that are parts of a wider matrix; the interpreter cuts bf16 off where a GPU rounds."""
    wide = 5 * torch.randn(4, 2 * columns + 3, device=DEVICE)
    blocks = wide[:, :columns], wide[:, columns : 2 * columns]
    place = torch.tensor([0, columns - 1, 2 * columns - 1, -1], device=DEVICE)
    found, want = (Statistics.of_no_column(rows, entropy=True) for rows in (wide, wide.double()))
    for number, block in enumerate(blocks):
        linear_softmax.absorb(block, place, number * columns, 0.7, found)
        linear_softmax_torch.absorb(block.double(), place, number * columns, 0.7, want)
    for name in ("largest", "total", "chosen", "moment"):
        assert_close(name, getattr(found, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    for number, block in enumerate(blocks):
        got = linear_softmax.slopes(block, place, number * columns, 0.7, found, dtype, None)
        slopes = linear_softmax_torch.slopes(block.double(), place, number * columns, 0.7, want, torch.float64, None)
        assert got.dtype == dtype and got.is_contiguous()
        rtol = max(torch.finfo(dtype).eps, 2e-5)
        assert_close("slopes", got, slopes, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_stays_not_finite(bad):
    hidden, weight = torch.randn(6, 8, device=DEVICE), torch.randn(1300, 8, device=DEVICE)
    labels = torch.arange(6, device=DEVICE) * 200
    hidden[4, 2] = bad
    for block_bytes in (1, None):
        own = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = linear_logprobs(*own, labels, entropy=True, block_bytes=block_bytes, impl="triton")
        logprobs.sum().backward()
        total, _ = linear_cross_entropy(hidden, weight, labels, block_bytes=block_bytes, impl="triton")
        assert logprobs.isfinite().tolist() == entropy.isfinite().tolist() == [True] * 4 + [False, True]
        assert not total.isfinite() and own[0].grad.isfinite().all(1).tolist() == [True] * 4 + [False, True]
        assert not own[1].grad.isfinite().any()
