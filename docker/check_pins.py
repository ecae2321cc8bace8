"""Does every version that the image pins exist, and do they fit together?  No image, no GPU and no docker is needed.

    python docker/check_pins.py [OPTIONS OF PIP...]

asks pip to resolve, as it would in the image (its Python, Linux on x86-64, wheels only),

- the training environment: docker/training.txt and umer1's own dependencies, beside what the base image brings
  (docker/base.txt: builds that no index has, so stand-ins of that version take their place);
- vLLM's environment: docker/vllm.txt;

then, where one cannot be had, for each `name==version` in it by itself, and compares what the two environments and
pyproject.toml must have in common.  Nothing is installed.  All that is wrong is told at once, with status 1.  The base
image and apex are on no package index: one is named by its digest, the other by its commit, and the build checks that
the image has what docker/base.txt says.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
GLIBC = 39  # of the base image, Ubuntu 24.04: 2.39
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
# Both environments read the same model directory and tokenizer.
SHARED = ("transformers", "tokenizers")


def argument(name: str, dockerfile: str) -> str:
    """The default of an ARG."""
    return re.search(rf"^ARG {name}=(\S+)$", dockerfile, re.MULTILINE).group(1)


def requirements(path: Path) -> list[Requirement]:
    """Of a requirements file and those that it includes by `-r`."""
    found = []
    for line in path.read_text().splitlines():
        line = line.split(" #")[0].strip()
        if line.startswith("-r "):
            found += requirements(path.parent / line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            found.append(Requirement(line))
    return found


def pins(wanted: list[Requirement]) -> dict[str, str]:
    """name -> version, of those that allow one version only."""
    found = {}
    for requirement in wanted:
        [*operators] = requirement.specifier
        if len(operators) == 1 and operators[0].operator == "==":
            found[canonicalize_name(requirement.name)] = operators[0].version
    return found


def stand_in(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """An empty wheel of that name and version."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Index:
    """pip's package index, seen from the image's Python."""

    def __init__(self, python: str, options: list[str]):
        self.target = [f"--python-version={python}", "--only-binary=:all:"]
        self.target += [f"--platform={platform}" for platform in PLATFORMS]
        self.options = options

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, *self.target, *self.options]
        return subprocess.run(command, capture_output=True, text=True)

    def problem(self, name: str, version: str) -> str | None:
        """Why this version cannot be had, or None."""
        done = self.run("index", "versions", name, "--pre")
        listed = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
        if listed is None:
            return f"{name}=={version}: nothing of that name for this Python and platform: {last_words(done.stderr)}"
        versions = [Version(one) for one in listed.group(1).split(", ")]
        if Version(version) in versions:
            return None
        near = [str(one) for one in versions if one.release[:2] == Version(version).release[:2]]
        return f"{name}=={version} does not exist; there are {', '.join(near or map(str, versions[:5]))}"

    def resolve(self, folder: Path, *arguments: str) -> tuple[dict[str, str], str | None]:
        """({name: version} of what pip would install, None), or ({}, why it cannot)."""
        report = folder / "report.json"
        fixed = ("--dry-run", "--ignore-installed", "--quiet", f"--target={folder / 'target'}", f"--report={report}")
        done = self.run("install", *fixed, *arguments)
        if done.returncode:
            return {}, last_words(done.stderr)
        installed = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
        return {canonicalize_name(entry["name"]): entry["version"] for entry in installed}, None


def last_words(errors: str) -> str:
    """The lines of pip's that say what is wrong."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("WARNING")]
    told = [line.removeprefix("ERROR: ") for line in lines if not line.startswith(("hint:", "To fix this"))]
    return "; ".join(told)[:2000] or "pip ended without a word"


def training_environment(index: Index, root: Path) -> tuple[dict[str, str], str | None]:
    """As `Index.resolve`, with stand-ins for what the base image brings."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = pins(requirements(root / "docker/base.txt"))
        for package, version in base.items():
            stand_in(folder, package, version)
        wanted = [f"{package}=={version}" for package, version in base.items()] + project["dependencies"]
        where = (f"--find-links={folder}", f"--constraint={root / 'docker/base.txt'}")
        return index.resolve(folder, *where, f"--requirement={root / 'docker/training.txt'}", *wanted)


def vllm_environment(index: Index, root: Path) -> tuple[dict[str, str], str | None]:
    """As `Index.resolve`."""
    with tempfile.TemporaryDirectory() as name:
        return index.resolve(Path(name), f"--requirement={root / 'docker/vllm.txt'}")


def disagreements(root: Path, training: dict[str, str], vllm: dict[str, str]) -> list[str]:
    """What must be the same in two places and is not, of pins or of resolved environments."""
    found = [
        f"{name}: training has {training.get(name)}, vLLM's environment {vllm.get(name)}; they must be the same"
        for name in SHARED
        if training.get(name) != vllm.get(name)
    ]
    torches = [Version(one["torch"]).release[:2] if "torch" in one else None for one in (training, vllm)]
    if torches[0] != torches[1]:
        both = f"{training.get('torch')} and {vllm.get('torch')}"
        found.append(f"torch: {both}; memory of a GPU is shared between processes of one minor version")
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if extras["rollout"] != [f"vllm=={vllm.get('vllm')}"]:
        found.append(f"vllm: {vllm.get('vllm')} here, {extras['rollout'][0]} in pyproject.toml")
    return found


def check(root: Path, options: list[str]) -> int:
    """Print what was found; the number of problems."""
    dockerfile = (root / "docker/Dockerfile").read_text()
    index = Index(argument("PYTHON", dockerfile), options)
    environments = {"training": training_environment, "vllm": vllm_environment}
    pinned = {name: pins(requirements(root / f"docker/{name}.txt")) for name in environments}
    problems = disagreements(root, pins(requirements(root / "docker/base.txt")) | pinned["training"], pinned["vllm"])
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {name: pool.submit(resolve, index, root) for name, resolve in environments.items()}
        for name, future in futures.items():
            resolved, problem = future.result()
            if problem is None:
                print(f"{name}: {len(pinned[name])} pins exist, and {len(resolved)} packages in all fit together")
                continue
            # The resolver stops at the first version that it misses: here all of them.
            missing = filter(None, pool.map(lambda pin: index.problem(*pin), pinned[name].items()))
            problems += [f"{name}: {problem}", *missing]
    print(f"not on a package index: {argument('BASE', dockerfile)}, apex {argument('APEX_COMMIT', dockerfile)}")
    for problem in dict.fromkeys(problems):
        print(f"PROBLEM  {problem}")
    return len(problems)


if __name__ == "__main__":
    sys.exit(1 if check(ROOT, sys.argv[1:]) else 0)
