"""Which pairs make up which global batch: a pure function of (seed, step), whatever the ranks and workers.

Each epoch visits every pair once.  Every data set is shuffled and cut into blocks of `block_size` pairs, and the blocks
of all data sets are shuffled, so that the negatives of a query come mostly from its own data set.  What is left over of
each data set stands together in short blocks, which make up the last batches of the epoch (in a shuffled place); pairs
that are missing to a whole last batch are taken from the epoch's first blocks.
"""

import hashlib
from typing import Any

import numpy as np

from umer1.errors import UserError

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 [N]: a shuffle of our own does not change with numpy's versions."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)) & _MASK
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled(count: int, *words: Any) -> np.ndarray:
    """A permutation int64 [count] that depends on `words` alone."""
    key = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    draws = mix(mix(np.arange(count, dtype=np.uint64)) ^ np.uint64(int.from_bytes(key, "big")))
    return np.argsort(draws, kind="stable")


class BlockSampler:
    """Global batches of pair indices.

    name_ids: int [N], the data set of each pair; names: what they are called.  `contents` may name the data files with
    digests of what they hold, for checkpoints to compare.
    `batch(step)` needs no state; `step` is the next step to be drawn, kept for checkpoints.
    Raises UserError when there are fewer pairs than one global batch takes.
    """

    def __init__(self, name_ids, names: tuple[str, ...], global_batch_size: int, block_size: int = 64, seed: int = 0):
        self.name_ids = np.asarray(name_ids)
        self.names = tuple(names)
        self.global_batch_size = global_batch_size
        # A batch smaller than a block comes from one data set.
        self.block_size = min(block_size, global_batch_size)
        self.seed = seed
        self.step = 0
        self.contents: list[tuple[str, str]] = []
        if len(self.name_ids) < global_batch_size:
            raise UserError(
                f"the data file has {len(self.name_ids)} pairs, fewer than --global-batch-size {global_batch_size}: "
                f"a pair would be its own negative; use at most {len(self.name_ids)}"
            )
        order = np.argsort(self.name_ids, kind="stable")
        counts = np.bincount(self.name_ids, minlength=len(self.names))
        self._members = np.split(order, np.cumsum(counts)[:-1])  # per data set its pairs, in file order
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.name_ids) // self.global_batch_size)

    def batch(self, step: int) -> np.ndarray:
        """int64 [global_batch_size]: the pairs of one step; no pair stands in it twice."""
        epoch, place = divmod(step, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][place]

    def share(self, step: int, dp_rank: int, dp_size: int, *, spread: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(slots, pairs) of one data-parallel rank: consecutive slots of the global batch, or every dp_size-th."""
        slots = np.arange(self.global_batch_size).reshape(*((-1, dp_size) if spread else (dp_size, -1)))
        slots = slots[:, dp_rank] if spread else slots[dp_rank]
        return slots, self.batch(step)[slots]

    def replacement(self, step: int, slot: int, attempt: int, index: int) -> int:
        """A pair of `index`'s data set to try in its place; the same at any layout and after a resume.

        Slots do not know of each other, so each has places of its own in one permutation of the pairs that do not
        stand in this batch: two bad slots never take the same pair while the data set has pairs enough.  A slot that
        has tried its own goes through the other slots', then through the other data sets' (a line that cannot be read
        is a data set of its own).
        """
        name, batch = int(self.name_ids[index]), self.batch(step)
        members = self._members[name]
        pool = np.setdiff1d(members, batch, assume_unique=True)
        slots = np.flatnonzero(self.name_ids[batch] == name)
        number = int(np.searchsorted(slots, slot))
        place = attempt - 1
        if place < len(pool):
            pool = pool[shuffled(len(pool), self.seed, "replacement", step, name)]
            own = np.arange(len(pool)) % len(slots) == number
            around = np.roll(np.arange(len(pool)), -number)
            return int(pool[np.concatenate([np.flatnonzero(own), around[~own[around]]])[place]])
        rest = np.setdiff1d(np.arange(len(self.name_ids)), np.concatenate([members, batch]))
        pool, place = (rest, place - len(pool)) if len(rest) else (pool if len(pool) else members, place)
        order = shuffled(len(pool), self.seed, "replacement of another set", step, slot)
        return int(pool[order[place % len(pool)]])

    def notes(self) -> list[str]:
        """What the user should know about this data and these sizes."""
        left = [(self.names[i], len(pairs) % self.block_size) for i, pairs in enumerate(self._members)]
        left = [(name or "(unnamed)", count) for name, count in left if count]
        found = []
        if left:
            shown = ", ".join(f"{name} {count}" for name, count in left[:8]) + (", ..." if len(left) > 8 else "")
            found.append(f"each epoch ends in short blocks of fewer than {self.block_size} pairs: {shown}")
        if missing := -len(self.name_ids) % self.global_batch_size:
            found.append(f"{missing} pairs are seen twice an epoch to fill its last batch")
        return found

    def _batches(self, epoch: int) -> np.ndarray:
        """int64 [batches, global_batch_size]."""
        size = self.block_size
        whole, short = [], []
        for name, members in zip(self.names, self._members, strict=True):
            order = members[shuffled(len(members), self.seed, "pairs", epoch, name)]
            cut = len(order) // size * size
            whole.append(order[:cut].reshape(-1, size))
            short.append(order[cut:])
        blocks = np.concatenate(whole)
        blocks = blocks[shuffled(len(blocks), self.seed, "blocks", epoch)]
        short = [short[i] for i in shuffled(len(short), self.seed, "short", epoch)]
        pairs = np.concatenate([blocks.reshape(-1), *short])
        # numpy.resize repeats from the front: the fill of the last batch
        batches = np.resize(pairs, (len(self), self.global_batch_size))
        return batches[shuffled(len(self), self.seed, "batches", epoch)]

    # -- checkpoint --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON: where the order stands and what it was made of."""
        return {"step": self.step, **self._identity(), "contents": [digest for _, digest in self.contents]}

    def _identity(self) -> dict[str, Any]:
        # Which data set each pair is of decides the order as much as their number does.
        places = hashlib.blake2b(self.name_ids.astype("<i4").tobytes() + repr(self.names).encode(), digest_size=8)
        return {
            "seed": self.seed,
            "data_sets": places.hexdigest(),
            "num_pairs": len(self.name_ids),
            "global_batch_size": self.global_batch_size,
            "block_size": self.block_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after `state`; UserError when data or sizes changed, as the order would silently be another."""
        changed = [
            f"{key} was {state.get(key)} and is now {value}"
            for key, value in self._identity().items()
            if state.get(key, value) != value  # an older checkpoint may lack a key
        ]
        changed += [
            f"{name} does not hold what it held"
            for (name, digest), before in zip(self.contents, state.get("contents", []), strict=False)
            if digest != before
        ]
        if changed:
            raise UserError(
                f"the checkpoint's data order cannot be continued: {'; '.join(changed)}. Restore them, or start a new "
                "run from the exported weights with another --save"
            )
        self.step = int(state["step"])
