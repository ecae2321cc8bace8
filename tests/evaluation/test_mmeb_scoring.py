"""Tasks scored from vectors against independent definitions; modes, tables and the paper's numbers."""

import dataclasses
import functools
import json
import math
import os

import numpy as np
import pytest
from adaptive_reference import adaptive_reference

from umer1.evaluation.adaptive import AdaptiveRule
from umer1.evaluation.mmeb_v2.modes import score_modes
from umer1.evaluation.mmeb_v2.published import COLUMNS, PER_TASK, PUBLISHED
from umer1.evaluation.mmeb_v2.registry import GROUPS, TASKS
from umer1.evaluation.mmeb_v2.results import make_results, results_text, task_entry, write_results
from umer1.evaluation.mmeb_v2.score import score_predictions, score_task
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData
from umer1.progress import Progress

FRESH = int.from_bytes(os.urandom(4), "little")
DIM = 4


def axes_and_diagonals(rng, count: int) -> np.ndarray:
    """Unit vectors whose dot products are exact in float32 and often equal: (±1/2, ±1/2, ±1/2, ±1/2), ±axes."""
    rows = rng.choice([-0.5, 0.5], size=(count, DIM))
    single = rng.random(count) < 0.4
    rows[single] = np.eye(DIM)[rng.integers(0, DIM, single.sum())] * rng.choice([-1, 1], size=(single.sum(), 1))
    return rows.astype(np.float32)


def make_task(rng, name: str, num_queries: int = 40, num_candidates: int = 25) -> tuple[TaskData, list[str]]:
    spec = TASKS[name]
    names = [f"c{i}" for i in range(num_candidates)]
    queries = []
    for _ in range(num_queries):
        pool = tuple(rng.choice(names, size=rng.integers(1, num_candidates + 1), replace=False).tolist())
        if spec.metric == "hit@1":
            queries.append(Query(Item(""), pool, (pool[0],)))
        else:
            labels = pool[:6]
            grades = tuple(float(grade) for grade in rng.integers(1, 5, len(labels)))
            queries.append(Query(Item(""), labels, labels, True, grades))
    return TaskData(spec, queries, [Candidate(c, Item("")) for c in names], "0" * 64), names


def plain_ranking(query: np.ndarray, pool: list[str], vectors: dict[str, np.ndarray]) -> list[str]:
    scores = {name: float(query.astype(np.float64) @ vectors[name].astype(np.float64)) for name in pool}
    return sorted(pool, key=lambda name: -scores[name])  # sorted keeps equal ones in order


def plain_score(metric: str, ranked: list[str], query: Query) -> float:
    if metric == "hit@1":
        return float(ranked[0] in query.label_names)
    grade = dict(zip(query.label_names, query.rel_scores, strict=True))
    have = sum(grade.get(name, 0.0) / math.log2(rank + 2) for rank, name in enumerate(ranked[:5]))
    ideal = sorted(grade.values(), reverse=True)[:5]
    return have / sum(rel / math.log2(rank + 2) for rank, rel in enumerate(ideal))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_by_its_own_rule(name):
    rng = np.random.default_rng([FRESH, list(TASKS).index(name)])
    task, names = make_task(rng, name)
    queries, targets = axes_and_diagonals(rng, len(task.queries)), axes_and_diagonals(rng, len(names))
    score = score_task(task, queries, names, targets)
    vectors = dict(zip(names, targets, strict=True))
    wanted = []
    for vector, query, found in zip(queries, task.queries, score.predictions, strict=True):
        pool = names if task.spec.candidates == "global" else list(query.cand_names)
        ranked = plain_ranking(vector, pool, vectors)
        assert found == ranked, f"seed {FRESH}"
        wanted.append(plain_score(task.spec.metric, ranked, query))
    np.testing.assert_allclose(score.per_query[task.spec.metric], wanted, rtol=0, atol=1e-9, err_msg=f"seed {FRESH}")
    assert abs(score.summary[task.spec.metric] - sum(wanted) / len(wanted)) < 1e-9, f"seed {FRESH}"


def test_a_ranking_of_many_says_how_far_it_is_and_keeps_the_first(monkeypatch, capsys):
    monkeypatch.setattr("umer1.evaluation.mmeb_v2.score._FULL", 100)
    monkeypatch.setattr("umer1.evaluation.mmeb_v2.score._DEPTH", 10)
    monkeypatch.setattr("umer1.evaluation.topk._BLOCK", 64)
    monkeypatch.setattr("umer1.evaluation.mmeb_v2.score.Progress", functools.partial(Progress, interval=0.0))
    rng = np.random.default_rng(FRESH)
    task, names = make_task(rng, "ViDoRe_docvqa", num_queries=3, num_candidates=200)
    queries, targets = axes_and_diagonals(rng, 3), axes_and_diagonals(rng, 200)
    score = score_task(task, queries, names, targets)
    assert "ranking ViDoRe_docvqa: 64/200 candidates" in capsys.readouterr().err
    vectors = dict(zip(names, targets, strict=True))
    for vector, found in zip(queries, score.predictions, strict=True):
        assert found == plain_ranking(vector, names, vectors)[:10], f"seed {FRESH}"


def test_vectors_that_do_not_fit_are_refused():
    rng = np.random.default_rng(FRESH)
    task, names = make_task(rng, "OK-VQA")
    queries, targets = axes_and_diagonals(rng, len(task.queries)), axes_and_diagonals(rng, len(names))
    with pytest.raises(ValueError, match=r"OK-VQA, queries: rows \[0, 1"):
        score_task(task, 2 * queries, names, targets)
    broken = targets.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"OK-VQA, candidates: rows \[3\]"):
        score_task(task, queries, names, broken)
    with pytest.raises(ValueError, match="39 vectors for 40 queries"):
        score_task(task, queries[1:], names, targets)
    with pytest.raises(ValueError, match="candidates without a vector"):
        score_task(task, queries, names[1:], targets[1:])
    with pytest.raises(ValueError, match="no query"):
        score_predictions([], [])


@pytest.mark.parametrize("name", ["OK-VQA", "MSVD", "ViDoSeek-doc"])
def test_pairs_of_modes_oracle_and_adaptive(name):
    rng = np.random.default_rng(FRESH)
    task, names = make_task(rng, name)
    queries = {mode: axes_and_diagonals(rng, len(task.queries)) for mode in ("disc", "gen")}
    targets = {mode: axes_and_diagonals(rng, len(names)) for mode in ("disc", "gen")}
    found = score_modes(task, names, queries, targets, AdaptiveRule(num_probes=5))
    assert list(found.scores) == ["disc-disc", "disc-gen", "gen-disc", "gen-gen", "oracle", "adaptive"]
    for pair in ("disc-gen", "gen-disc"):
        query_mode, target_mode = pair.split("-")
        want = score_task(task, queries[query_mode], names, targets[target_mode])
        assert found.scores[pair].predictions == want.predictions, f"seed {FRESH}"
    metric = task.spec.metric
    disc, gen = (found.scores[f"{mode}-{mode}"].per_query[metric] for mode in ("disc", "gen"))
    np.testing.assert_array_equal(found.scores["oracle"].per_query[metric], np.maximum(disc, gen))
    adaptive = found.scores["adaptive"]
    for row, query in enumerate(task.queries):
        pool = set(names if task.spec.candidates == "global" else query.cand_names)
        assert set(adaptive.predictions[row]) == pool and len(adaptive.predictions[row]) == len(pool)
        if not found.adaptive.reasoned[row]:
            assert adaptive.predictions[row] == found.scores["disc-disc"].predictions[row], f"seed {FRESH}"
    only = score_modes(task, names, {"disc": queries["disc"]}, targets, AdaptiveRule())
    assert list(only.scores) == ["disc-disc", "disc-gen"] and only.adaptive is None


@pytest.mark.parametrize("name", ["MSCOCO_t2i", "OK-VQA", "ViDoRe_docvqa"])
def test_adaptive_mode_from_vectors_to_the_score(name):
    """Cosines, pools, the rule, ranking and metric, all once more in plain Python."""
    rng = np.random.default_rng([FRESH, 7])
    task, names = make_task(rng, name)
    rule = AdaptiveRule(num_probes=6, price=0.05, seed=int(rng.integers(100)))
    sides = [rng.normal(size=(2, count, 16)).astype(np.float32) for count in (len(task.queries), len(names))]
    sides = [side / np.linalg.norm(side, axis=-1, keepdims=True) for side in sides]
    queries, targets = (dict(zip(("disc", "gen"), side, strict=True)) for side in sides)
    found = score_modes(task, names, queries, targets, rule)
    pools = [names if task.spec.candidates == "global" else list(query.cand_names) for query in task.queries]
    disc, gen = (
        [
            [float(vector.astype(np.float64) @ targets[mode][names.index(name)].astype(np.float64)) for name in pool]
            for vector, pool in zip(queries[mode], pools, strict=True)
        ]
        for mode in ("disc", "gen")
    )
    scores, reasoned, _, _ = adaptive_reference(disc, gen, rule)
    reasoned = [reason and len(pool) > 1 for reason, pool in zip(reasoned, pools, strict=True)]
    assert found.adaptive.reasoned.tolist() == reasoned, f"seed {FRESH}"
    wanted = []
    for query, pool, row, ranked in zip(task.queries, pools, scores, found.scores["adaptive"].predictions, strict=True):
        assert ranked == [pool[i] for i in sorted(range(len(pool)), key=lambda i, row=row: -row[i])], f"seed {FRESH}"
        wanted.append(plain_score(task.spec.metric, ranked, query))
    assert abs(found.scores["adaptive"].summary[task.spec.metric] - sum(wanted) / len(wanted)) < 1e-9, f"seed {FRESH}"
    for price in (0.0, 0.5):  # at other prices the same calibration, and the probes reason in any case
        point, other = found.curve[str(price)], dataclasses.replace(rule, price=price)
        again = score_modes(task, names, queries, targets, other)
        assert point["reasoned"] == again.adaptive.reasoned.mean(), f"seed {FRESH}"
        assert abs(point["score"] - again.scores["adaptive"].summary[task.spec.metric]) < 1e-9, f"seed {FRESH}"


def test_published_numbers_agree_with_each_other():
    """Columns of the main table are means of the per-task scores; V-QA's last digit differs in the paper itself."""
    assert list(PER_TASK) == list(TASKS)
    for column, groups in COLUMNS.items():
        scores = [PER_TASK[name] for group in groups for name in GROUPS[group]]
        assert abs(np.mean(scores) - PUBLISHED["UME-R1-2B"][column]) < (0.3 if column == "V-QA" else 0.06), column


def test_results_have_plain_means_and_say_what_is_missing(tmp_path):
    rng = np.random.default_rng(FRESH)
    entries = {}
    for name in TASKS:
        task, names = make_task(rng, name, num_queries=6, num_candidates=5)
        vectors = axes_and_diagonals(rng, 6), names, axes_and_diagonals(rng, 5)
        entries[name] = task_entry(task.spec, score_task(task, *vectors), fingerprint=task.fingerprint)
    whole = make_results(entries, scoring="gen-gen", about={"model": "m", "notes": ["pages were corrected"]})
    for column, groups in COLUMNS.items():
        mean = np.mean([entries[name]["score"] for group in groups for name in GROUPS[group]])
        assert abs(whole["columns"][column]["score"] - mean) < 1e-12
        gap = whole["difference"]["UME-R1-7B"][column]
        assert abs(gap - (100 * mean - PUBLISHED["UME-R1-7B"][column])) < 1e-9
    del entries["MSVD"]
    part = make_results(entries, scoring="oracle", about={"model": "m"})
    assert part["columns"]["V-RET"] == {"score": None, "tasks": 4, "of": 5} and part["columns"]["Image"]["score"]
    assert list(part["published"]) == ["Oracle-2B", "Oracle-7B"]
    assert "All" not in part["difference"]["Oracle-2B"]
    write_results(part, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == part
    text = (tmp_path / "results.txt").read_text()
    assert text == results_text(part) + "\n"
    assert "4 of 5" in text and "17 of 18" in text and "77 of 78" in text
    assert "note: pages were corrected" in results_text(whole)
