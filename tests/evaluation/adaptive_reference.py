"""The rule of docs/adaptive.md written out by hand, with nothing of umer1 in it."""

import math

import numpy as np


def softmax(row, temperature):
    weights = [math.exp((score - max(row)) / temperature) for score in row]
    return [weight / math.fsum(weights) for weight in weights]


def adaptive_reference(disc, gen, rule):
    """The rule of docs/adaptive.md in plain Python: (scores, reasoned, temperatures, mean confidence)."""
    probes = [int(i) for i in np.random.default_rng(rule.seed).permutation(len(disc))[: rule.num_probes]]
    grid = [math.exp(-2 + step / 4) for step in range(17)]
    best = None
    for a in grid:
        for b in grid:
            value = -0.5 * (math.log(a) ** 2 + math.log(b) ** 2)
            for i in probes:
                p, q = softmax(disc[i], rule.temperature * a), softmax(gen[i], rule.temperature * b)
                value += math.log(len(p) * math.fsum(x * y for x, y in zip(p, q, strict=True)))
            if best is None or value > best[0]:
                best = (value, rule.temperature * a, rule.temperature * b)
    _, t_disc, t_gen = best
    expected = math.fsum(max(softmax(gen[i], t_gen)) for i in probes) / len(probes)
    reasoned = [i in probes or max(softmax(row, t_disc)) < expected - rule.price for i, row in enumerate(disc)]
    scores = [
        [d / t_disc + (g / t_gen if reason else 0.0) for d, g in zip(one, two, strict=True)]
        for one, two, reason in zip(disc, gen, reasoned, strict=True)
    ]
    return scores, reasoned, (t_disc, t_gen), expected
