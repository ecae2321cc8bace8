"""`umer1 compare`: the results of several evaluations side by side."""

import argparse
import json
from pathlib import Path

from umer1.errors import UserError
from umer1.evaluation.report import compare


def read_result(path: str | Path) -> dict:
    """results.json as `umer1 eval` wrote it, from the file or from its directory."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a result ({error}); give what `umer1 eval --output` wrote"
        ) from None
    if not isinstance(result, dict) or not {"benchmark", "tasks", "mean"} <= set(result):
        raise UserError(f"{path}: not a result of `umer1 eval`")
    return result


def main(argv: list[str]) -> None:
    """Print one table for `NAME=DIR ...` and, with --png, draw it."""
    parser = argparse.ArgumentParser(prog="umer1 compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", nargs="+", metavar="NAME=PATH", help="a name and the directory given to --output")
    parser.add_argument("--png", help="also draw the numbers as bars into this file")
    arguments = parser.parse_args(argv)
    results = {}
    for item in arguments.results:
        name, separator, path = item.partition("=")
        if not separator or not name or not path:
            raise UserError(f"{item!r} is not NAME=PATH")
        if name in results:
            raise UserError(f"the name {name!r} stands twice; give each result its own")
        results[name] = read_result(path)
    print(compare(results, arguments.png))
