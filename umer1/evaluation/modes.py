"""From embeddings and responses of one task to its scores: disc, gen, oracle, adaptive, pass@k, what the thoughts do.

Pure numpy and text.  A right candidate is one index per query; the score of a query is the task's metric (`hit@1`, or
`ndcg@5` for documents).  A query is compared with candidates of its own mode (disc with disc, gen with gen).
"""

import re
from dataclasses import asdict, dataclass, field

import numpy as np

from umer1.evaluation.adaptive import (
    AdaptiveRule,
    AdaptiveScores,
    adaptive_scores,
    choose_probes,
    fuse,
    mean_of_samples,
    worth_reasoning,
)
from umer1.evaluation.retrieval import (
    estimate,
    hit_at_k,
    label_ranks,
    mean_of_estimates,
    ndcg_at_k,
    pass_at_k,
    similarity,
)

METRICS = ("hit@1", "ndcg@5")
MODES = ("disc", "gen", "oracle", "adaptive")
PASS_AT = (1, 2, 4, 8, 16, 32, 64, 128)  # also how many samples self-consistency takes the mean of
# Prices at which the curve is drawn: from everybody reasons (no confidence differs by more than 1) to the probes alone.
CURVE_PRICES = (-1.0, -0.2, -0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
_THOUGHTS = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)


@dataclass(slots=True)
class ModeEmbeddings:
    """Queries [Q, D] and candidates [C, D] in one mode; float32, L2-normalised."""

    queries: np.ndarray
    candidates: np.ndarray


@dataclass(slots=True)
class GenOutputs:
    """What gen mode made of one task: n samples a query beside the greedy response."""

    embeddings: ModeEmbeddings
    empty_thoughts: np.ndarray  # [Q, D]: embedding re-read without reasoning
    shuffled_thoughts: np.ndarray  # [Q, D]: embedding re-read with another query's reasoning
    samples: np.ndarray  # [Q, n, D]: embeddings of the sampled responses
    texts: list[str]  # [Q]: greedy responses
    sample_texts: list[list[str]]  # [Q][n]
    lengths: np.ndarray  # int64 [Q]: tokens of the greedy response
    well_formed: np.ndarray  # bool [Q]: the greedy response has the paper's format
    missing: np.ndarray  # bool [Q]: the greedy response had no <gen_emb> of its own
    seconds_per_query: float


@dataclass(slots=True)
class AdaptiveTiming:
    """One pass in adaptive mode, by the clock: prefill for all queries, a response for those that reason."""

    reasoned: np.ndarray  # bool [Q]
    seconds_per_query: float


@dataclass(slots=True)
class TaskOutputs:
    """What the model made of one task of Q queries and C candidates."""

    metric: str  # one of METRICS
    labels: np.ndarray  # int64 [Q]: index of the right candidate
    disc: ModeEmbeddings
    disc_seconds_per_query: float
    gen: GenOutputs | None = None  # None where only disc was run
    timing: AdaptiveTiming | None = None  # None where adaptive mode was not timed
    groups: dict[str, list[str]] = field(default_factory=dict)  # split -> each query's group, "" for none


def score_queries(metric: str, embeddings: ModeEmbeddings, labels: np.ndarray) -> np.ndarray:
    """The metric per query [Q]."""
    return score_lists(metric, similarity(embeddings.queries, embeddings.candidates), labels)


def score_lists(metric: str, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The metric per query [Q] of score lists [Q, C]."""
    if metric == "hit@1":
        return hit_at_k(label_ranks(scores, labels), 1)
    if metric == "ndcg@5":
        return ndcg_at_k(scores, np.eye(scores.shape[1])[labels], 5)
    raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")


def thought_similarity(samples: np.ndarray, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine between the embeddings of different thoughts of one input, and the share of different pairs.

    `samples` [Q, n, D].  Pairs with the same text are left out of the cosine, as they are 1 by construction; a query
    whose samples all agree has no cosine.  Returns (cosine [queries that have one], share [Q]).
    """
    first, second = np.triu_indices(samples.shape[1], k=1)
    cosines: list[float] = []
    shares: list[float] = []
    if first.size == 0:
        return np.array(cosines), np.array(shares)
    for rows, names in zip(samples.astype(np.float64), texts, strict=True):
        differ = np.array([names[i] != names[j] for i, j in zip(first, second, strict=True)], dtype=bool)
        shares.append(differ.mean())
        if differ.any():
            cosines.append((rows @ rows.T)[first, second][differ].mean())
    return np.array(cosines), np.array(shares)


def replace_thoughts(response: str, reasoning: str) -> str:
    """`response` with its own summary and `<gen_emb>` but another `reasoning`; as it stands if it has no thoughts."""
    match = _THOUGHTS.search(response)
    return f"<think>{reasoning}</think>{match.group(2)}" if match else response


def reasoning_of(response: str) -> str:
    """What stands inside `<think></think>`; empty where the response has none."""
    match = _THOUGHTS.search(response)
    return match.group(1) if match else ""


def derangement(size: int, seed: int) -> np.ndarray:
    """For each of `size` queries another one (itself only where size is 1), seeded."""
    order = np.random.default_rng(seed).permutation(size)
    other = np.empty(size, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return other


def score_task(task: TaskOutputs, rule: AdaptiveRule | None = None) -> dict:
    """The task's section of results.json; every score is an estimate with its standard error and count.

    `score` (the task's metric) and `hit@1` hold disc, gen, oracle (per query the better of the two), adaptive under
    `rule` (its defaults if None), fused (both lists of every query) and gen with empty and with shuffled thoughts of
    the query, the candidates keeping their own; `splits` holds the modes by group; `adaptive` says what the rule did
    and `curve` what it would do at other prices; `self_consistency` scores means of k samples; `queries` has lists in
    the task's order: hit@1 in the modes, so that two models can be compared query by query, whether adaptive mode
    reasoned, and the greedy response.
    """
    rule = AdaptiveRule() if rule is None else rule
    modes = {"disc": task.disc}
    edited = {}
    if task.gen is not None:
        candidates = task.gen.embeddings.candidates
        modes["gen"] = task.gen.embeddings
        edited["empty_thoughts"] = ModeEmbeddings(task.gen.empty_thoughts, candidates)
        edited["shuffled_thoughts"] = ModeEmbeddings(task.gen.shuffled_thoughts, candidates)
        disc, gen = (similarity(mode.queries, mode.candidates) for mode in (task.disc, task.gen.embeddings))
        chosen = adaptive_scores(disc, gen, rule)
        lists = {"adaptive": chosen.scores, "fused": fuse(disc, gen, chosen.calibration)}
    per_query = {}
    for metric in dict.fromkeys((task.metric, "hit@1")):
        found = {name: score_queries(metric, embeddings, task.labels) for name, embeddings in modes.items()}
        if "gen" in found:
            found["oracle"] = np.maximum(found["disc"], found["gen"])
            found |= {name: score_lists(metric, scores, task.labels) for name, scores in lists.items()}
        found |= {name: score_queries(metric, embeddings, task.labels) for name, embeddings in edited.items()}
        per_query[metric] = found
    result = {
        "metric": task.metric,
        "num_queries": len(task.labels),
        "num_candidates": len(task.disc.candidates),
        "score": {name: estimate(values) for name, values in per_query[task.metric].items()},
        "hit@1": {name: estimate(values) for name, values in per_query["hit@1"].items()},
        "splits": {
            split: _by_group(names, {name: per_query[task.metric][name] for name in MODES if name in found})
            for split, names in task.groups.items()
        },
        "queries": {name: per_query["hit@1"][name].tolist() for name in MODES if name in found},
        "seconds_per_query": {"disc": task.disc_seconds_per_query},
    }
    if task.gen is not None:
        result["seconds_per_query"]["gen"] = task.gen.seconds_per_query
        # time belongs to the queries that reasoned when it was taken
        if task.timing is not None and (task.timing.reasoned == chosen.reasoned).all():
            result["seconds_per_query"]["adaptive"] = task.timing.seconds_per_query
        result["adaptive"] = {
            "rule": asdict(rule),
            "calibration": asdict(chosen.calibration),
            "reasoned": estimate(chosen.reasoned),
            "oracle_reasoned": estimate(per_query[task.metric]["gen"] > per_query[task.metric]["disc"]),
            "new_tokens": estimate(chosen.reasoned * task.gen.lengths),
        }
        result["curve"] = _curve(task, disc, gen, chosen, rule)
        result["self_consistency"] = _self_consistency(task)
        result["queries"]["reasoned"] = chosen.reasoned.astype(int).tolist()
        result["pass@k"] = _pass_at_k(task.gen, task.labels)
        result["responses"] = _responses(task.gen)
        result["queries"]["response"] = task.gen.texts
    return result


def _curve(
    task: TaskOutputs, disc: np.ndarray, gen: np.ndarray, chosen: AdaptiveScores, rule: AdaptiveRule
) -> dict[str, dict]:
    """By price: share that reasoned, new tokens a query, the score, and the score if gen's list were used unfused."""
    fused = fuse(disc, gen, chosen.calibration)
    probes = np.isin(np.arange(len(disc)), choose_probes(len(disc), rule))
    points = {}
    for price in CURVE_PRICES:
        reasoned = worth_reasoning(disc, chosen.calibration, price) | probes
        lists = {"score": np.where(reasoned[:, None], fused, disc), "unfused": np.where(reasoned[:, None], gen, disc)}
        points[str(price)] = {
            "reasoned": float(reasoned.mean()),
            "new_tokens": float((reasoned * task.gen.lengths).mean()),
            **{name: estimate(score_lists(task.metric, scores, task.labels)) for name, scores in lists.items()},
        }
    return points


def _self_consistency(task: TaskOutputs) -> dict[str, dict]:
    """By k: the task's metric of the mean of k sampled embeddings, averaged over the runs of k samples of a query."""
    found = {}
    for k in PASS_AT:
        if k <= task.gen.samples.shape[1]:
            means = mean_of_samples(task.gen.samples, k)
            rows = ModeEmbeddings(means.reshape(-1, means.shape[-1]), task.gen.embeddings.candidates)
            values = score_queries(task.metric, rows, np.repeat(task.labels, means.shape[1]))
            found[str(k)] = estimate(values.reshape(means.shape[:2]).mean(axis=1))
    return found


def _by_group(names: list[str], per_query: dict[str, np.ndarray]) -> dict[str, dict]:
    groups = np.array(names)
    return {
        str(group): {mode: estimate(values[groups == group]) for mode, values in per_query.items()}
        for group in sorted(set(names) - {""})
    }


def _pass_at_k(gen: GenOutputs, labels: np.ndarray) -> dict[str, dict]:
    num_queries, num_samples, dim = gen.samples.shape
    rows = ModeEmbeddings(gen.samples.reshape(-1, dim), gen.embeddings.candidates)
    hits = score_queries("hit@1", rows, np.repeat(labels, num_samples)).reshape(num_queries, num_samples)
    correct = hits.sum(axis=1).astype(np.int64)
    return {str(k): estimate(pass_at_k(num_samples, correct, k)) for k in PASS_AT if k <= num_samples}


def _responses(gen: GenOutputs) -> dict[str, dict]:
    cosines, shares = thought_similarity(gen.samples, gen.sample_texts)
    measured = {
        "response_length": gen.lengths,
        "format_rate": gen.well_formed,
        "missing_gen_emb": gen.missing,
        "thought_cosine": cosines,
        "distinct_thoughts": shares,
    }
    return {name: estimate(values) for name, values in measured.items() if len(values)}


def mean_over_tasks(tasks: dict[str, dict]) -> dict:
    """The plain mean over tasks of each number; a number that some tasks lack is the mean over those that have it."""

    def merge(parts: list) -> dict | float:
        if all(isinstance(part, (int, float)) for part in parts):
            return sum(parts) / len(parts)
        if set(parts[0]) == {"value", "stderr", "n"}:
            return mean_of_estimates(parts)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: merge([part[name] for part in parts if name in part]) for name in names}

    sections = ("score", "hit@1", "adaptive", "curve", "self_consistency")
    sections += ("pass@k", "responses", "splits", "seconds_per_query")
    kept = [{name: task[name] for name in sections if name in task} for task in tasks.values()]
    mean = merge(kept)
    if "adaptive" in mean:
        mean["adaptive"]["gap_recovered"] = gap_recovered(mean["score"])
    return mean


def gap_recovered(score: dict[str, dict]) -> float | None:
    """The part of the oracle's lead over gen that adaptive mode has; None where the oracle leads by nothing.

    Above 1 where both lists together find what neither finds alone; below 0 where adaptive mode is worse than gen.
    """
    gen, oracle, adaptive = (score[mode]["value"] for mode in ("gen", "oracle", "adaptive"))
    return (adaptive - gen) / (oracle - gen) if oracle > gen else None
