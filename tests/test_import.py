"""Importing umer1, with megatron-core behind it, leaves the process as it was."""

import subprocess
import sys

import pytest

SCRIPT = """
import importlib, os, sys, warnings
import torch
from torch._dynamo.utils import counters
before = torch.compile, [type(finder) for finder in sys.meta_path], list(warnings.filters)
for name in MODULES:
    importlib.import_module(name)
assert "TORCHDYNAMO_DISABLE" not in os.environ
assert torch.compile is before[0]
mine = [finder for finder in sys.meta_path if type(finder).__module__.partition(".")[0] == "umer1"]
assert not mine, mine
new = [entry for entry in warnings.filters if entry not in before[2]]
assert not [entry for entry in new if "megatron" in str(entry[3]) or "deprecated" in str(entry[1])], new
compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
assert torch.equal(compiled(torch.ones(3)), torch.ones(3).sin() + 1)
assert counters["stats"]["unique_graphs"] == 1, counters
"""


@pytest.mark.parametrize("modules", [("umer1",), ("umer1", "umer1.training.sft", "umer1.training.grpo")], ids=len)
def test_nothing_is_changed_and_torch_compile_compiles(modules, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("MODULES", repr(modules)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr and "Transformer Engine" not in done.stderr
