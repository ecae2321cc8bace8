"""Training curves: metrics.jsonl, one JSON object of numbers a step, as one PNG of panels."""

import json
from pathlib import Path

from umer1.errors import UserError
from umer1.evaluation.report import new_figure, save_figure

STEP = "iteration"
MARKED = 40  # so few points are marked: a line through one point shows nothing
REWARD_PARTS, DATASET_REWARDS = "reward_*", "dataset_reward/*"  # whatever terms and data sets the run had
PANELS = {  # title -> keys of the records
    "loss": ("loss", "disc_loss", "gen_loss", "ce_query", "ce_positive"),
    "recall@1 in the batch": ("disc_recall", "gen_recall"),
    "similarity": (
        "disc_positive_similarity",
        "disc_negative_similarity",
        "gen_positive_similarity",
        "gen_negative_similarity",
    ),
    "reward": ("reward", REWARD_PARTS),
    "reward by data set": (DATASET_REWARDS,),
    "ranking and margin of the rollouts": ("ranking", "margin"),
    "held out": ("eval_gen_hit1", "eval_reward", "eval_gen_margin", "eval_missing_gen_emb_share"),
    "spread within groups": ("reward_std", "zero_spread_share"),
    "KL to the reference": ("kl",),
    "entropy (nats)": ("entropy",),
    "share of tokens clipped": ("clip_share",),
    "response length (tokens)": ("response_length", "eval_response_length"),
    "share of responses": ("cut_off_share", "missing_gen_emb_share", "failed_share"),
    "engine against trainer: log-probs": ("mismatch_mean", "mismatch_k3"),
    "engine against trainer: ratio, 99th percentile": ("mismatch_p99", "mismatch_p99_truncated"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second", "generated_tokens_per_second", "trained_tokens_per_second"),
    "seconds per step": ("seconds_rollout", "seconds_score", "seconds_update", "seconds_sync"),
}


def read_metrics(path: str | Path) -> list[dict]:
    """One record a step, in step order: its training and its evaluation line put together.

    A resumed run may repeat a step: its last values count.  A torn last line, as a killed run leaves it, is passed
    over.  UserError where nothing can be drawn.
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
            records[record[STEP]] = records.get(record[STEP], {}) | record
    if not records:
        raise UserError(f"{path}: no line with an {STEP!r}; give the metrics.jsonl of a run")
    return [records[step] for step in sorted(records)]


def plot_training(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Write the curves of a run's metrics.jsonl to `png`."""
    records = read_metrics(metrics_jsonl)
    panels = {}
    for title, names in PANELS.items():
        curves = {name: _points(records, name) for name in _written_out(names, records)}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            panels[title] = curves
    if not panels:
        raise UserError(f"{metrics_jsonl}: none of the metrics that are drawn ({', '.join(PANELS)}) is in it")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns, 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for name, points in curves.items():
            few = len(points) <= MARKED
            axes.plot(*zip(*points, strict=True), linewidth=1, marker="." if few else None, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(STEP, fontsize=8)
        axes.legend(fontsize=7)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    save_figure(figure, png)


def _points(records: list[dict], name: str) -> list[tuple[int, float]]:
    return [(record[STEP], record[name]) for record in records if isinstance(record.get(name), (int, float))]


def _written_out(names: tuple[str, ...], records: list[dict]) -> list[str]:
    """The keys of a panel, a name that ends in * as the records have it."""
    drawn = {name for panel in PANELS.values() for name in panel}
    found = [name for name in names if not name.endswith("*")]
    for start in (name[:-1] for name in names if name.endswith("*")):
        keys = dict.fromkeys(key for record in records for key in record if key.startswith(start))
        found += [key for key in keys if key not in drawn]
    return found
