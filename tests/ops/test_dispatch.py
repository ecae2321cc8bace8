"""`auto` takes a kernel only where a record shows that it wins."""

import pytest

from umer1.errors import UserError
from umer1.ops import dispatch


def test_auto_is_plain_torch_until_a_record_shows_more(monkeypatch):
    obstacles = {"triton": None, "cuda": "not built", "torch": None}
    assert dispatch.choose("some_op", "auto", obstacles) == "torch"
    assert dispatch.choose("some_op", "triton", obstacles) == "triton"
    monkeypatch.setattr(dispatch, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setitem(dispatch.PROVEN, ("some_op", "triton"), frozenset({"NVIDIA H200"}))
    assert dispatch.choose("some_op", "auto", obstacles) == "triton"
    assert dispatch.choose("another_op", "auto", obstacles) == "torch"
    assert dispatch.choose("some_op", "auto", {"triton": "no triton", "torch": None}) == "torch"
    monkeypatch.setattr(dispatch, "device_name", lambda: "NVIDIA H100")
    assert dispatch.choose("some_op", "auto", obstacles) == "torch"


def test_what_cannot_run_is_refused_by_name():
    with pytest.raises(UserError, match="must be one of auto, torch, triton, cuda"):
        dispatch.choose("some_op", "fast", {"torch": None})
