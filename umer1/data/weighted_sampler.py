"""The order of several data files with weights: each file its share of every batch, as evenly as blocks allow.

An epoch has as many pairs as all files together.  Of its blocks, each file gets its weight's share (to the block, by
largest remainder), spread evenly over the epoch.  They come from the file's own endless stream of passes: each pass has
every pair once, in blocks of one data set; what is left over of the data sets shares blocks, and the pass's first pairs
fill the last one.  The next epoch takes up the stream where this one left it, so a file with a large weight is seen
several times an epoch, and one with a small weight is seen as a whole after several.
"""

from typing import Any

import numpy as np

from umer1.data.sampler import BlockSampler, shuffled
from umer1.errors import UserError


class WeightedBlockSampler(BlockSampler):
    """Global batches of pair indices by file weights; otherwise as BlockSampler.

    file_ids: of each of `names`, its file.  weights: of each file, positive, with the sum 1.
    Raises UserError where a file has fewer pairs than its share of one batch.
    """

    def __init__(
        self, name_ids, names: tuple[str, ...], file_ids: list[int], files: list[str], weights: list[float], *sizes: int
    ):
        super().__init__(name_ids, names, *sizes)
        self.files, self.weights = files, np.asarray(weights, dtype=np.float64)
        self._names_of = [[place for place, of in enumerate(file_ids) if of == file] for file in range(len(files))]
        self._pairs_of = [np.concatenate([self._members[place] for place in places]) for places in self._names_of]
        num_blocks = -(-len(self) * self.global_batch_size // self.block_size)
        self._blocks = _shares(self.weights, num_blocks)  # of each file, in an epoch
        places = [(np.arange(count) + 0.5) / max(count, 1) for count in self._blocks.tolist()]
        whose = np.repeat(np.arange(len(files)), self._blocks)
        self._file_of_block = whose[np.argsort(np.concatenate(places), kind="stable")]
        self._check()

    def _check(self) -> None:
        """A pair that stands in a batch twice would be its own negative: every file has to fill its share."""
        problems = []
        shape = len(self), self.global_batch_size
        of_sample = np.resize(np.repeat(self._file_of_block, self.block_size), shape)
        for file, pairs in enumerate(self._pairs_of):
            most = int((of_sample == file).sum(1).max())
            name = f"the weight {self.weights[file]:.4g} of {self.files[file]}"
            if most == 0:
                problems.append(
                    f"{name} gives it no block of {self.block_size} pairs in an epoch of {len(self)} batches"
                )
            if most > len(pairs):
                problems.append(f"{name} takes up to {most} pairs into one batch, but it has only {len(pairs)}")
        if problems:
            raise UserError("; ".join(problems) + "; change the weights, or the batch or block size")

    def notes(self) -> list[str]:
        """What the weights come to."""
        total = int(self._blocks.sum())
        parts = [
            f"{file} {blocks / total:.1%}, {blocks * self.block_size / len(pairs):.3g} times an epoch"
            for file, blocks, pairs in zip(self.files, self._blocks.tolist(), self._pairs_of, strict=True)
        ]
        return [f"an epoch is {len(self)} batches: {'; '.join(parts)}"]

    def _batches(self, epoch: int) -> np.ndarray:
        """int64 [batches, global_batch_size]."""
        blocks = np.empty((len(self._file_of_block), self.block_size), dtype=np.int64)
        for file, count in enumerate(self._blocks.tolist()):
            rows = np.flatnonzero(self._file_of_block == file)
            per_pass = -(-len(self._pairs_of[file]) // self.block_size)
            passes, places = np.divmod(epoch * count + np.arange(count), per_pass)
            for number in np.unique(passes).tolist():
                now = passes == number
                blocks[rows[now]] = self._pass(file, number)[places[now]]
        size = len(self) * self.global_batch_size
        batches = blocks.reshape(-1)[:size].reshape(len(self), self.global_batch_size)
        for place, batch in enumerate(batches):
            self._replace_twins(batch, epoch, place)
        return batches[shuffled(len(self), self.seed, "batches", epoch)]

    def _pass(self, file: int, number: int) -> np.ndarray:
        """int64 [blocks, block_size]: one pass over a file, filled up from its first blocks."""
        whole, short = [], []
        for name in self._names_of[file]:
            members = self._members[name]
            order = members[shuffled(len(members), self.seed, "pairs", number, file, self.names[name])]
            cut = len(order) // self.block_size * self.block_size
            whole.append(order[:cut])
            short.append(order[cut:])
        short = [short[place] for place in shuffled(len(short), self.seed, "short", number, file)]
        pairs = np.concatenate(whole + short)
        blocks = np.resize(pairs, (-(-len(pairs) // self.block_size), self.block_size))
        return blocks[shuffled(len(blocks), self.seed, "blocks", number, file)]

    def _replace_twins(self, batch: np.ndarray, epoch: int, place: int) -> None:
        """A pair that stands in a batch twice, where two passes meet, gives way to another of its data set or file."""
        _, first = np.unique(batch, return_index=True)
        for twin in np.setdiff1d(np.arange(len(batch)), first).tolist():
            name = int(self.name_ids[batch[twin]])
            file = next(file for file, names in enumerate(self._names_of) if name in names)
            for members in (self._members[name], self._pairs_of[file]):
                others = np.setdiff1d(members, batch)
                if len(others):
                    order = shuffled(len(others), self.seed, "twin", epoch, place, twin)
                    batch[twin] = others[order[0]]
                    break

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "weights": [round(weight, 9) for weight in self.weights.tolist()]}


def _shares(weights: np.ndarray, total: int) -> np.ndarray:
    """int64: `total` divided by weights, by largest remainder."""
    exact = weights * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
