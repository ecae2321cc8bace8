"""Killed at random moments, mid-save included, a run resumes and ends with the weights of the undisturbed one."""

import json
import random
import time

from programs import SFT, Forked, run_in_forks
from sft_reference import write_pairs
from test_kill_and_resume import arguments, assert_identical
from tiny_qwen2_vl import make_tiny_directory

KILLS = 20
STEPS = ("--train-iters", "80")


def test_killed_at_twenty_random_moments(tmp_path):
    """Half of the kills wait until a checkpoint is being written, in the step or in the background by turns.

    The delays are drawn anew in every run.
    """
    setting = make_tiny_directory(tmp_path / "model", layers=2), write_pairs(tmp_path / "data", count=24)
    seed = random.randrange(2**32)
    print(f"delays drawn with seed {seed}")
    rng = random.Random(seed)
    kills = 0
    for attempt in range(KILLS):
        more = ["--async-save"] if attempt % 4 > 1 else []
        run = Forked(SFT, arguments(setting, tmp_path, *STEPS, *more), tmp_path / f"output-{attempt}")
        lines = rng.randint(1, 4)
        run.wait_until(lambda run=run, lines=lines: run.output.count("elapsed time") >= lines, 120)
        if attempt % 2:
            run.wait_until(lambda: list((tmp_path / "run").glob(".*")), 5)
        time.sleep(rng.uniform(0, 0.03))
        if run.ended():
            break
        run.kill()
        kills += 1
    print(f"{kills} kills")
    assert kills >= 10, f"the run ended before it could be disturbed; make it longer\n{run.output[-3000:]}"
    done = run_in_forks(SFT, arguments(setting, tmp_path, *STEPS, "--async-save"))
    assert done.returncode == 0 and "resumed at iteration" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert run_in_forks(SFT, arguments(setting, tmp_path / "undisturbed", *STEPS)).returncode == 0
    assert_identical(tmp_path, tmp_path / "undisturbed")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("seconds_save", "seconds_save_background"):
        assert any(record.get(name, 0) > 0 for record in records), name
