"""Every shipped Triton kernel compiled for GPUs that this machine need not have, by tests/kernels/aot.py.

The report of each form (registers, spills, shared memory, tensor-core instructions) is printed: `pytest -s`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

TESTED_TRITON = "3.9."  # whether registers spill is up to the version: only this one's spills fail
TUNED = (80, 90)  # for Blackwell nothing has been chosen yet but that it fits: its spills are printed, no failure
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
WIDE = 64  # rows from which a product takes the chip's own tensor-core instructions; smaller ones take HMMA


def compiled_forms(arch: int) -> list[dict]:
    """The lines of aot.py, from a process that compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "--arch", str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def problems(form: dict) -> list[str]:
    """What makes a form unfit to ship."""
    found = []
    spills = form["stack"] or form["LDL"] or form["STL"]
    if spills and form["arch"] in TUNED and triton.__version__.startswith(TESTED_TRITON):
        found.append(f"spills: {form['stack']} bytes of stack, {form['LDL']} loads, {form['STL']} stores")
    if form["shared"] > SHARED_LIMIT[form["arch"]]:
        found.append(f"{form['shared']} bytes of shared memory, {SHARED_LIMIT[form['arch']]} are to be had")
    if form["product_rows"]:
        wanted = TENSOR_CORES[form["arch"]] if form["product_rows"] >= WIDE else "HMMA"
        if not form[wanted]:
            found.append(f"products of {form['product_rows']} rows without {wanted}")
    return [f"{form['module']}: {form['name']} for sm_{form['arch']}: {problem}" for problem in found]


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.thorough) for arch in (80, 100))])
def test_kernels_compile(arch):
    forms = compiled_forms(arch)
    for form in forms:
        print(form)
    assert {"infonce_variants", "linear_softmax", "rank_margin"} <= {form["module"] for form in forms}
    assert not [problem for form in forms for problem in problems(form)]


def test_an_unfit_form_is_found():
    fit = dict(module="m", name="n", arch=90, stack=0, LDL=0, STL=0, shared=1000, product_rows=128, HGMMA=4, HMMA=0)
    assert problems(fit) == []
    assert "shared memory" in problems(fit | dict(shared=240_000))[0]
    assert "without HGMMA" in problems(fit | dict(HGMMA=0, HMMA=8))[0]
    assert "without HMMA" in problems(fit | dict(product_rows=32))[0]
    if triton.__version__.startswith(TESTED_TRITON):
        assert "spills" in problems(fit | dict(stack=8))[0]
