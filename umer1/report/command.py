"""`umer1 report`: training runs as one HTML page with curves, speed, samples, settings and environment.

    umer1 report runs/sft                                   writes runs/sft/report.html
    umer1 report a=runs/seed0 b=runs/seed1 --output ab.html several runs in the same charts, and which settings differ

A run is the directory that was --save; one that still trains can be read.  The page needs no network and no script.
"""

import argparse
from pathlib import Path

from umer1 import __version__
from umer1.errors import UserError
from umer1.files import write_text
from umer1.report.page import page
from umer1.report.runs import read_run


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="umer1 report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="directories that were --save, with names or not")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html of a single run")
    given = parser.parse_args(argv)
    places = [_named(word) for word in given.runs]
    names = [name for name, _ in places]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called {_first_double(names)!r}; give them names: NAME=RUN")
    if given.output is None and len(places) > 1:
        raise UserError("several runs need --output FILE")
    runs, problems = [], []
    for name, path in places:
        try:
            runs.append(read_run(name, path))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    output = given.output or places[0][1] / "report.html"
    try:
        write_text(output, page(runs, f"umer1 {__version__} report"))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    noun = "run" if len(runs) == 1 else "runs"
    print(f"{output}: {len(runs)} {noun}, {sum(len(run.curves) for run in runs)} curves")


def _named(word: str) -> tuple[str, Path]:
    name, given, path = word.partition("=")
    if given and name and not Path(word).exists():
        return name, Path(path)
    return Path(word).resolve().name, Path(word)


def _first_double(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
