"""Transformer Engine that is installed and does not load: one message where it is asked for, local layers elsewhere."""

import importlib.util
import sys

import umer1.megatron_import  # noqa: F401

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from umer1 import device, optional_te
from umer1.errors import UserError
from umer1.models import backend
from umer1.models.fp8 import FP8Config

NO_CUDNN = "raise OSError('libcudnn.so.9: cannot open shared object file')"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package of that name on the search path; a list in it counts how often it was run."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == optional_te.PACKAGE]:
            del sys.modules[name]

    def install(whole: str, for_torch: str) -> list:
        package = tmp_path / optional_te.PACKAGE
        package.mkdir()
        (package / "__init__.py").write_text(f"import sys\nsys.te_runs.append(1)\n{whole}\n")
        (package / "pytorch.py").write_text(for_torch)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "te_runs", [], raising=False)
        monkeypatch.setattr(optional_te, "_fault", None)
        forget()
        return sys.te_runs

    yield install
    forget()


def test_one_that_loads_is_as_it_was(installed):
    runs = installed("answer = 42", "")
    assert optional_te.load_fault() is None and len(runs) == 1
    module = importlib.import_module(optional_te.PACKAGE)
    assert module.answer == 42 and type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__.loader is module.__loader__


@pytest.mark.parametrize(
    ("whole", "for_torch", "cause"),
    [
        (NO_CUDNN, "", "OSError: libcudnn.so.9"),
        ("", "raise ImportError('undefined symbol: _ZN3c105')", "ImportError: undefined symbol: _ZN3c105"),
    ],
    ids=["a library is missing", "built for another torch"],
)
def test_a_broken_one_is_absent_for_everybody(installed, whole, for_torch, cause):
    runs = installed(whole, for_torch)
    before = list(sys.meta_path)
    assert optional_te.load_fault() is not None  # as before megatron-core's import
    for name in (optional_te.PACKAGE, f"{optional_te.PACKAGE}.pytorch"):  # as its modules ask, each for itself
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert len(runs) == 1 and sys.meta_path == before
    assert f"is installed and does not load ({cause}" in optional_te.load_fault()
    assert "pip install" in optional_te.load_fault()


def test_who_asks_for_it_is_told_and_who_does_not_gets_local_layers(installed, monkeypatch, caplog):
    installed(NO_CUDNN, "")
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "has_te", device.has_te.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (problem,) = FP8Config(fp8_format="hybrid").machine_violations()
    with pytest.raises(UserError) as caught:
        backend.uses_te_attention("te", torch.bfloat16)
    for text in (problem, str(caught.value)):
        assert "libcudnn.so.9" in text and "pip install" in text
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, params_dtype=torch.bfloat16, normalization="RMSNorm"
    )
    layers = [
        backend.block_submodules(config, 1, causal=True, final_norm=True, core_attention="auto") for _ in range(2)
    ]
    assert all(found.layer_specs[0].submodules.input_layernorm is backend.RMSNorm for found in layers)
    assert len(caplog.messages) == 1 and "libcudnn.so.9" in caplog.text
