"""One wheel has the Python files, the Triton kernels, both compiled libraries and nothing that fails to load."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Ahead of time, for GPUs that need not be here: the one that umer1 is built for, the one before and the one after it.
ARCHS = [("90",), pytest.param(("80", "100"), marks=pytest.mark.thorough)]


@pytest.fixture(scope="module", params=ARCHS, ids=" ".join)
def archs(request):
    return request.param


@pytest.fixture(scope="module")
def build(tmp_path_factory, monkeypatch_module):
    """(sources, wheel, what the build printed), from a copy of the tree; with the CUDA library where nvcc is found."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("umer1", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / file, source / file)
    done = pip_wheel(source, target)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = target.glob("*.whl")
    return source, wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def monkeypatch_module(archs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UMER1_CUDA", "1" if nvcc() else "0")
        patch.setenv("UMER1_CUDA_ARCHS", " ".join(archs))
        patch.delenv("UMER1_EXTENSION", raising=False)
        yield patch


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def pip_wheel(source: Path, target: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run([*command, "-w", str(target), str(source)], capture_output=True, text=True)


def test_the_wheel_has_it_all(build, tmp_path):
    source, wheel, _ = build
    assert re.fullmatch(r"umer1-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"umer1/__init__.py", "umer1/ops/gather_hidden.py", "umer1_kernels/variants.py", "umer1/_C.abi3.so"}
    wanted |= {str(path.relative_to(source)) for path in (source / "umer1").glob("**/*.py")}
    wanted |= {f"umer1_kernels/{path.name}" for path in (source / "kernels").glob("*.py")}
    assert wanted <= names, sorted(wanted - names)
    assert ("umer1/_C_cuda.abi3.so" in names) == bool(nvcc())
    assert "umer1_kernels/__init__.py" not in names and not any(name.startswith("kernels/") for name in names)

    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch; from umer1.ops import extension as e, gather_hidden;"
        f"assert str(e.FOLDER).startswith({str(tmp_path)!r}), e.FOLDER; assert e.load_extension() is None;"
        "print(gather_hidden(torch.eye(2), torch.tensor([1])).tolist())"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[[0.0, 1.0]]", done.stderr


def test_libraries_use_the_stable_abi_alone(build, tmp_path):
    """No Python and no C++ symbol of torch is undefined: those change from one version to the next."""
    zipfile.ZipFile(build[1]).extractall(tmp_path)
    for library in tmp_path.glob("umer1/*.so"):
        undefined = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
        assert "aoti_torch" in undefined or "torch_library" in undefined
        wrong = re.findall(r" U (_?Py\w+|_ZN?K?\d*(?:at|c10|torch)\w+)", undefined)
        assert not wrong, f"{library.name}: {wrong}"


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_cuda_kernels_spill_no_registers(build, archs):
    """Every kernel for every GPU: registers, spills and shared memory as ptxas reports them."""
    reports = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        build[2],
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers, shared in reports:
        print(f"sm_{arch} {registers:>3} registers {shared or 0:>4} B shared, {stack} B stack, {name}")
        assert (stack, stores, loads) == ("0", "0", "0"), f"sm_{arch} {name} spills"
    kernels = {arch: [report[0] for report in reports if report[1] == arch] for arch in archs}
    assert min(map(len, kernels.values())) >= 30 and len({len(names) for names in kernels.values()}) == 1, kernels


def test_a_build_that_cannot_be_says_why(tmp_path, monkeypatch):
    """An illegal choice, CUDA without nvcc, a compiler that fails: errors; no compiler at all: a warning."""
    folder = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "umer1").mkdir()
    (folder / "umer1/__init__.py").write_text('__version__ = "0"\n')
    shutil.copy(ROOT / "setup.py", folder / "setup.py")

    def setup(**environment: str) -> subprocess.CompletedProcess:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder)

    done = setup(UMER1_CUDA="yes")
    assert done.returncode != 0 and "UMER1_CUDA='yes' is not legal; use one of auto, 0, 1" in done.stderr
    done = setup(UMER1_CUDA="0", CXX="no-such-compiler")
    assert done.returncode == 0 and done.stderr.count("no C++ compiler was found") == 1
    assert not list(folder.glob("umer1/*.so"))
    done = setup(CXX="false")
    assert done.returncode != 0 and not list(folder.glob("umer1/*.so"))
    done = setup(UMER1_EXTENSION="0")
    assert done.returncode == 0 and "umer1: " not in done.stderr and not list(folder.glob("umer1/*.so"))
