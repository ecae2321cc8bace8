"""The CUDA kernels of the gather, run on the CPU thread by thread (cuda_on_cpu.h), against the C++ form in fp64."""

import ctypes
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from umer1.ops import gather_hidden_compiled
from umer1.testing import assert_close

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
RUN_CHUNK = 64  # kRunChunk of the kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    gather_hidden_compiled.register()
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, HERE / "gather_hidden_on_cpu.cpp", "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def call(function, *arguments):
    """Tensors as pointers, integers as int64, floats as double, bools as int."""
    kinds = {bool: ctypes.c_int, int: ctypes.c_int64, float: ctypes.c_double, type(None): ctypes.c_void_p}
    pointers = [ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else kinds[type(x)](x) for x in arguments]
    return function(*pointers)


def check_case(kernels, form: str, seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    threads = draw.choice([32, 64])
    columns = 2 * draw.randint(1, 2 * threads) if form == "wide" else draw.randint(1, 200)
    steps, batch, count = draw.randint(1, 6), draw.randint(1, 2), draw.choice([5, 64, 65, 130, 300])
    hidden, offset = randn(batch, steps, columns).transpose(0, 1), draw.randint(0, 2)
    total, eps, l2_normalize = steps * batch + offset + 1, 1e-6, draw.random() < 0.5
    index = torch.randint(0, draw.choice([1, total]), (count,), generator=generator)
    weight = randn(columns) if draw.random() < 0.5 else None

    want, rows = torch.ops.umer1.gather_rows(hidden, index, weight, eps, l2_normalize, True, offset, total)
    out, kept, bad = torch.full_like(want, 7), torch.full_like(rows, 7), torch.zeros(1, dtype=torch.int64)
    layout = torch.tensor([steps * batch, batch, hidden.stride(0), hidden.stride(1), offset, total])
    gather, scatter = getattr(kernels, f"gather_{form}"), getattr(kernels, f"scatter_{form}")
    assert not call(gather, hidden, layout, index, count, weight, eps, l2_normalize, columns, out, kept, bad, threads)
    assert_close(f"seed {seed} out", out, want, rtol=1e-12)
    assert torch.equal(kept, rows), seed

    grad = randn(count, columns)
    sorted_index, order = torch.sort(index, stable=True)
    want, weight_want = torch.ops.umer1.scatter_rows(
        grad, rows, sorted_index, order, weight, eps, l2_normalize, steps, batch, offset
    )
    blocks = count if weight is None else min(count, 37)  # fewer than rows: blocks take several
    out, parts = torch.zeros_like(want), torch.zeros(blocks, columns, dtype=torch.float64)
    pieces = torch.full((2 * math.ceil(count / RUN_CHUNK), columns), torch.nan, dtype=torch.float64)
    call(
        scatter,
        *(grad, rows, sorted_index, order, pieces, weight, eps, l2_normalize, count, columns, offset, steps * batch),
        *(out, parts, blocks, threads),
    )
    assert_close(f"seed {seed} hidden gradient", out, want, rtol=1e-11, atol=1e-12)
    if weight is not None:
        assert_close(f"seed {seed} norm_weight gradient", parts.sum(0), weight_want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_kernels_equal_the_cpu_form(kernels, form):
    first = random.SystemRandom().randrange(1 << 30)
    for seed in range(first, first + 15):
        check_case(kernels, form, seed)


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_an_index_out_of_range_is_reported_and_its_row_is_nan(kernels, form):
    hidden, out = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    layout, index = torch.tensor([3, 1, 4, 4, 0, 4]), torch.tensor([-5, 2, 3])
    bad = torch.zeros(1, dtype=torch.int64)
    found = call(getattr(kernels, f"gather_{form}"), hidden, layout, index, 3, None, 0.0, False, 4, out, None, bad, 32)
    assert found and bad.item() == -5
    assert out[0].isnan().all() and (out[1] == 1).all() and (out[2] == 0).all()
