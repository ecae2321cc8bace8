"""The choice of layers and of the attention kernel."""

import pytest
import torch

from umer1 import device
from umer1.errors import UserError
from umer1.models.backend import uses_te_attention


def test_the_choice_follows_the_machine_and_an_impossible_wish_is_refused(monkeypatch):
    bf16, fp32 = torch.bfloat16, torch.float32
    monkeypatch.setattr(device, "has_te", lambda: False)
    assert not uses_te_attention("auto", bf16) and not uses_te_attention("sdpa", bf16)
    with pytest.raises(UserError, match="core_attention=te needs a CUDA device, the package transformer_engine"):
        uses_te_attention("te", bf16)
    monkeypatch.setattr(device, "has_te", lambda: True)
    assert uses_te_attention("auto", bf16) and uses_te_attention("te", bf16) and not uses_te_attention("sdpa", bf16)
    assert not uses_te_attention("auto", fp32)
    with pytest.raises(UserError, match="weights of 16 bits, these are torch.float32"):
        uses_te_attention("te", fp32)


def test_device_backend_and_dtype_belong_together():
    cuda = device.device().type == "cuda"
    assert device.backend() == ("nccl" if cuda else "gloo")
    assert device.default_dtype() == (torch.bfloat16 if cuda else torch.float32)
    assert device.memory_gib() >= 0
