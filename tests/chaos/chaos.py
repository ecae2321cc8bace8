"""Disturb real training runs in every way that clusters do, and write what came of it into docs/reliability.md.

make chaos                                             # all scenarios, 50 kills in the first: 20 minutes on 2 cores
.venv/bin/python tests/chaos/chaos.py --only full-disk # one scenario, its row printed
"""

import argparse
import datetime
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
import conftest  # noqa: E402, F401 - gives child processes the paths that they need
from place import Place, Row  # noqa: E402
from scenarios import SCENARIOS  # noqa: E402

BEGIN, END = "<!-- made by make chaos -->", "<!-- end -->"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of processes in the first scenario; GRPO gets a fifth")
    parser.add_argument("--only", nargs="+", choices=tuple(SCENARIOS), help="scenarios; default: all, and the table")
    parser.add_argument("--output", type=Path, help="file with the table; default: none with --only, else the document")
    parser.add_argument("--seed", type=int, help="of who is killed and when; default: drawn anew")
    given = parser.parse_args(words)
    seed = random.randrange(2**32) if given.seed is None else given.seed
    output = given.output or (None if given.only else TESTS.parent / "docs" / "reliability.md")
    say(f"seed {seed}")
    rows, failed, since = [], [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="umer1-chaos-") as folder:
        place = Place(Path(folder), given.kills, random.Random(seed), say)
        for name in given.only or SCENARIOS:
            try:
                rows.append(SCENARIOS[name](place))
                say(f"{name}: {rows[-1].end}")
            except AssertionError as error:
                failed.append(name)
                say(f"{name}: FAILED: {error}")
    table = table_of(rows, failed, seed, time.monotonic() - since)
    print(table)
    if output is not None and not failed:
        write_table(output, table)
    return 1 if failed else 0


def say(words: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {words}", file=sys.stderr, flush=True)


def table_of(rows: list[Row], failed: list[str], seed: int, seconds: float) -> str:
    lines = ["| what happens | faults | starts after them | the end, beside the undisturbed run | longest ending |"]
    lines += ["|---|---:|---:|---|---:|"]
    for row in rows:
        longest = "" if row.longest is None else f"{row.longest:.1f} s"
        lines += [f"| {row.what} | {row.faults} | {row.starts} | {row.end} | {longest} |"]
    lines += [f"| {name} | | | FAILED | |" for name in failed]
    return "\n".join([*lines, "", f"`make chaos`, seed {seed}, {seconds / 60:.0f} minutes; {machine()}."])


def machine() -> str:
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=TESTS
    ).stdout
    load, today = os.getloadavg()[0], datetime.datetime.now(datetime.UTC).date()
    python = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores (load {load:.1f} at the end), {python}, commit {commit.strip()}, {today}"


def write_table(path: Path, table: str) -> None:
    """Replace what stands between the marks."""
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
