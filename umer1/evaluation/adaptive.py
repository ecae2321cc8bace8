"""Adaptive mode: which queries are worth a reasoned answer, and one ranking where both score lists exist.

Pure functions on lists of cosine scores [Q, C] (query by candidate, each mode with candidates of its own mode); none
takes a label, so none can see one.  docs/adaptive.md has the rule, why it was chosen and what it measures.

    p(c | q) = softmax_c(score / temperature)           what a list believes; its maximum is the list's confidence
    reason  <=>  disc confidence(q) < mean gen confidence of the probes - price
    score    =  disc / t_disc + gen / t_gen  where both exist (the product of both beliefs), else disc / t_disc

A few queries of a task, the probes, reason in any case and pay for it.  Their two lists calibrate the temperatures:
both look for the same unknown candidate, so the temperatures are right where both agree as often as they say.

Where queries have pools of their own, of different sizes, lists are padded with -inf: no candidate stands there.
"""

from dataclasses import dataclass

import numpy as np

# Temperatures are searched at these multiples of the one given: up to a factor of 7.4 away, a quarter e-fold a step.
_MULTIPLES = np.exp(np.linspace(-2.0, 2.0, 17))
# Weight of the pull to the temperature given, in nats per squared log-ratio: a list that says nothing leaves the
# other's temperature undetermined, and 16 probes say more than this where there is something to learn.
_PULL = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveRule:
    """What is chosen before any query is seen."""

    price: float = 0.1  # of reasoning, in the score's unit: the gain that reasoning has to promise
    num_probes: int = 16  # queries of a task that reason in any case and calibrate the rest
    temperature: float = 0.05  # of the contrastive loss the model was trained with; the search starts here
    seed: int = 0  # of who is a probe

    def violations(self) -> list[str]:
        found = []
        if not np.isfinite(self.price):
            found.append(f"price={self.price} must be finite")
        if self.num_probes < 1:
            found.append(f"num_probes={self.num_probes} must be 1 or above")
        if not 0.0 < self.temperature < float("inf"):
            found.append(f"temperature={self.temperature} must be above 0")
        return found


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the probes say about a task."""

    disc_temperature: float
    gen_temperature: float
    gen_confidence: float  # mean over the probes: what a gen list can be expected to believe of its first candidate


@dataclass(frozen=True, slots=True)
class AdaptiveScores:
    """The ranking of adaptive mode.  Rows have scales of their own: compare scores within a query only."""

    scores: np.ndarray  # float64 [Q, C]
    reasoned: np.ndarray  # bool [Q]: the gen list was used; probes included
    calibration: Calibration


def beliefs(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Logarithms [Q, C] (float64) of softmax(scores / temperature) over the candidates, -inf where there is none.

    ValueError where `scores` [Q, C] hold no candidate or a number that is not finite: it would rank by accident.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores of shape {scores.shape} are not [queries, candidates] with a candidate at least")
    bad = np.flatnonzero((np.isnan(scores) | np.isposinf(scores)).any(axis=1) | np.isneginf(scores).all(axis=1))
    if bad.size:
        raise ValueError(f"scores of queries {bad[:8].tolist()} are not finite")
    logits = (scores - scores.max(axis=1, keepdims=True)) / temperature
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def confidence(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Probability [Q] that a list gives its own first candidate; 1 where it is the only one."""
    return np.exp(beliefs(scores, temperature).max(axis=1))


def choose_probes(num_queries: int, rule: AdaptiveRule) -> np.ndarray:
    """Ascending indices of the probes, drawn without replacement by the seed and the number of queries alone."""
    order = np.random.default_rng(rule.seed).permutation(num_queries)
    return np.sort(order[: rule.num_probes])


def agreement(disc: np.ndarray, gen: np.ndarray) -> float:
    """Log-evidence that both `beliefs` [Q, C] (logarithms) look for one candidate: sum_q log(C_q sum_c p_disc p_gen).

    C_q candidates of the query; 0 where one of the lists says nothing.  A list that is too sure loses by disagreeing,
    one that is too shy by not saying where it agrees, so its maximum over temperatures needs no label.
    """
    both = disc + gen
    top = both.max(axis=1, keepdims=True)
    together = top[:, 0] + np.log(np.exp(both - top).sum(axis=1))
    return float((together + np.log(_num_candidates(disc))).sum())


def _num_candidates(lists: np.ndarray) -> np.ndarray:
    """[Q], of scores or beliefs [Q, C]."""
    return (~np.isneginf(lists)).sum(axis=1)


def _same_pools(disc: np.ndarray, gen: np.ndarray) -> None:
    """ValueError where one list [Q, C] has a candidate that the other lacks."""
    differ = np.flatnonzero((np.isneginf(disc) != np.isneginf(gen)).any(axis=1))
    if differ.size:
        raise ValueError(f"scores of queries {differ[:8].tolist()} are not finite at the same candidates in both lists")


def calibrate(disc: np.ndarray, gen: np.ndarray, temperature: float) -> Calibration:
    """Temperatures of both modes from the score lists [m, C] of unlabelled queries that have both.

    The pair of temperatures with the highest agreement, pulled to `temperature` a little; of equal ones the nearest
    to it.  ValueError on lists of different shape, without queries or not finite.
    """
    if np.shape(disc) != np.shape(gen) or not len(disc):
        raise ValueError(
            f"disc {np.shape(disc)} and gen {np.shape(gen)} must be lists of the same queries, one or more"
        )
    _same_pools(disc, gen)
    logs = np.log(_MULTIPLES)
    near_first = np.argsort(np.abs(logs), kind="stable")
    by_disc, by_gen = ([beliefs(scores, temperature * m) for m in _MULTIPLES] for scores in (disc, gen))
    best, chosen = -np.inf, (0, 0)
    for i in near_first:
        for j in near_first:
            value = agreement(by_disc[i], by_gen[j]) - _PULL * (logs[i] ** 2 + logs[j] ** 2)
            if value > best + 1e-9:  # by more than rounding
                best, chosen = value, (i, j)
    i, j = chosen
    return Calibration(
        disc_temperature=float(temperature * _MULTIPLES[i]),
        gen_temperature=float(temperature * _MULTIPLES[j]),
        gen_confidence=float(np.exp(by_gen[j].max(axis=1)).mean()),
    )


def worth_reasoning(disc: np.ndarray, calibration: Calibration, price: float) -> np.ndarray:
    """Whether each query [Q] should reason, from its disc list [Q, C] alone.  Never where there is one candidate."""
    wanted = confidence(disc, calibration.disc_temperature) < calibration.gen_confidence - price
    return wanted & (_num_candidates(disc) > 1)


def fuse(disc: np.ndarray, gen: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Log of the product of both beliefs, up to a constant a query: float64 [Q, C] from two lists [Q, C].

    Each mode weighs by its temperature: a list whose candidates are nearly equal hardly moves the other's order.
    """
    return (
        np.asarray(disc, dtype=np.float64) / calibration.disc_temperature
        + np.asarray(gen, dtype=np.float64) / calibration.gen_temperature
    )


def calibrate_on_probes(disc: np.ndarray, gen: np.ndarray, rule: AdaptiveRule) -> Calibration:
    """`calibrate` on the probes among one task's lists [Q, C]."""
    probes = choose_probes(len(disc), rule)
    return calibrate(np.asarray(disc)[probes], np.asarray(gen)[probes], rule.temperature)


def adaptive_scores(
    disc: np.ndarray, gen: np.ndarray, rule: AdaptiveRule, calibration: Calibration | None = None
) -> AdaptiveScores:
    """The whole rule on one task's lists [Q, C]; `calibration` where another task or set of queries has given it.

    `gen` has a row for every query, so that one stored evaluation serves every rule; but rows of queries that do not
    reason are not looked at (they may hold anything, also NaN), and a decision uses the query's own disc list and
    the probes' lists.
    """
    disc, gen = (np.asarray(scores, dtype=np.float64) for scores in (disc, gen))
    if disc.shape != gen.shape:
        raise ValueError(f"disc {disc.shape} and gen {gen.shape} must be lists of the same queries and candidates")
    probed = calibration is None
    calibration = calibrate_on_probes(disc, gen, rule) if calibration is None else calibration
    reasoned = worth_reasoning(disc, calibration, rule.price)
    if probed:
        probes = choose_probes(len(disc), rule)
        reasoned[probes] = _num_candidates(disc[probes]) > 1
    scores = disc / calibration.disc_temperature
    _same_pools(disc[reasoned], gen[reasoned])
    scores[reasoned] = fuse(disc[reasoned], gen[reasoned], calibration)
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError("gen scores of queries that reason are not finite")
    return AdaptiveScores(scores, reasoned, calibration)


def mean_of_samples(samples: np.ndarray, k: int) -> np.ndarray:
    """Self-consistency: L2-normalised means of k sampled embeddings, float32 [Q, n // k, D] from [Q, n, D].

    Disjoint runs of k samples in the order they were drawn, so that every sample counts once.  ValueError where k is
    not in 1..n or samples cancel.
    """
    num_queries, num_samples, dim = samples.shape
    if not 1 <= k <= num_samples:
        raise ValueError(f"a mean of {k} needs 1 <= k <= {num_samples} samples")
    runs = num_samples // k
    means = samples[:, : runs * k].astype(np.float64).reshape(num_queries, runs, k, dim).mean(axis=2)
    norms = np.linalg.norm(means, axis=-1, keepdims=True)
    if not (norms > 1e-6).all():
        raise ValueError("the samples of a query cancel or are not finite: their mean has no direction")
    return (means / norms).astype(np.float32)
