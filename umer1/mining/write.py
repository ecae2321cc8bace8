"""The pair file with its negatives, and the account of how they came about."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from umer1.data.dataset import PairDataset
from umer1.files import atomic_path, write_json
from umer1.mining.config import MineConfig
from umer1.mining.corpus import Corpus
from umer1.mining.select import Mined

_SETTINGS = ("mode", "num_negatives", "top_k", "skip_top", "relative_margin", "absolute_margin", "across_data_sets")


def write_mined(config: MineConfig, dataset: PairDataset, corpus: Corpus, mined: Mined, model: dict[str, str]) -> str:
    """Both files, in the input's form (a JSON list, or JSONL); the report for people.

    A negative is the record's `pos` as it stands in the file, its response included.  Records that are not pairs, or
    have no embedding, stay as they are.
    """
    is_list = dataset.is_list
    row_of = {pair: row for row, pair in enumerate(corpus.pairs.tolist())}
    with atomic_path(config.output) as aside, open(aside, "wb") as file:
        file.write(b"[\n" if is_list else b"")
        for index in range(len(dataset)):
            text = dataset.read_bytes(index).strip()
            row = row_of.get(index)
            if row is not None and (config.replace or (mined.negatives[row] >= 0).any()):
                text = _with_negatives(config, dataset, corpus, mined, row)
            last = index == len(dataset) - 1
            file.write(text + (b"\n" if last or not is_list else b",\n"))
        file.write(b"]\n" if is_list else b"")
    account = _account(config, dataset, corpus, mined)
    where = Path(f"{config.output}.mining.json")
    settings = {name: getattr(config, name) for name in _SETTINGS}
    write_json(where, {"input": Path(config.input).name, "model": model, "settings": settings, **account})
    return _report(config, account, where)


def _with_negatives(config: MineConfig, dataset: PairDataset, corpus: Corpus, mined: Mined, row: int) -> bytes:
    record = dataset.read_record(int(corpus.pairs[row]))
    kept = [] if config.replace else list(record.get("neg") or [])
    for place in mined.negatives[row]:
        if place >= 0:
            negative = dataset.read_record(corpus.candidates.pairs[place])["pos"]
            if negative not in kept:
                kept.append(negative)
    record["neg"] = kept
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _account(config: MineConfig, dataset: PairDataset, corpus: Corpus, mined: Mined) -> dict[str, Any]:
    """Counts and mean scores, by data set and in all."""
    found = (mined.negatives >= 0).sum(1)
    embedded = np.isfinite(mined.positive_scores)
    names = np.array([dataset.dataset_name(index) or "(unnamed)" for index in corpus.pairs.tolist()])
    bad = Counter((dataset.dataset_name(index) or "(unnamed)", error.cause) for index, error in corpus.bad.items())

    def of(rows: np.ndarray) -> dict[str, Any]:
        return {
            "pairs": len(rows),
            "negatives": int(found[rows].sum()),
            "pairs_with_all": int((found[rows] == config.num_negatives).sum()),
            "pairs_with_some": int(((found[rows] > 0) & (found[rows] < config.num_negatives)).sum()),
            "pairs_with_none": int((embedded[rows] & (found[rows] == 0)).sum()),
            "pairs_without_embedding": int((~embedded[rows]).sum()),
            "passed_over_as_positives": int(mined.right[rows].sum()),
            "passed_over_by_margin": int(mined.near[rows].sum()),
            "mean_positive_score": _mean(mined.positive_scores[rows]),
            "mean_negative_score": _mean(mined.scores[rows]),
        }

    sets = {name: of(np.flatnonzero(names == name)) for name in sorted(set(names.tolist()))}
    for (name, cause), count in sorted(bad.items()):
        sets.setdefault(name, {"pairs": 0}).setdefault("not_pairs", {})[cause] = count
    return {"total": {**of(np.arange(len(found))), "not_pairs": len(corpus.bad)}, "data_sets": sets}


def _mean(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)].astype(np.float64)
    return float(values.mean()) if len(values) else None


def _report(config: MineConfig, account: dict[str, Any], where: Path) -> str:
    total = account["total"]
    lines = [
        f"umer1 mine: {total['negatives']} negatives for {total['pairs']} pairs in {config.output}, "
        f"{total['pairs_with_all']} of them with all {config.num_negatives}"
    ]
    if total["mean_negative_score"] is not None:
        lines.append(
            f"  mean score of the positives {total['mean_positive_score']:.3f}, of the negatives "
            f"{total['mean_negative_score']:.3f}"
        )
    right, near = total["passed_over_as_positives"], total["passed_over_by_margin"]
    lines.append(f"  passed over: {right} positives of the same query, {near} over the margin")
    if missing := total["pairs_without_embedding"] + total["not_pairs"]:
        lines.append(f"  {missing} records stay as they are: they could not be embedded")
    root = config.data_root or Path(config.input).parent
    lines.append(f"  counts by data set: {where}; train by --data-path {config.output} --data-root {root}")
    return "\n".join(lines)
