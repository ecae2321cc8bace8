"""Who computes what: pairs over data-parallel ranks and micro-batches, so that all have about equal modelled cost.

Pure functions of the costs: every rank gets the same answer from the same numbers.  What a step is made of does not
depend on them, for the losses compare all pairs of the global batch wherever each of them is computed.
"""

from collections.abc import Callable

import numpy as np

TOLERANCE = 0.01  # of the mean load: moving a pair for less than that costs more than it gains
_RESOLUTION = 1e-9  # of the mean load: what differs by less is equal


def imbalance(loads: np.ndarray) -> float:
    """Largest over mean load; 1 where all are equal (or nothing is to be done)."""
    mean = float(np.mean(loads))
    return float(np.max(loads)) / mean if mean > 0 else 1.0


def rank_loads(costs: np.ndarray, owners: np.ndarray, num_ranks: int) -> np.ndarray:
    """fp64 [num_ranks]: the cost of what each rank has."""
    return np.bincount(owners, weights=costs, minlength=num_ranks)


def assign(costs: np.ndarray, owners: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [N]: new owners by which the largest load is smaller, each rank keeping its number of pairs.

    costs: fp64 [N], not negative.  owners: int64 [N], the rank that has read each pair.  Only exchanges of two pairs,
    of the heaviest rank and of the lightest one that helps it, so that few pairs move; the largest load never grows.
    Ends when it is within TOLERANCE of the mean, or no exchange makes it smaller.
    """
    owners = np.array(owners, dtype=np.int64)
    loads = rank_loads(costs, owners, num_ranks)
    mean = loads.mean()
    while True:
        heaviest = int(loads.argmax())
        if loads[heaviest] <= (1 + TOLERANCE) * mean:
            return owners
        for other in np.argsort(loads, kind="stable").tolist():
            gap = loads[heaviest] - loads[other]
            if gap <= 2 * _RESOLUTION * mean:
                return owners
            swap = _best_swap(costs, np.flatnonzero(owners == heaviest), np.flatnonzero(owners == other), gap)
            moved = costs[swap[0]] - costs[swap[1]]
            if min(moved, gap - moved) > _RESOLUTION * mean:
                break
        owners[swap[0]], owners[swap[1]] = other, heaviest
        for rank in (heaviest, other):  # summed anew: no error adds up
            loads[rank] = costs[owners == rank].sum()


def _best_swap(costs: np.ndarray, ours: np.ndarray, theirs: np.ndarray, gap: float) -> tuple[int, int]:
    """The pairs of two ranks whose exchange brings the ranks' loads, `gap` apart, closest together."""
    differences = costs[ours][:, None] - costs[theirs][None]
    place = np.abs(differences - gap / 2).argmin()
    return int(ours[place // len(theirs)]), int(theirs[place % len(theirs)])


def spread(costs: list[float], num_bins: int, fit: Callable[[list[int]], bool]) -> list[list[int]] | None:
    """Places of the items in each bin, about equal in cost; None where one fits nowhere.

    The costliest first, each into the bin with the least of those that can take it; then exchanges, as `assign` makes
    them, where all bins can take those.  fit(places): whether a bin can hold them; one item always fits.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0.0] * num_bins
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        able = [number for number, places in enumerate(bins) if fit([*places, place])]
        if not able:
            return None
        least = min(able, key=lambda number: (loads[number], len(bins[number])))
        bins[least].append(place)
        loads[least] += costs[place]
    owners = np.empty(len(costs), dtype=np.int64)
    for number, places in enumerate(bins):
        owners[places] = number
    owners = assign(np.array(costs), owners, num_bins)
    exchanged = [np.flatnonzero(owners == number).tolist() for number in range(num_bins)]
    return sorted(exchanged if all(map(fit, exchanged)) else map(sorted, bins))
