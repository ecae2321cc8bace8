"""Everything that needs a GPU, in at most ten minutes and without a network: build, tests, suites, training steps.

    make gpu-check        or        python3 perf/gpu_check.py [--parts build tests infonce ...] [--output perf/results]

Parts run one after the other, the one that tells most first, each in a process of its own with a time limit of its own,
so that one that fails or hangs does not end the others.  At its limit a part is interrupted as by Ctrl-C, and pytest
then says what has failed until there; what a part has measured is kept.  The checkout is used as it is: the extension
is built in place, and nothing is installed.  Ends with a table, and with status 1 when a part failed or a correctness
part (build, tests) did not run to its end; a measurement that was not made is a line of the table.

Writes OUTPUT/*.json, OUTPUT/gpu_check.log (all that the parts printed, and what became of each) and, when it goes to
perf/results, perf/README.md.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"
LINKS = ROOT / "build" / "gpu_check"
STARTED = time.monotonic()
TOTAL_SECONDS = 560.0  # from STARTED: ten minutes less what the last part may take to end, and the tables
GRACE_SECONDS = 15.0  # to end after an interrupt: pytest waits ten for a worker that hangs, then tells its failures
TRAINING = ("torch", "numpy", "megatron.core", "transformers", "tokenizers", "safetensors", "PIL", "yaml")
SUITES = ("torch", "numpy", "pytest", "pytest_benchmark")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One child process."""

    name: str
    command: tuple[str, ...]  # {output} in it is the folder of results, {seconds} the limit that it runs under
    limit: float  # seconds at most
    needs: tuple[str, ...]  # import names
    reserve: float = 0.0  # seconds that the parts before it leave to it
    correctness: bool = False
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a part."""

    name: str
    status: str  # passed, failed, timed out, not run
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.status}, {self.seconds:.0f} s: {self.note}"


# Verbose, and with stacks of what takes a minute: a log that ends early says where.
PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60")
# Of tests/kernels and tests/ops those that use a GPU; the others say the same on any machine.
GPU_TESTS = (
    "tests/kernels/test_infonce_triton.py",
    "tests/kernels/test_rank_margin_triton.py",
    "tests/kernels/test_linear_softmax_triton.py",
    "tests/ops/test_gather_hidden.py",
)
# Whole programs on a GPU, as a user starts them: train, save, resume, export, generate, against plain transformers.
PROGRAMS = (
    "tests/training/test_sft_program.py::test_a_run_in_bf16_learns_and_leaves_its_record",
    "tests/training/test_grpo_program.py::test_the_first_step_against_plain_transformers",
    "tests/training/test_grpo_program.py::test_the_record",
    "tests/inference/test_encode_command.py::test_gen_mode_writes_embeddings_and_responses",
)


def pytest_part(name: str, tests: Sequence[str], *, workers: int, needs: Sequence[str], **options) -> Part:
    """Tests side by side where pytest-xdist is there: they wait for compilers and for processes to start."""
    command = (*PYTEST, "-m", "not thorough", "--durations", "8", *tests)
    if _found("xdist"):
        command += ("-n", str(min(workers, os.cpu_count() or 1)), "--dist", "worksteal")
    # One thread for each worker: with all cores for each there would be many times too many.  torchrun's address: a
    # machine without a network may not know its own name.
    environment = (("OMP_NUM_THREADS", "1"), ("PET_LOCAL_ADDR", "127.0.0.1"))
    return Part(name=name, command=command, needs=(*needs, "pytest"), environment=environment, **options)


def suite(name: str, limit: float, reserve: float) -> Part:
    command = (*PYTEST, "--sizes", "gpu", f"perf/bench_{name}.py", "--results", "{output}")
    return Part(name=name, command=command, limit=limit, needs=SUITES, reserve=reserve)


def all_parts() -> list[Part]:
    """In the order that they run in: what is right first, then what a step takes, then what an operation takes."""
    return [
        Part(
            name="build",
            command=("setup.py", "build_ext", "--inplace"),
            limit=150,
            needs=("torch", "setuptools"),
            correctness=True,
            environment=(("UMER1_CUDA", "1"),),
        ),
        pytest_part("tests", GPU_TESTS, workers=16, needs=("torch", "triton"), limit=160, reserve=60, correctness=True),
        pytest_part("programs", PROGRAMS, workers=3, needs=TRAINING, limit=100, reserve=40),
        step("step_sft"),
        step("step_grpo"),
        suite("infonce", 140, reserve=45),
        suite("linear_cross_entropy", 70, reserve=25),
        suite("gather_hidden", 45, reserve=15),
        suite("rank_margin", 45, reserve=15),
        pytest_part(
            "fp8_weights",
            ("tests/models/test_fp8_gpu.py",),
            workers=3,
            needs=(*TRAINING, "transformer_engine"),
            limit=90,
            reserve=25,
        ),
        Part(
            name="fp8_compare",
            command=("perf/fp8_compare.py", "--seconds", "{seconds}", "--results", "{output}"),
            limit=200,
            needs=(*TRAINING, "transformer_engine"),
            reserve=40,
        ),
    ]


def step(name: str) -> Part:
    command = (f"perf/{name}.py", "--results", "{output}")
    return Part(name=name, command=command, limit=110, needs=TRAINING, reserve=70)


def time_limit(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that a part may take of the `left` ones: what is reserved for the parts after it stays theirs."""
    return min(part.limit, left - sum(each.reserve for each in later))


def gpu_problem() -> str | None:
    """Why there is nothing to check here, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def missing(names: Sequence[str]) -> list[str]:
    """Those of the import names that cannot be found."""
    return [name for name in names if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def import_path() -> str:
    """PYTHONPATH with the checkout and, where umer1 is not installed, the name that its kernels are imported by."""
    places = [str(ROOT)]
    if not _found("umer1_kernels"):
        LINKS.mkdir(parents=True, exist_ok=True)
        link = LINKS / "umer1_kernels"
        link.unlink(missing_ok=True)  # one that came along with the checkout leads to where that was
        link.symlink_to(ROOT / "kernels", target_is_directory=True)
        places.append(str(LINKS))
    return os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])


def run_part(part: Part, limit: float, log: IO[bytes], path: str, output: Path) -> Outcome:
    """Run it in a process group of its own, which is ended at the limit."""
    command = [sys.executable, *(word.format(output=output, seconds=int(limit)) for word in part.command)]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    log.write(f"\n===== {part.name}: {shlex.join(command[1:])}\n".encode())
    log.flush()
    start_of_log, started = log.tell(), time.monotonic()
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_hear_interrupts,
    )
    note = ""
    try:
        code: int | None = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        code, note = None, _last_line(Path(log.name), start_of_log)  # before it speaks of the interrupt
    finally:
        _end_group(child)
    seconds = time.monotonic() - started
    note = note or _last_line(Path(log.name), start_of_log)
    if code is None:
        return Outcome(name=part.name, status="timed out", seconds=seconds, note=f"after {limit:.0f} s; {note}")
    return Outcome(name=part.name, status="passed" if code == 0 else "failed", seconds=seconds, note=note)


def _hear_interrupts() -> None:
    """In the child: a shell's background jobs ignore them, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_group(child: subprocess.Popen) -> None:
    """The part and whatever it has started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _last_line(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:110] if lines else "printed nothing"


def run_parts(parts: Sequence[Part], output: Path, total: float = TOTAL_SECONDS) -> list[Outcome]:
    """All parts, in order; together no longer than `total` seconds.  The log ends with the table of them."""
    output.mkdir(parents=True, exist_ok=True)
    deadline, path, found = time.monotonic() + total, import_path(), []
    with (output / "gpu_check.log").open("wb") as log:
        for place, part in enumerate(parts):
            later = [each for each in parts[place + 1 :] if not missing(each.needs)]
            limit = time_limit(part, later, deadline - time.monotonic())
            absent = missing(part.needs)
            if absent:
                outcome = Outcome(name=part.name, status="not run", note=f"missing: {', '.join(absent)}")
            elif limit < 1:
                outcome = Outcome(name=part.name, status="not run", note="no time left")
            else:
                print(f"{part.name} (at most {limit:.0f} s) ...", flush=True)
                outcome = run_part(part, limit, log, path, output)
            found.append(outcome)
            print(outcome, flush=True)
            log.write(f"\n===== {outcome}\n".encode())
            log.flush()
        log.write(f"\n{summary(found)}\n".encode())
    return found


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table at the end."""
    lines = [f"{'part':22s} {'result':10s} {'seconds':>7s}  last words"]
    lines += [f"{each.name:22s} {each.status:10s} {each.seconds:7.0f}  {each.note}" for each in outcomes]
    return "\n".join(lines)


def exit_code(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> int:
    """1 when a part failed or a correctness part did not pass."""
    status = {each.name: each.status for each in outcomes}
    wrong = [part for part in parts if part.correctness and status[part.name] != "passed"]
    return int(bool(wrong) or "failed" in status.values())


def report_missing(parts: Sequence[Part]) -> None:
    """One line for each package that is not there."""
    wanted = dict.fromkeys(name for part in parts for name in part.needs)
    for name in missing(list(wanted)):
        users = ", ".join(part.name for part in parts if name in part.needs)
        print(f"missing: {name} (needed by {users}); put it on PYTHONPATH or install it")
    for name in missing(["transformer_engine", "liger_kernel", "cut_cross_entropy", "inf_cl"]):
        print(f"not installed: {name}; what is compared with it stays not measured")


def main() -> int:
    parts = all_parts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in parts], help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if problem := gpu_problem():
        print(f"gpu-check: {problem}; nothing was done", file=sys.stderr)
        return 1
    parts = [part for part in parts if options.parts is None or part.name in options.parts]
    report_missing(parts)
    output = options.output.resolve()
    outcomes = run_parts(parts, output, STARTED + TOTAL_SECONDS - time.monotonic())
    if output == RESULTS and not missing(["matplotlib"]):
        subprocess.run(
            [sys.executable, "perf/table.py"], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": import_path()}
        )
    print(summary(outcomes))
    return exit_code(parts, outcomes)


if __name__ == "__main__":
    sys.exit(main())
