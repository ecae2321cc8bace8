"""What clusters do to a run, done to real runs, whose ends are compared with that of an undisturbed one.

A scenario is a function of a `Place`; it returns a `Row` of the table or fails by an AssertionError that names the
log.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo_runs import Program, Run, metrics
from place import STEP, Place, Row, assert_same_end, largest_error

STALL_SECONDS = 5.0
SLOW_SECONDS = 0.3  # of each fsync on the slow disk
BACKGROUND = ("--async-save",)


def flags_of(number: int) -> tuple[str, ...]:
    """Every second start of a run saves in the background."""
    return BACKGROUND if number % 2 else ()


def unfinished(run: Program) -> list[Path]:
    """The folder of a checkpoint that is being put together, if there is one."""
    return list(run.log.parent.glob("run/.tmp-iter_*"))


def disturb(place: Place, run: Program, kind: str) -> bool | None:
    """One SIGKILL; whether a checkpoint was being written at that moment.  None: the run came to its end before."""
    steps = place.rng.randint(1, 4)
    if not run.wait_until(lambda: run.output.count(STEP) >= steps, pause=0.01):
        return None
    if kind == "save" and not run.wait_until(lambda: unfinished(run), pause=0):
        return None
    time.sleep(place.rng.uniform(0, 0.03))
    if kind in ("rank", "save"):
        targets = run.ranks()
    elif kind == "worker":
        targets = run.workers()
    else:
        targets = [run.process.pid]
    if run.ended() or not targets:
        return None
    saving = bool(unfinished(run))
    os.kill(place.rng.choice(targets), signal.SIGKILL)
    return saving


def killed(place: Place, kinds: tuple[str, ...], what: str, kills: int, steps_per_kill: int = 4) -> Row:
    """`kills` runs lose one process each; the next one goes on."""
    iterations = steps_per_kill * kills + 4
    want, folder = place.undisturbed(iterations, 2), place.root / "-".join(kinds)
    done, cut_short = 0, [0, 0]
    while done < kills:
        run = place.sft(folder, iterations, *flags_of(done))
        saving = disturb(place, run, kinds[done % len(kinds)])
        if saving is None:
            run.finish()
            break
        cut_short[done % 2] += saving
        place.until_ended(run)
        assert run.process.returncode != 0, f"a run that lost a process says that it succeeded: {run.log}"
        done += 1
        place.say(f"{what}: {done} of {kills}")
    assert done >= 0.6 * kills, f"the run ended after {done} of {kills} kills; make it longer"
    assert all(cut_short), f"kills during saves in the step and in the background: {cut_short}; kill more often"
    if done == kills:
        assert "resumed at iteration" in place.sft(folder, iterations).finish(seconds=1800)
    what += f"; during {cut_short[0]} saves in the step and {cut_short[1]} in the background"
    return Row(what, done, done, assert_same_end(folder, want), place.take_longest())


def processes_killed(place: Place) -> Row:
    # Five kinds, and saves in the step and in the background by turns: all pairs come up.
    kinds = ("rank", "save", "launcher", "worker", "save")
    return killed(place, kinds, "SIGKILL of a rank, of torchrun or of a data worker", place.kills)


def other_world_sizes(place: Place) -> Row:
    """The node that comes back brings fewer ranks, or the run is given another layout."""
    layouts = (("", 2), ("", 1), ("--tensor-model-parallel-size 2", 2), ("--pipeline-model-parallel-size 2", 2))
    what, iterations = "All ranks killed; resumed at 2, 1, TP 2, PP 2 ranks by turns", 24
    want, folder = place.undisturbed(iterations, 2), place.root / "layouts"
    faults = 0
    for flags, processes in layouts:
        run = place.sft(folder, iterations, *flags.split(), *flags_of(faults), processes=processes)
        if not run.wait_until(lambda run=run: run.output.count(STEP) >= 4, pause=0.01):
            break
        for pid in run.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        place.until_ended(run)
        faults += 1
    assert "resumed at iteration" in place.sft(folder, iterations).finish()
    assert faults == len(layouts)
    error = largest_error(folder, want)
    assert error < 1e-3, f"weights {error:.1e} away from the undisturbed run's: {folder}"
    return Row(what, faults, faults, f"weights within {error:.1e} (sums in another order)", place.take_longest())


def stalled_rank(place: Place) -> Row:
    """SIGSTOP: a node that swaps or a network that hangs for a while.  Nothing has to be started again."""
    iterations, stalls = 24, 3
    want, folder = place.undisturbed(iterations, 2), place.root / "stalled"
    run = place.sft(folder, iterations)
    for stall in range(stalls):
        assert run.wait_until(lambda stall=stall: run.output.count(STEP) >= 4 * stall + 2, pause=0.01)
        pid = place.rng.choice(run.ranks())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STALL_SECONDS)
        os.kill(pid, signal.SIGCONT)
    run.finish()
    what = f"A rank stands still for {STALL_SECONDS:g} s"
    return Row(what, stalls, 0, assert_same_end(folder, want), None)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of `size` bytes at `folder`, and what gives it another size.  Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(place: Place, *flags: str) -> Row:
    iterations = 24
    want, folder = place.undisturbed(iterations, 2), place.root / "".join(["full", *flags])
    one = max(sum(file.stat().st_size for file in save.rglob("*")) for save in (want / "run").glob("iter_*"))
    with small_disk(folder, int(2.5 * one)) as resize:
        run = place.sft(folder, iterations, *flags)
        place.until_ended(run)
        assert run.process.returncode != 0 and "could not be written" in run.output, run.output[-3000:]
        resize(40 * one)
        assert "resumed at iteration" in place.sft(folder, iterations, *flags).finish()
        end = assert_same_end(folder, want)
    what = f"The disk is full at a save{in_words(flags)}; more space, started again"
    return Row(what, 1, 1, end, place.take_longest())


def in_words(flags: tuple[str, ...]) -> str:
    return f" (`{' '.join(flags)}`)" if flags else ""


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The file system at `folder` refuses to be written, as one does that found an error.  Needs root."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """Nothing can be made or removed in `folder`, by those who are not above permissions."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(mode)


# Root without the right to pass over permissions.
_MORTAL = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def refused(place: Place, name: str, fault: Callable, words: str, what: str, under: tuple[str, ...] = ()) -> Row:
    """The folder of checkpoints cannot be written from some step on, and can when the run is started again."""
    iterations = 24
    want, folder = place.undisturbed(iterations, 2), place.root / name
    run = place.sft(folder, iterations, under=under)
    steps = place.rng.randint(3, 8)
    assert run.wait_until(lambda: run.output.count(STEP) >= steps, pause=0.01), run.output[-3000:]
    with fault(folder / "run"):
        place.until_ended(run)
    assert run.process.returncode != 0, f"a run that cannot save says that it succeeded: {run.log}"
    assert re.search(rf"^pretrain_sft: error: .*{words}", run.output, re.MULTILINE), run.output[-3000:]
    assert "resumed at iteration" in place.sft(folder, iterations).finish()
    return Row(what, 1, 1, assert_same_end(folder, want), place.take_longest())


def read_only_disk(place: Place) -> Row:
    what = "The disk turns read-only in mid-run; writable, started again"
    return refused(place, "read-only", read_only, "Read-only file system", what)


def permission_denied(place: Place) -> Row:
    what = "The folder's permissions are taken away in mid-run; given back, started again"
    return refused(place, "permission", no_permission, "Permission denied", what, under=_MORTAL)


def slow_disk(place: Place, *flags: str) -> Row:
    """The moments lie anywhere in a save: a dozen or more calls of fsync, one after the other."""
    iterations, kills = 24, 5
    want, folder = place.undisturbed(iterations, 1), place.root / "".join(["slow", *flags])
    delay = f"inject=fsync:delay_enter={int(SLOW_SECONDS * 1e6)}"
    under = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", delay)
    done, beside = 0, 0
    for _ in range(kills):
        run = place.sft(folder, iterations, *flags, processes=1, under=under)
        if not run.wait_until(lambda run=run: unfinished(run), pause=0.001):
            break
        writing, before = unfinished(run), run.output.count(STEP)
        time.sleep(place.rng.uniform(0, 12 * SLOW_SECONDS))
        if run.ended():
            break
        if unfinished(run) == writing:
            beside += run.output.count(STEP) - before
        run.kill()
        place.until_ended(run)
        done += 1
    assert done >= 3, f"the run ended after {done} kills; make it longer"
    place.sft(folder, iterations, *flags, processes=1).finish()
    what = f"Each fsync takes {SLOW_SECONDS:g} s more{in_words(flags)}; everything killed while it saves"
    if flags:
        assert beside, f"no step was made while a checkpoint was written in the background: {folder}"
        what += f" and trains on ({beside} steps)"
    return Row(what, done, done, assert_same_end(folder, want), place.take_longest())


def grpo_killed(place: Place) -> Row:
    """The torch engine at one rank: rollouts, reference and saves are hit as they come."""
    flags = ("--train-iters", "30")
    setting, kills = (place.model, place.rl_pairs), max(2, place.kills // 5)
    Run(setting, place.root / "grpo-undisturbed", *flags).finish(seconds=1800)
    folder, done = place.root / "grpo", 0
    while done < kills:
        run = Run(setting, folder, *flags, *(word for flag in flags_of(done) for word in (flag, "")))
        steps = place.rng.randint(1, 4)
        if not run.wait_until(lambda run=run, steps=steps: run.output.count(STEP) >= steps, pause=0.01):
            break
        time.sleep(place.rng.uniform(0, 0.5))
        if run.ended():
            break
        run.kill()
        place.until_ended(run)
        done += 1
        place.say(f"GRPO: {done} of {kills}")
    assert done >= 0.6 * kills, f"the run ended after {done} of {kills} kills; make it longer"
    assert "resumed at iteration" in Run(setting, folder, *flags).finish() or done < kills
    end = assert_same_end(folder, place.root / "grpo-undisturbed")
    return Row("GRPO killed in rollouts, updates and saves", done, done, end, place.take_longest())


def engine_killed(place: Place) -> Row:
    """vLLM is started anew within the run; its samples are others after that, so that curves can't be compared."""
    setting, folder, kills = (place.wide_model, place.rl_pairs), place.root / "engine", 3
    flags = ("--rollout-engine", "vllm", "--train-iters", "8", "--save-interval", "100")
    run = Run(setting, folder, *flags, "--max-completion-length", "100", "--rollout-max-restarts", str(kills))
    for kill in range(kills):
        assert run.wait_until(lambda kill=kill: run.output.count(STEP) >= 2 * kill + 1, pause=0.01), run.output[-3000:]
        (engine,) = run.engines()
        os.kill(engine, signal.SIGKILL)
        words = f"started anew ({kill + 1} of {kills})"
        run.wait_for(words, seconds=120)
    run.finish()
    run.assert_no_orphans()
    lines = metrics(folder)
    assert [line["iteration"] for line in lines] == list(range(1, 9))
    worst = max(line["mismatch_mean"] for line in lines)
    assert worst < 1e-3, f"weights did not arrive: mean |difference| of log-probs {worst}"
    end = f"all 8 steps; trainer's and engine's log-probs within {worst:.0e}"
    return Row("GRPO's vLLM engine killed", kills, 0, end, None)


SCENARIOS = {
    "killed": processes_killed,
    "layouts": other_world_sizes,
    "stalled": stalled_rank,
    "full-disk": full_disk,
    "full-disk-async": lambda place: full_disk(place, *BACKGROUND),
    "read-only": read_only_disk,
    "permission": permission_denied,
    "slow-disk": slow_disk,
    "slow-disk-async": lambda place: slow_disk(place, *BACKGROUND),
    "grpo": grpo_killed,
    "engine": engine_killed,
}
