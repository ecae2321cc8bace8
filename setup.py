"""Build umer1 and its compiled operators (csrc/); metadata lives in pyproject.toml.

umer1/_C.abi3.so has the operators' schemas and CPU form, umer1/_C_cuda.abi3.so their CUDA form.  Both use torch's
stable ABI and no Python API: one wheel serves every torch and Python that pyproject.toml allows.  nvcc needs no torch
with CUDA.

    UMER1_EXTENSION=0           build neither: umer1 runs in plain torch.  Without a C++ compiler that is what happens.
    UMER1_CUDA=auto|0|1         auto: the CUDA library where torch has CUDA and nvcc is found (CUDA_HOME, PATH,
                                /usr/local/cuda); 1: also for a torch without CUDA, and an error without nvcc
    UMER1_CUDA_ARCHS="80 90"    compute capabilities, default 90; the highest is also stored as PTX for newer GPUs
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The oldest torch whose stable ABI has all that csrc/ uses: 2.10.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ["-std=c++17", "-O3", TARGET]


def torch_folder() -> Path | None:
    """Where the torch is that umer1 will run with.

    An isolated build hides the packages of the Python it runs in; a child that ignores the environment sees them.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        return Path(spec.origin).parent
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    origin = subprocess.run([sys.executable, "-I", "-c", find], capture_output=True, text=True).stdout.strip()
    return Path(origin).parent if origin else None


def torch_cuda(torch: Path) -> str | None:
    """The CUDA version that this torch was built with; None for a CPU build."""
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    return found.group(1) if found else None


def cxx() -> str | None:
    """The C++ compiler that setuptools will call."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return shutil.which(command[0])


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin" if home else "", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(filter(None, folders)))


def warn(message: str) -> None:
    print(f"umer1: warning: {message}", file=sys.stderr)


def extensions(torch: Path | None) -> list[Extension]:
    """The libraries to build here."""
    choices = {"UMER1_EXTENSION": ("auto", "0", "1"), "UMER1_CUDA": ("auto", "0", "1")}
    values = {name: os.environ.get(name, "auto") for name in choices}
    for name, value in values.items():
        if value not in choices[name]:
            sys.exit(f"umer1: {name}={value!r} is not legal; use one of {', '.join(choices[name])}")
    if values["UMER1_EXTENSION"] == "0":
        return []
    if not cxx() and "1" not in values.values():
        warn("no C++ compiler was found (CXX): built without the compiled operators, plain torch runs instead")
        return []
    # setuptools asks for the sources of a distribution before torch need be there.
    common = {
        "include_dirs": [str(torch / "include"), str(torch / "include/torch/csrc/api/include")] if torch else [],
        "library_dirs": [str(torch / "lib")] if torch else [],
        "depends": [str(path) for path in sorted(Path("csrc").glob("*.*h"))],
        "py_limited_api": True,
        "language": "c++",
    }
    # By name although few symbols are used: the libraries must find those of the torch that is already loaded.
    links = ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch"]
    hidden = ["-fvisibility=hidden"]
    built = [
        Extension(
            "umer1._C",
            ["csrc/gather_hidden.cpp"],
            extra_compile_args=FLAGS + hidden,
            extra_link_args=links,
            **common,
        )
    ]
    cuda = torch_cuda(torch) if torch else None
    if values["UMER1_CUDA"] == "1" or (values["UMER1_CUDA"] == "auto" and cuda):
        if nvcc():
            built.append(Extension("umer1._C_cuda", ["csrc/gather_hidden.cu"], **common))
        elif values["UMER1_CUDA"] == "1":
            sys.exit("umer1: UMER1_CUDA=1, but nvcc was not found; set CUDA_HOME, or UMER1_CUDA=0")
        else:
            warn("torch has CUDA, but nvcc was not found (CUDA_HOME): built without the CUDA operators")
    return built


class Build(build_ext):
    """build_ext that compiles CUDA sources with nvcc, in one step each."""

    def build_extension(self, extension: Extension) -> None:
        if not extension.include_dirs:
            sys.exit(
                "umer1: torch is not installed, and its headers are needed to build; install it, or UMER1_EXTENSION=0"
            )
        if not extension.sources[0].endswith(".cu"):
            return super().build_extension(extension)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn(nvcc_command(extension, target))


def nvcc_command(extension: Extension, target: Path) -> list[str]:
    cuda = [f"-L{folder}" for folder in extension.library_dirs]
    cuda += ["-ltorch_cuda" for folder in extension.library_dirs if Path(folder, "libtorch_cuda.so").exists()]
    archs = sorted(int(arch) for arch in re.split(r"[\s,;]+", os.environ.get("UMER1_CUDA_ARCHS", "90").strip()))
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        nvcc(),
        *["-shared", "-cudart", "static", "-DUSE_CUDA", f"-DUMER1_CUDA_ARCHS={'_'.join(map(str, archs))}", *FLAGS],
        *[*code, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"],
        *["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"],
        *[f"-I{folder}" for folder in extension.include_dirs],
        *extension.sources,
        *["-o", str(target)],
        *["-Xlinker", "--no-as-needed", *cuda, "-lc10", "-ltorch_cpu", "-ltorch"],
    ]


torch = torch_folder()
libraries = extensions(torch)

setup(
    packages=find_packages(include=["umer1", "umer1.*"]) + ["umer1_kernels"],
    # The folder is kernels/; this import name leaves `kernels` to Hugging Face's package of that name.
    package_dir={"umer1_kernels": "kernels"},
    package_data={"umer1": ["assets/**/*", "configs/*.yaml", "rl/engines/child_site/*.py"]},
    ext_modules=libraries,
    cmdclass={"build_ext": Build},
    # An isolated build where there is no torch yet: the one that umer1 needs anyway is fetched first.
    setup_requires=["torch>=2.11,<2.14"] if libraries and torch is None else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if libraries else {},
)
