"""The pairs of an SFT file as queries and candidates: each distinct side once, and who belongs to whom."""

from dataclasses import dataclass, field

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.dataset import PairDataset
from umer1.data.processor import content_id
from umer1.data.schema import Side
from umer1.inference.inputs import Input


@dataclass(slots=True)
class Sides:
    """The distinct queries, or the distinct positives, of a file, by their text and media."""

    inputs: list[Input] = field(default_factory=list)  # what each costs and which media it names
    pairs: list[int] = field(default_factory=list)  # the first pair that has it, whose response it is read with
    contents: list[int] = field(default_factory=list)  # hash of text and media
    groups: list[int] = field(default_factory=list)  # the data set, or 0 for all of them
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, kind: str, side: Side, pair: int, group: int, mode: str) -> int:
        """The place of a side, which is new or not."""
        content = content_id(side.text, side.images, side.videos)
        place = self._places.setdefault((group, content), len(self.pairs))
        if place == len(self.pairs):
            frames = tuple(path for video in side.videos for path in video)
            text = side.text + side.response if mode == "gen" else side.text
            self.inputs.append(Input(f"{kind} of pair {pair}", text, side.images, frames, place + 1))
            self.pairs.append(pair)
            self.contents.append(content)
            self.groups.append(group)
        return place


@dataclass(slots=True)
class Corpus:
    """N pairs of a file, M of them well-formed."""

    queries: Sides
    candidates: Sides
    pairs: np.ndarray  # int64 [M]: their places in the file
    query_of: np.ndarray  # int64 [M]: place in `queries`
    positive_of: np.ndarray  # int64 [M]: place in `candidates`
    bad: dict[int, BadSample]  # of the others: place in the file -> why


def read_corpus(dataset: PairDataset, mode: str, *, across_data_sets: bool) -> Corpus:
    """Every pair looked at once, media untouched.

    mode: disc or gen; responses are read, and so cost something, in gen alone.
    across_data_sets: equal sides of several data sets are one; otherwise each data set has its own.
    """
    queries, candidates, rows, bad = Sides(), Sides(), [], {}
    for index in range(len(dataset)):
        try:
            pair = dataset.read(index)
        except BadSample as error:
            bad[index] = error
            continue
        group = 0 if across_data_sets else int(dataset.name_ids[index])
        query = queries.add("qry", pair.query, index, group, mode)
        rows.append((index, query, candidates.add("pos", pair.positive, index, group, mode)))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Corpus(queries, candidates, *columns, bad)
