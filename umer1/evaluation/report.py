"""Results as people read them: aligned text tables and PNG plots.

A result is the dictionary that `umer1 eval` writes as results.json (modes.py says what its sections mean).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from umer1.evaluation.modes import MODES
from umer1.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCORE_COLUMNS = {
    "disc": "disc",
    "gen": "gen",
    "oracle": "oracle",
    "adaptive": "adaptive",
    "fused": "both fused",
    "empty_thoughts": "gen, empty",
    "shuffled_thoughts": "gen, shuffled",
}
RESPONSE_COLUMNS = {  # title -> key, digits
    "tokens": ("response_length", 1),
    "format": ("format_rate", 3),
    "no <gen_emb>": ("missing_gen_emb", 3),
    "cosine": ("thought_cosine", 3),
    "distinct": ("distinct_thoughts", 3),
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
    if "adaptive" in result["mean"]:
        blocks += [_adaptive_table(sections), _curve_table(result["mean"])]
    samples = sorted(int(k) for k in result["mean"].get("pass@k", {}))
    if samples:
        rows = [
            [name, *(percent(section["pass@k"].get(str(k))) for k in samples)] for name, section in sections.items()
        ]
        blocks.append(table(["pass@k of samples", *(f"k={k}" for k in samples)], rows))
    means = sorted(int(k) for k in result["mean"].get("self_consistency", {}))
    if means:
        rows = [
            [name, *(percent(section["self_consistency"].get(str(k))) for k in means)]
            for name, section in sections.items()
        ]
        blocks.append(table(["mean of k samples", *(f"k={k}" for k in means)], rows))
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


def _adaptive_table(sections: dict[str, dict]) -> str:
    """Who reasoned, what the oracle would have needed, the cost beside gen's, and the calibration."""
    rows = []
    for name, section in sections.items():
        adaptive = section["adaptive"]
        tokens = (section["responses"]["response_length"]["value"], adaptive["new_tokens"]["value"])
        seconds = [section["seconds_per_query"].get(mode) for mode in ("disc", "gen", "adaptive")]
        calibration = adaptive["calibration"]
        rows.append(
            [name, percent(adaptive["reasoned"]), percent(adaptive["oracle_reasoned"])]
            + [f"{value:.1f}" for value in tokens]
            + ["-" if value is None else f"{1000 * value:.2f}" for value in seconds]
            + [f"{calibration[key]:.3f}" for key in ("disc_temperature", "gen_temperature", "gen_confidence")]
        )
    headers = ["adaptive", "reasoned", "oracle needs", "tokens gen", "adaptive", "ms disc", "gen", "adaptive"]
    return table([*headers, "t disc", "t gen", "gen conf."], rows)


def _curve_table(mean: dict) -> str:
    """Adaptive mode over its price, as the mean over tasks; then its part of the oracle's lead over gen."""
    points = [("always disc", 0.0, 0.0, mean["score"]["disc"], mean["score"]["disc"])]
    for price, point in sorted(mean["curve"].items(), key=lambda item: -float(item[0])):
        points.append((f"price {price}", point["reasoned"], point["new_tokens"], point["score"], point["unfused"]))
    rows = [
        [name, f"{100 * share:.1f}", f"{tokens:.2f}", percent(score), percent(unfused)]
        for name, share, tokens, score, unfused in points
    ]
    rows.append(
        ["oracle", percent(mean["adaptive"]["oracle_reasoned"]).split()[0], "", percent(mean["score"]["oracle"]), ""]
    )
    text = table(["curve of the mean", "reasoned", "new tokens", "score", "gen unfused"], rows)
    recovered = mean["adaptive"]["gap_recovered"]
    if recovered is None:
        return text + "\nthe oracle does not lead gen"
    return text + f"\nadaptive has {100 * recovered:.0f}% of the oracle's lead over gen"


def _response_table(sections: dict[str, dict]) -> str:
    """`response_cells`, and milliseconds a query."""
    rows = []
    for name, section in sections.items():
        row = [name, *response_cells(section)]
        for mode in ("disc", "gen"):
            seconds = section["seconds_per_query"].get(mode)
            row.append("-" if seconds is None else f"{1000 * seconds:.2f}")
        rows.append(row)
    return table(["responses", *RESPONSE_COLUMNS, "ms disc", "ms gen"], rows)


def response_cells(section: dict) -> list[str]:
    """Mean tokens and rates of the greedy responses, cosine between different samples, share of different samples."""
    entries = [(section.get("responses", {}).get(key), digits) for key, digits in RESPONSE_COLUMNS.values()]
    return [f"{entry['value']:.{digits}f}" if entry else "-" for entry, digits in entries]


def write_evaluation(result: dict, directory: str | Path) -> None:
    """results.json, results.txt and results.png in `directory`."""
    directory = Path(directory)
    write_json(directory / "results.json", result)
    write_text(directory / "results.txt", evaluation_report(result) + "\n")
    save_figure(_evaluation_figure(result), directory / "results.png")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches.  matplotlib takes half a second to import: only what draws pays for it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", png: str | Path) -> None:
    with atomic_path(png) as aside:
        figure.savefig(aside, format="png", dpi=120)


def mode_series(results: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Of mini's results, name -> result: the score of each model and mode by task and as the mean."""
    series = {}
    for name, result in results.items():
        sections = {**result["tasks"], "mean": result["mean"]}
        for mode in MODES:
            if mode in result["mean"]["score"]:
                series[f"{name} {mode}".strip()] = {task: part["score"][mode] for task, part in sections.items()}
    return series


def draw_bars(axes: "Axes", series: dict[str, dict[str, dict]]) -> None:
    """Grouped bars with standard errors.  series: label -> group -> estimate, the same groups for all labels."""
    groups = list(next(iter(series.values())))
    width = 0.8 / len(series)
    for position, (label, entries) in enumerate(series.items()):
        axes.bar(
            [group + (position - (len(series) - 1) / 2) * width for group in range(len(groups))],
            [100 * entry["value"] for entry in entries.values()],
            width,
            yerr=[100 * entry["stderr"] for entry in entries.values()],
            error_kw={"elinewidth": 0.8},
            label=label,
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("score, per cent (± standard error)")
    axes.set_ylim(0, 105)
    # above the axes: inside it would hide bars
    axes.legend(fontsize=8, ncols=min(len(series), 7), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _evaluation_figure(result: dict) -> "Figure":
    """The modes by task; beside them, where gen mode was run, score over cost and, with samples, pass@k."""
    panels = [lambda axes: draw_bars(axes, mode_series({"": result}))]
    if "curve" in result["mean"]:
        panels.append(lambda axes: draw_curve(axes, result["mean"]))
    if result["mean"].get("pass@k"):
        panels.append(lambda axes: draw_pass_at_k(axes, {**result["tasks"], "mean": result["mean"]}))
    figure = new_figure(8 + 4.5 * (len(panels) - 1), 4.2)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=[2.0] + [1.1] * (len(panels) - 1))
    for draw, axes in zip(panels, grid.flat, strict=True):
        draw(axes)
    return figure


def draw_curve(axes: "Axes", mean: dict) -> None:
    """Score over the share of queries that reasoned: adaptive mode by price, between disc, gen and the oracle."""
    score = {mode: 100 * entry["value"] for mode, entry in mean["score"].items()}
    points = sorted(mean["curve"].values(), key=lambda point: point["reasoned"])
    shares = [100 * point["reasoned"] for point in points]
    axes.plot([0, 100], [score["disc"], score["gen"]], "k:", linewidth=1, label="chosen at random")
    for key, label in (("score", "adaptive, by price"), ("unfused", "the same, gen's list alone")):
        axes.plot(shares, [100 * point[key]["value"] for point in points], marker=".", linewidth=1, label=label)
    adaptive = mean["adaptive"]
    marks = {
        "disc": (0.0, "s"),
        "gen": (100.0, "s"),
        "oracle": (100 * adaptive["oracle_reasoned"]["value"], "*"),
        "adaptive": (100 * adaptive["reasoned"]["value"], "o"),
    }
    for mode, (share, marker) in marks.items():
        axes.plot([share], [score[mode]], marker, markersize=8, linestyle="none", label=mode)
    axes.set_xlabel("queries that reasoned, per cent")
    axes.set_ylabel("score, per cent")
    axes.legend(fontsize=7)


def draw_pass_at_k(axes: "Axes", sections: dict[str, dict]) -> None:
    """One line of pass@k per section that has samples; one named mean is drawn thicker."""
    found: dict[int, None] = {}
    for name, section in sections.items():
        points = sorted((int(k), 100 * entry["value"]) for k, entry in section["pass@k"].items())
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=3 if name == "mean" else 1, label=name)
        found |= dict.fromkeys(k for k, _ in points)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(found), [str(k) for k in sorted(found)])
    axes.set_xlabel("k samples a query")
    axes.set_ylabel("pass@k, per cent")
    axes.set_ylim(0, 105)
    axes.legend(fontsize=8)
