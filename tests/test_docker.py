"""docker/: the script that tries the image's pins, on small indexes of its own; the Dockerfile's files are there."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from umer1.rl.engines import vllm_install
from umer1.rl.engines.vllm_process import server_command

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("check_pins", ROOT / "docker" / "check_pins.py")
check_pins = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_pins)

FILES = {
    "docker/Dockerfile": "ARG BASE=image:1@sha256:0\nFROM ${BASE}\nARG PYTHON=3.12\nARG APEX_COMMIT=abc\n",
    "docker/base.txt": "# of the image\ntorch==2.13.0a0+nv\n",
    "docker/training.txt": "-r ../requirements/cuda.txt\nav==18.1.0\n",
    "docker/vllm.txt": "vllm==0.32.0\ntorch==2.13.0\ntransformers==5.17.0\ntokenizers==0.23.3\n",
    "requirements/cuda.txt": "transformers==5.17.0\ntokenizers==0.23.3  # pinned\npillow>=11\n",
    "pyproject.toml": """[project]
dependencies = ["torch>=2.11,<2.14", "transformers>=5.17,<5.18", "pillow>=11"]
optional-dependencies = { rollout = ["vllm==0.32.0"] }
""",
}
INDEX = {
    ("torch", "2.13.0"): (),
    ("torch", "2.12.0"): (),
    ("transformers", "5.17.0"): ("tokenizers<0.24,>=0.23",),
    ("tokenizers", "0.23.3"): (),
    ("tokenizers", "0.22.0"): (),
    ("pillow", "12.0"): (),
    ("av", "18.1.0"): (),
    ("vllm", "0.32.0"): ("torch==2.13.0", "transformers<5.20"),
}


@pytest.fixture
def make(tmp_path):
    """make({file: text}, {package: requires}) -> (folder, pip's options), with those changed or, if None, left out."""

    def make(files: dict = {}, index: dict = {}):  # noqa: B006
        for name, text in (FILES | files).items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        for (name, version), requires in (INDEX | index).items():
            if requires is not None:
                check_pins.stand_in(wheels, name, version, requires)
        return tmp_path, ["--no-index", f"--find-links={wheels}"]

    return make


def test_pins_that_fit(make, capsys):
    assert check_pins.check(*make()) == 0
    out = capsys.readouterr().out
    assert "training: 3 pins exist, and 5 packages in all" in out and "vllm: 4 pins exist, and 4 packages" in out
    assert "image:1@sha256:0" in out and "apex abc" in out and "PROBLEM" not in out


def test_all_that_is_wrong_is_told_at_once(make, capsys):
    """A version that does not exist; one that the other does not take; environments that differ."""
    files = {
        "docker/vllm.txt": "vllm==0.32.0\ntorch==2.12.0\ntransformers==5.17.0\ntokenizers==0.22.0\n",
        "docker/training.txt": "-r ../requirements/cuda.txt\nav==18.2.0\nnobody==1\n",
        "pyproject.toml": FILES["pyproject.toml"].replace("vllm==0.32.0", "vllm==0.33.0"),
    }
    assert check_pins.check(*make(files)) == 7
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert "PROBLEM  av==18.2.0 does not exist; there are 18.1.0" in problems
    text = "\n".join(problems)
    assert "nobody==1: nothing of that name" in text
    assert "tokenizers: training has 0.23.3, vLLM's environment 0.22.0" in text
    assert "torch: 2.13.0a0+nv and 2.12.0" in text and "vllm==0.33.0 in pyproject.toml" in text
    assert re.search(r"training: .*av==18\.2\.0", text) and re.search(r"vllm: .*conflict", text, re.DOTALL)


def test_what_the_image_brings_is_part_of_the_question(make, capsys):
    """A package that wants another torch than the base image's is refused, although the index has that torch."""
    assert check_pins.check(*make(index={("av", "18.1.0"): ("torch<2.13",)})) == 1
    assert re.search(r"PROBLEM  training: .*torch", capsys.readouterr().out)


def test_the_files_of_the_dockerfile_reach_it():
    """Each source of a COPY is there and not kept out by .dockerignore; what is wanted from outside is an ARG."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for line in re.findall(r"^COPY (?!--)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert len(sources) > 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in kept, source
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", check_pins.argument("BASE", text))
    assert re.fullmatch(r"[0-9a-f]{40}", check_pins.argument("APEX_COMMIT", text))
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE) == ["10001"]


def test_vllm_in_an_environment_of_its_own(tmp_path, monkeypatch):
    """The image's wrapper: another Python, without the image's torch on the library path; has_vllm asks that one."""
    home = tmp_path / "vllm"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    environment = {"UMER1_VLLM_HOME": str(home), "PATH": os.environ["PATH"]}
    environment["LD_LIBRARY_PATH"] = "/usr/local/lib/python3.12/dist-packages/torch/lib:/usr/local/cuda/compat/lib:/x"
    shown = subprocess.run(
        [ROOT / "docker" / "vllm-python", "-c", "import os, sys; print(os.environ['LD_LIBRARY_PATH'], *sys.argv[1:])"]
        + ["two words", ""],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "/usr/local/cuda/compat/lib:/x two words \n", shown.stderr

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ${FOUND}\n")
    python.chmod(0o755)
    monkeypatch.setenv(vllm_install.VARIABLE, str(python))
    assert server_command("--child", type("", (), {"fileno": lambda self: 3})())[0] == str(python)
    for found in ("False", "True"):
        vllm_install._other_has_vllm.cache_clear()
        monkeypatch.setenv("FOUND", found)
        assert vllm_install.has_vllm() == (found == "True")
    assert str(python) in vllm_install.how_to_install()
    monkeypatch.setenv(vllm_install.VARIABLE, str(tmp_path / "nothing"))
    assert not vllm_install.has_vllm()
    monkeypatch.delenv(vllm_install.VARIABLE)
    assert vllm_install.vllm_python() == sys.executable
    assert vllm_install.how_to_install() == vllm_install.INSTALL


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_lint():
    done = subprocess.run(["hadolint", ROOT / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
