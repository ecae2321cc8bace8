"""`umer1 compare`: the results of several evaluations side by side, such as those before and after GRPO.

    umer1 compare sft=runs/eval-sft grpo=runs/eval-grpo --png compare.png
    umer1 compare disc=runs/mmeb/results_disc-disc.json gen=runs/mmeb/results_gen-gen.json

PATH is what `umer1 eval --output` was given, or a results file in it; the results are of one benchmark and on the same
data.  mini: scores by mode and task; hit@1 of gen and, query by query, what changed since the first result; pass@k; and
the responses: length, format, how far apart the embeddings of different thoughts of one input are.  mmeb-v2: scores by
the paper's columns (the modalities among them) and by task, and what changed since the first result.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.compare import compare_mmeb
from umer1.evaluation.modes import MODES
from umer1.evaluation.report import (
    RESPONSE_COLUMNS,
    draw_bars,
    draw_pass_at_k,
    mode_series,
    new_figure,
    percent,
    response_cells,
    save_figure,
    table,
)
from umer1.evaluation.retrieval import estimate, mean_of_estimates

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_result(path: str | Path) -> dict:
    """results.json as `umer1 eval` wrote it, from the file or from its directory."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as a result ({error}); give what `umer1 eval --output` wrote"
        ) from None
    if not isinstance(result, dict) or not {"benchmark", "tasks", "columns" if _is_mmeb(result) else "mean"} <= set(
        result
    ):
        raise UserError(f"{path}: not a result of `umer1 eval`")
    return result


def _is_mmeb(result: dict) -> bool:
    return result.get("benchmark") == "mmeb-v2"


def compare(results: dict[str, dict], png: str | Path | None = None) -> str:
    """Tables over several results of the same benchmark, name -> result; also drawn in `png`.

    UserError where they were not scored on the same queries: such numbers must not stand side by side.
    """
    benchmarks = {result["benchmark"] for result in results.values()}
    if len(benchmarks) > 1:
        raise UserError(f"results of several benchmarks ({', '.join(sorted(benchmarks))}): give those of one")
    if _is_mmeb(next(iter(results.values()))):
        text, columns = compare_mmeb(results)
        if png is not None:
            figure = new_figure(max(9, 1.2 * len(columns)), 4.2)
            short = {label: label.replace(" (", "\n(") for label in columns}  # side by side under their bars
            series = {name: {short[label]: row[name] for label, row in columns.items()} for name in results}
            draw_bars(figure.subplots(), series)
            save_figure(figure, png)
        return text
    return _compare_mini(results, png)


def _compare_mini(results: dict[str, dict], png: str | Path | None) -> str:
    (first_name, first), *others = results.items()
    for name, result in others:
        if _scored_on(result) != _scored_on(first):
            raise UserError(f"{name} was scored on other queries than {first_name}: score both on the same data")
    if png is not None:
        save_figure(_figure(results), png)
    blocks = [_score_table(results)]
    with_gen = {name: result for name, result in results.items() if "gen" in result["mean"]["score"]}
    if with_gen:
        blocks += [_gen_table(with_gen), _response_table(with_gen)]
    sampled = _with_samples(results)
    if sampled:
        blocks.insert(2, _pass_table(sampled))
    return "\n\n".join(blocks + _input_differences(results))


def _input_differences(results: dict[str, dict]) -> list[str]:
    """A line where results come from inputs of other shapes, which moves scores as another model does."""
    (first_name, first), *others = results.items()
    found = []
    for name, result in others:
        here, there = (part.get("inputs") or {} for part in (result, first))
        both = sorted(here.keys() & there.keys())
        found += [
            f"{key} {there[key]} ({first_name}) and {here[key]} ({name})" for key in both if here[key] != there[key]
        ]
    return ["inputs differ: " + "; ".join(found)] if found else []


def changes(before: dict, after: dict, mode: str) -> dict[str, dict] | None:
    """By task and as their mean: how much hit@1 of `mode` rose, with the standard error of the paired difference.

    None where a result has no hits query by query.
    """
    found = {}
    for name, task in before["tasks"].items():
        hits = [part.get("queries", {}).get(mode) for part in (task, after["tasks"][name])]
        if None in hits:
            return None
        found[name] = estimate(np.array(hits[1]) - np.array(hits[0]))
    return {**found, "mean": mean_of_estimates(list(found.values()))}


def _scored_on(result: dict) -> tuple:
    sizes = {name: (task["num_queries"], task["num_candidates"]) for name, task in result["tasks"].items()}
    return result["benchmark"], result.get("data_fingerprint"), sizes


def _sections(result: dict) -> dict[str, dict]:
    return {**result["tasks"], "mean": result["mean"]}


def _with_samples(results: dict[str, dict]) -> dict[str, dict]:
    return {name: result for name, result in results.items() if result["mean"].get("pass@k")}


def _score_table(results: dict[str, dict]) -> str:
    columns = list(_sections(next(iter(results.values()))))
    rows = [
        [name, mode, *(percent(section["score"][mode]) for section in _sections(result).values())]
        for name, result in results.items()
        for mode in MODES
        if mode in result["mean"]["score"]
    ]
    return table(["model", "mode", *columns], rows)


def _gen_table(results: dict[str, dict]) -> str:
    (first_name, first), *others = results.items()
    rows = [
        [name, *(percent(section["hit@1"]["gen"]) for section in _sections(result).values())]
        for name, result in results.items()
    ]
    for name, result in others:
        changed = changes(first, result, "gen")
        if changed is not None:
            cells = [("+" if entry["value"] >= 0 else "") + percent(entry) for entry in changed.values()]
            rows.append([f"{name} - {first_name}", *cells])
    return table(["gen hit@1", *_sections(first)], rows)


def _pass_table(results: dict[str, dict]) -> str:
    """Rows by task, so that the models stand under each other."""
    samples = sorted({int(k) for result in results.values() for k in result["mean"]["pass@k"]})
    rows = [
        [task, name, *(percent(_sections(result)[task]["pass@k"].get(str(k))) for k in samples)]
        for task in _sections(next(iter(results.values())))
        for name, result in results.items()
    ]
    return table(["pass@k of samples", "model", *(f"k={k}" for k in samples)], rows)


def _response_table(results: dict[str, dict]) -> str:
    rows = [
        [task, name, *response_cells(_sections(result)[task])]
        for task in _sections(next(iter(results.values())))
        for name, result in results.items()
    ]
    return table(["responses", "model", *RESPONSE_COLUMNS], rows)


def _figure(results: dict[str, dict]) -> "Figure":
    """Bars of the scores; beside them, where samples were drawn, pass@k as the mean over tasks."""
    sampled = _with_samples(results)
    figure = new_figure(13 if sampled else 9, 4.2)
    if not sampled:
        draw_bars(figure.subplots(), mode_series(results))
        return figure
    left, right = figure.subplots(1, 2, width_ratios=[2.4, 1])
    draw_bars(left, mode_series(results))
    draw_pass_at_k(right, {name: result["mean"] for name, result in sampled.items()})
    return figure


def main(argv: list[str]) -> None:
    """Print the tables for `NAME=DIR ...` and, with --png, draw them."""
    parser = argparse.ArgumentParser(
        prog="umer1 compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="NAME=PATH", help="a name and the directory given to --output")
    parser.add_argument("--png", help="also draw the numbers into this file")
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
