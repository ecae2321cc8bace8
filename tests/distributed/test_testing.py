"""The multi-rank test helper itself: results, tracebacks, timeouts, no processes left behind."""

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist

from umer1.testing import assert_close, run_distributed


def behave(fault: str | None) -> torch.Tensor:
    value = torch.tensor([float(dist.get_rank())])
    if fault == "raise" and dist.get_rank() == 1:
        raise KeyError("the missing thing")
    if fault == "exit" and dist.get_rank() == 1:
        import os

        os._exit(7)
    if fault == "hang" and dist.get_rank() == 1:
        time.sleep(600)
    dist.all_reduce(value)
    return value + dist.get_rank()


def test_results_in_rank_order():
    assert [float(value) for value in run_distributed(behave, 2, None)] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("fault", "timeout", "message"),
    [
        ("raise", 60, "rank 1:(.|\n)*the missing thing"),
        ("exit", 60, "ended without a result, exit code 7"),
        ("hang", 12, "did not end within 12 s|rank 0:"),
    ],
)
def test_faults_are_reported_and_nothing_is_left(fault, timeout, message):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_distributed(behave, 2, fault, timeout=timeout)
    assert time.monotonic() - start < 60
    assert not multiprocessing.active_children()


def test_assert_close_names_what_differs():
    with pytest.raises(AssertionError, match="d_query: largest difference 5.000e-01"):
        assert_close("d_query", torch.tensor([1.5, 2.0]), torch.tensor([1.0, 2.0]), rtol=1e-3)
    with pytest.raises(AssertionError, match="d_query: shape"):
        assert_close("d_query", torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(AssertionError, match="d_query"):
        assert_close("d_query", torch.tensor([torch.nan]), torch.tensor([1.0]))
