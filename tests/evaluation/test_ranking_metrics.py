"""The metrics against definitions written out query by query, in plain Python."""

import math
import os

import numpy as np

from umer1.evaluation.ranking_metrics import KS, ranked_relevance, ranking_metrics

FRESH = int.from_bytes(os.urandom(4), "little")


def one_query(ranked: list[str], grade: dict[str, float], k: int) -> dict[str, float]:
    top = ranked[:k]
    right = sum(1 for label in grade if label in top)
    precision = right / k
    recall = right / len(grade) if grade else 1.0
    precisions, seen, reciprocal = [], 0, 0.0
    for rank, name in enumerate(top, 1):
        if name in grade:
            seen += 1
            precisions.append(seen / rank)
            reciprocal = reciprocal or 1.0 / rank
    found = {
        "hit": float(right > 0),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "map": sum(precisions) / min(len(grade), k) if precisions else 0.0,
        "mrr": reciprocal,
    }
    for form, gain in {"linear": lambda r: r, "exponential": lambda r: 2.0**r - 1}.items():
        have = sum(gain(grade.get(name, 0.0)) / math.log2(rank + 1) for rank, name in enumerate(top, 1))
        ideal = sorted(grade.values(), reverse=True)[:k]
        best = sum(gain(rel) / math.log2(rank + 1) for rank, rel in enumerate(ideal, 1))
        found[f"ndcg_{form}"] = have / best if best > 0 else 0.0
    return found


def test_against_plain_definitions():
    rng = np.random.default_rng(FRESH)
    rankings, grades = [], []
    for _ in range(400):
        names = [f"n{i}" for i in range(rng.integers(1, 25))]
        ranked = rng.permutation(names).tolist()
        if rng.random() < 0.2:  # options of a question may repeat
            ranked.insert(int(rng.integers(len(ranked) + 1)), str(rng.choice(ranked)))
        labels = rng.choice([*names, "not ranked"], size=rng.integers(0, min(len(names), 14) + 1), replace=False)
        grades.append({str(label): float(rng.choice([0, 1, 1, 2, 3, 0.5])) for label in labels})
        rankings.append(ranked)
    found = ranking_metrics(ranked_relevance(rankings, grades))
    order = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
    assert list(found) == [f"{name}@{k}" for name in order for k in KS]
    for k in KS:
        want = [one_query(ranked, grade, k) for ranked, grade in zip(rankings, grades, strict=True)]
        for name in order:
            values = [entry[name] for entry in want]
            np.testing.assert_allclose(found[f"{name}@{k}"], values, rtol=0, atol=1e-12, err_msg=f"{name}, {FRESH}")


def test_by_hand():
    found = ranking_metrics(ranked_relevance([["a", "b", "c"]], [{"c": 2.0, "b": 1.0, "z": 1.0}]))
    assert found["hit@1"][0] == 0 and found["mrr@5"][0] == 0.5
    assert found["precision@5"][0] == 0.4 and abs(found["recall@5"][0] - 2 / 3) < 1e-12
    assert abs(found["map@5"][0] - (1 / 2 + 2 / 3) / 3) < 1e-12
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert abs(found["ndcg_linear@5"][0] - (1 / math.log2(3) + 2 / 2) / ideal) < 1e-12
