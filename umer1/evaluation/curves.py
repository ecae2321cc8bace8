"""Training curves: metrics.jsonl, one JSON object of numbers a step, as one PNG of panels."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from umer1.errors import UserError
from umer1.files import atomic_path

STEP = "iteration"
PANELS = {  # title -> keys of the records
    "loss": ("loss", "disc_loss", "gen_loss", "ce_query", "ce_positive"),
    "recall@1 in the batch": ("disc_recall", "gen_recall"),
    "similarity": (
        "disc_positive_similarity",
        "disc_negative_similarity",
        "gen_positive_similarity",
        "gen_negative_similarity",
    ),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
}


def read_metrics(path: str | Path) -> list[dict]:
    """The records that have a step, the last one of each step (a resumed run repeats some), in step order.

    A torn last line, as a killed run leaves it, is passed over; UserError where nothing can be drawn.
    """
    records: dict[int, dict] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get(STEP), int):
            records[record[STEP]] = record
    if not records:
        raise UserError(f"{path}: no line with an {STEP!r}; give the metrics.jsonl of a run")
    return [records[step] for step in sorted(records)]


def plot_training(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Write the curves of a run's metrics.jsonl to `png`."""
    records = read_metrics(metrics_jsonl)
    panels = {}
    for title, names in PANELS.items():
        curves = {name: [(r[STEP], r[name]) for r in records if r.get(name) is not None] for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            panels[title] = curves
    if not panels:
        raise UserError(f"{metrics_jsonl}: none of the metrics that are drawn ({', '.join(PANELS)}) is in it")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(STEP, fontsize=8)
        axes.legend(fontsize=7)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    with atomic_path(png) as aside:
        figure.savefig(aside, format="png", dpi=120)
