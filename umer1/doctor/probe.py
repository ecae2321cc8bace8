"""One thing that can be tried in a process of its own, and what came of it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Available to every snippet: `say(version, detail)` reports success, `absent(why)` that there is nothing to try, and
# `missing(name)` the same where a module cannot be found.
_HEAD = """\
import importlib.util, json, sys
def say(version, detail=""):
    print("\\n" + json.dumps({"version": str(version), "detail": str(detail)}), flush=True)
def absent(why):
    print("\\n" + json.dumps({"absent": why}), flush=True)
    sys.exit(0)
def missing(name):
    if importlib.util.find_spec(name) is None:
        absent(f"{name} is not installed")
"""
_LINE = 200  # characters of an error that are shown

Status = Literal["ok", "missing", "unsupported", "failed", "crashed", "hung"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What is tried: `snippet` runs in a new interpreter and ends by `say(version, detail)`."""

    name: str
    purpose: str  # what umer1 uses it for
    snippet: str
    fix: str  # what to do when it is missing or fails
    needed: bool = False  # nothing works without it
    supported: str = ""  # versions, as pip writes them; "" where any will do
    seconds: float = 120.0  # after which it counts as hung
    path: Path | None = None  # put before the interpreter's own search path
    python: str = ""  # a variable that may name another interpreter to try it in


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found."""

    probe: Probe
    status: Status
    version: str = ""
    detail: str = ""

    @property
    def is_fatal(self) -> bool:
        return self.probe.needed and self.status != "ok"

    def as_json(self) -> dict[str, Any]:
        found = {"name": self.probe.name, "status": self.status, "version": self.version, "detail": self.detail}
        found |= {"purpose": self.probe.purpose, "needed": self.probe.needed, "supported": self.probe.supported}
        return found | ({} if self.status == "ok" else {"fix": self.probe.fix})


def run(probe: Probe) -> Finding:
    """Try it.  A crash, a hang or an error ends the child alone."""
    # Without the folder at hand on the search path: what a run has left in ./wandb is no package.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if probe.path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(probe.path), environment.get("PYTHONPATH")]))
    python = os.environ.get(probe.python) or sys.executable
    try:
        child = subprocess.Popen(
            [python, "-c", _HEAD + probe.snippet],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return Finding(probe, "failed", detail=f"{python}, which {probe.python} names: {error.strerror}")
    try:
        out, errors = child.communicate(timeout=probe.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        child.wait()  # and not for its output's end: what has left its group may hold that open
        child.stdout.close()
        child.stderr.close()
        return Finding(probe, "hung", detail=f"no answer within {probe.seconds:g} s")
    if child.returncode < 0:
        return Finding(probe, "crashed", detail=f"ended by {signal.Signals(-child.returncode).name}")
    answer = _answer(out)
    if child.returncode or answer is None:
        return Finding(probe, "failed", detail=_last_line(errors) or f"ended with status {child.returncode}")
    if "absent" in answer:
        return Finding(probe, "missing", detail=answer["absent"])
    version, detail = answer["version"], answer["detail"]
    if probe.supported and not _is_supported(version, probe.supported):
        return Finding(probe, "unsupported", version, f"umer1 is made for {probe.supported}")
    return Finding(probe, "ok", version, detail)


def _answer(out: str) -> dict[str, str] | None:
    """The report in the last line; None where the snippet came to no end."""
    lines = out.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() & {"absent", "version"} else None


def _last_line(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:_LINE] if lines else ""


def _is_supported(version: str, supported: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion, Version
    except ImportError:  # its own probe says so, and the others are looked at all the same
        return True
    try:
        # A local part ("+cpu", "+cu130") says how it was built, not what it is; NVIDIA's image has a 2.13.0a0.
        return SpecifierSet(supported).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False
