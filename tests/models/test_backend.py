"""The choice of layers and of the attention kernel."""

import pytest
import torch

from umer1 import device
from umer1.errors import UserError
from umer1.models.backend import uses_te_attention


def test_the_choice_follows_the_machine_and_an_impossible_wish_is_refused(monkeypatch):
    monkeypatch.setattr(device, "has_te", lambda: False)
    assert not uses_te_attention("auto") and not uses_te_attention("sdpa")
    with pytest.raises(UserError, match="core_attention=te needs a CUDA device and the package transformer_engine"):
        uses_te_attention("te")
    monkeypatch.setattr(device, "has_te", lambda: True)
    assert uses_te_attention("auto") and uses_te_attention("te") and not uses_te_attention("sdpa")


def test_device_backend_and_dtype_belong_together():
    cuda = device.device().type == "cuda"
    assert device.backend() == ("nccl" if cuda else "gloo")
    assert device.default_dtype() == (torch.bfloat16 if cuda else torch.float32)
    assert device.memory_gib() >= 0
