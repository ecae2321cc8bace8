"""Results as people read them: aligned text tables and PNG plots.

A result is the dictionary that `umer1 eval` writes as results.json (modes.py says what its sections mean).
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from umer1.errors import UserError
from umer1.evaluation.modes import MODES
from umer1.files import atomic_path, write_json, write_text

_SCORE_COLUMNS = {
    "disc": "disc",
    "gen": "gen",
    "oracle": "oracle",
    "empty_thoughts": "gen, empty",
    "shuffled_thoughts": "gen, shuffled",
}


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Columns aligned by spaces: the first to the left, the others to the right, a rule under the headers."""
    widths = [max(len(line[column]) for line in [headers, *rows]) for column in range(len(headers))]
    lines = []
    for line in [headers, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def percent(entry: dict | None) -> str:
    """`60.4 ±1.8`, or `-` where there is no such number."""
    return f"{100 * entry['value']:.1f} ±{100 * entry['stderr']:.1f}" if entry else "-"


def evaluation_report(result: dict) -> str:
    """Every number of one result as text: scores, pass@k and responses by task, then the splits."""
    sections = {**result["tasks"], "mean": result["mean"]}
    blocks = [_score_table(sections)]
    samples = sorted(int(k) for k in result["mean"].get("pass@k", {}))
    if samples:
        rows = [
            [name, *(percent(section["pass@k"].get(str(k))) for k in samples)] for name, section in sections.items()
        ]
        blocks.append(table(["pass@k of samples", *(f"k={k}" for k in samples)], rows))
    blocks.append(_response_table(sections))
    for split, groups in result["mean"]["splits"].items():
        rows = [
            [group, str(numbers["disc"]["n"]), *(percent(numbers.get(mode)) for mode in MODES)]
            for group, numbers in groups.items()
        ]
        blocks.append(table([f"by {split}", "queries", *MODES], rows))
    return "\n\n".join(blocks)


def _score_table(sections: dict[str, dict]) -> str:
    rows = []
    for name, section in sections.items():
        metric = section.get("metric", "")
        numbers = [percent(section["score"].get(column)) for column in _SCORE_COLUMNS]
        rows.append([name, metric, str(section["score"]["disc"]["n"]), *numbers])
        if metric not in ("", "hit@1"):
            rows.append(["", "hit@1", "", *(percent(section["hit@1"].get(column)) for column in _SCORE_COLUMNS)])
    return table(["task", "metric", "queries", *_SCORE_COLUMNS.values()], rows)


def _response_table(sections: dict[str, dict]) -> str:
    """Mean tokens and rates of the greedy responses, cosine between different samples, milliseconds a query."""
    columns = {
        "response_length": ("tokens", 1),
        "format_rate": ("format", 3),
        "missing_gen_emb": ("no <gen_emb>", 3),
        "thought_cosine": ("cosine", 3),
        "distinct_thoughts": ("distinct", 3),
    }
    rows = []
    for name, section in sections.items():
        row = [name]
        for key, (_, digits) in columns.items():
            entry = section.get("responses", {}).get(key)
            row.append(f"{entry['value']:.{digits}f}" if entry else "-")
        for mode in ("disc", "gen"):
            seconds = section["seconds_per_query"].get(mode)
            row.append("-" if seconds is None else f"{1000 * seconds:.2f}")
        rows.append(row)
    return table(["responses", *(title for title, _ in columns.values()), "ms disc", "ms gen"], rows)


def compare(results: dict[str, dict], png: str | Path | None = None) -> str:
    """One table over several results of the same benchmark, name -> result; also as bars in `png`.

    UserError where they were not scored on the same queries: such numbers must not stand side by side.
    """
    (first_name, first), *others = results.items()
    for name, result in others:
        if _scored_on(result) != _scored_on(first):
            raise UserError(f"{name} was scored on other queries than {first_name}: score both on the same data")
    tasks = list(first["tasks"])
    rows = [
        [name, mode, *(percent(result["tasks"][task]["score"][mode]) for task in tasks), percent(mean[mode])]
        for name, result in results.items()
        for mode in MODES
        if mode in (mean := result["mean"]["score"])
    ]
    if png is not None:
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        _bars(figure.subplots(), results)
        _save(figure, png)
    return table(["model", "mode", *tasks, "mean"], rows)


def _scored_on(result: dict) -> tuple:
    sizes = {name: (task["num_queries"], task["num_candidates"]) for name, task in result["tasks"].items()}
    return result["benchmark"], result.get("data_fingerprint"), sizes


def write_evaluation(result: dict, directory: str | Path) -> None:
    """results.json, results.txt and results.png in `directory`."""
    directory = Path(directory)
    write_json(directory / "results.json", result)
    write_text(directory / "results.txt", evaluation_report(result) + "\n")
    _save(_evaluation_figure(result), directory / "results.png")


def _save(figure: Figure, png: str | Path) -> None:
    with atomic_path(png) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _bars(axes: Axes, results: dict[str, dict]) -> None:
    """Grouped bars with standard errors: one group per task and the mean, one bar per model and mode."""
    tasks = [*next(iter(results.values()))["tasks"], "mean"]
    series = [(name, mode) for name, result in results.items() for mode in MODES if mode in result["mean"]["score"]]
    width = 0.8 / len(series)
    for position, (name, mode) in enumerate(series):
        sections = {**results[name]["tasks"], "mean": results[name]["mean"]}
        entries = [sections[task]["score"][mode] for task in tasks]
        axes.bar(
            [group + (position - (len(series) - 1) / 2) * width for group in range(len(tasks))],
            [100 * entry["value"] for entry in entries],
            width,
            yerr=[100 * entry["stderr"] for entry in entries],
            error_kw={"elinewidth": 0.8},
            label=f"{name} {mode}".strip(),
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("score, per cent (± standard error)")
    axes.set_ylim(0, 105)
    # above the axes: inside it would hide bars
    axes.legend(fontsize=8, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _evaluation_figure(result: dict) -> Figure:
    """The modes by task; beside them, where samples were drawn, pass@k of each task."""
    with_samples = bool(result["mean"].get("pass@k"))
    figure = Figure(figsize=(12, 4.2) if with_samples else (8, 4.2), layout="constrained")
    if not with_samples:
        _bars(figure.subplots(), {"": result})
        return figure
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    _bars(left, {"": result})
    for name, section in {**result["tasks"], "mean": result["mean"]}.items():
        points = sorted((int(k), 100 * entry["value"]) for k, entry in section["pass@k"].items())
        right.plot(*zip(*points, strict=True), marker="o", linewidth=3 if name == "mean" else 1, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks([k for k, _ in points], [str(k) for k, _ in points])
    right.set_xlabel("k samples a query")
    right.set_ylabel("pass@k, per cent")
    right.set_ylim(0, 105)
    right.legend(fontsize=8)
    return figure
