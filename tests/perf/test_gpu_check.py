"""make gpu-check: parts that fail or hang do not end the others, what is missing is said, the status tells."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import gpu_check
from gpu_check import TOTAL_SECONDS, Outcome, Part, all_parts, exit_code, missing, run_parts, summary, time_limit

ROOT = Path(__file__).resolve().parents[2]


def part(name: str, code: str, limit: float = 20.0, **options) -> Part:
    return Part(name=name, command=("-c", code), limit=limit, needs=options.pop("needs", ()), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_nothing_done(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "perf/gpu_check.py", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "sees no GPU" in line
    assert not output.exists()


def test_slow_parts_leave_the_later_ones_their_time():
    """Every part takes all it may: the steps at the size of 2B still get what is reserved for them."""
    parts, left, limits = all_parts(), TOTAL_SECONDS, {}
    for place, each in enumerate(parts):
        limits[each.name] = time_limit(each, parts[place + 1 :], left)
        assert each.reserve <= limits[each.name] <= each.limit
        left -= limits[each.name]
    assert left >= 0
    assert min(limits["step_sft"], limits["step_grpo"]) >= 70
    assert min(limits.values()) >= 15


def test_a_part_that_hangs_does_not_starve_the_next(tmp_path):
    parts = [part("hangs", "import time; time.sleep(60)", limit=60), part("last", "print('done')", reserve=15.0)]
    started = time.monotonic()
    found = run_parts(parts, tmp_path, total=17.0)
    assert [each.status for each in found] == ["timed out", "passed"]
    assert time.monotonic() - started < 17


def test_parts_are_on_their_own(tmp_path):
    parts = [
        part("fine", "print('all well')", environment=(("MARK", "1"),)),
        part("broken", "raise SystemExit('it broke')"),
        part("hangs", "import time; print('started', flush=True); time.sleep(60)", limit=1.5),
        part("absent", "pass", needs=("os", "a_package_that_is_not_there", "email.nothing")),
        part("after", "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"),
    ]
    started = time.monotonic()
    found = {each.name: each for each in run_parts(parts, tmp_path)}
    assert time.monotonic() - started < 45
    statuses = {name: each.status for name, each in found.items()}
    assert statuses == {
        "fine": "passed",
        "broken": "failed",
        "hangs": "timed out",
        "absent": "not run",
        "after": "passed",
    }
    assert found["fine"].note == "all well" and found["broken"].note == "it broke"
    assert "started" in found["hangs"].note
    assert found["absent"].note == "missing: a_package_that_is_not_there, email.nothing"
    assert found["after"].note == str(ROOT)[:110]
    log = (tmp_path / "gpu_check.log").read_text()
    assert "===== hangs: -c" in log and f"===== {found['broken']}" in log
    assert log.endswith(f"\n{summary(list(found.values()))}\n") and all(name in log for name in statuses)


def test_at_its_limit_a_part_of_tests_says_what_has_failed(tmp_path):
    tests = tmp_path / "test_two.py"
    tests.write_text("import time\ndef test_wrong():\n    assert 1 == 2\ndef test_hangs():\n    time.sleep(60)\n")
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path), str(tests))
    waits = Part(name="tests", command=command, limit=5.0, needs=())
    (outcome,) = run_parts([waits], tmp_path / "out")
    assert outcome.status == "timed out"
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert "assert 1 == 2" in log and "1 failed" in log and "KeyboardInterrupt" in log


def test_a_part_knows_its_limit_and_the_folder(tmp_path):
    tells = Part(
        name="tells", command=("-c", "import sys; print(sys.argv[1:])", "{output}", "{seconds}"), limit=9.9, needs=()
    )
    (outcome,) = run_parts([tells], tmp_path)
    assert outcome.note == f"['{tmp_path}', '9']"[:110]


def test_a_link_that_came_along_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LINKS", tmp_path)
    monkeypatch.setattr(gpu_check, "_found", lambda name: name != "umer1_kernels")
    (tmp_path / "umer1_kernels").symlink_to(tmp_path / "of another machine")
    assert str(tmp_path) in gpu_check.import_path().split(":")
    assert (tmp_path / "umer1_kernels").resolve() == ROOT / "kernels"


def test_a_part_that_hangs_leaves_nothing_behind(tmp_path):
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    (outcome,) = run_parts([part("parent", code, limit=1.5)], tmp_path)
    grandchild = Path("/proc") / outcome.note.split()[-1]
    deadline = time.monotonic() + 5
    while grandchild.exists() and "Z (zombie)" not in (grandchild / "status").read_text():
        assert time.monotonic() < deadline, f"{grandchild} lives on"
        time.sleep(0.05)


def test_all_parts_share_one_limit(tmp_path):
    parts = [part("first", "import time; time.sleep(60)"), part("second", "pass")]
    started = time.monotonic()
    found = run_parts(parts, tmp_path, total=2.0)
    assert [each.status for each in found] == ["timed out", "not run"]
    assert time.monotonic() - started < 12


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (("passed", "passed"), 0),
        (("passed", "timed out"), 0),
        (("passed", "not run"), 0),
        (("passed", "failed"), 1),
        (("failed", "passed"), 1),
        (("timed out", "passed"), 1),
        (("not run", "passed"), 1),
    ],
)
def test_status(statuses, expected):
    parts = [part("tests", "pass", correctness=True), part("speed", "pass")]
    outcomes = [Outcome(name=each.name, status=status) for each, status in zip(parts, statuses, strict=True)]
    assert exit_code(parts, outcomes) == expected


def test_the_real_parts():
    """Their files are there, what must be right comes first, and all of them end within ten minutes."""
    parts = gpu_check.all_parts()
    assert [each.name for each in parts[:2]] == ["build", "tests"]
    assert all(each.correctness == (each.name in ("build", "tests")) for each in parts)
    files = [word for each in parts for word in each.command if word.startswith("tests/") or word.endswith(".py")]
    for file, _, test in (word.partition("::") for word in files):
        assert not test or f"def {test}(" in (ROOT / file).read_text()
        assert (ROOT / file).exists()
    assert gpu_check.TOTAL_SECONDS < 600
    assert missing(["os", "umer1.device", "nothing_like_it.at_all"]) == ["nothing_like_it.at_all"]
