"""The pairs of an SFT file as queries and candidates: each distinct side once, and who belongs to whom."""

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.dataset import PairDataset
from umer1.data.processor import content_id
from umer1.data.schema import Side
from umer1.inference.inputs import Input


@dataclass(slots=True)
class Sides:
    """The distinct queries, or the distinct positives, of a file."""

    with_response: bool  # whether sides that differ in their responses alone are two
    inputs: list[Input] = field(default_factory=list)  # what it costs and which media it names; the text is the pair's
    pairs: list[int] = field(default_factory=list)  # the first pair that has each
    contents: list[int] = field(default_factory=list)  # hash of text and media, without the response
    data_sets: list[int] = field(default_factory=list)
    _places: dict[bytes, int] = field(default_factory=dict)

    def add(self, kind: str, side: Side, pair: int, data_set: int) -> int:
        """The place of a side, which is new or not."""
        response = side.response if self.with_response else None
        words = json.dumps([side.text, side.images, side.videos, response, data_set])
        place = self._places.setdefault(hashlib.blake2b(words.encode(), digest_size=16).digest(), len(self.pairs))
        if place == len(self.pairs):
            frames = tuple(path for video in side.videos for path in video)
            text = side.text + (response or "")
            self.inputs.append(Input(f"{kind} of pair {pair}", text, side.images, frames, place + 1))
            self.pairs.append(pair)
            self.contents.append(content_id(side.text, side.images, side.videos))
            self.data_sets.append(data_set)
        return place


@dataclass(slots=True)
class Corpus:
    """N pairs of a file, M of them well-formed."""

    queries: Sides
    candidates: Sides
    pairs: np.ndarray  # int64 [M]: their places in the file
    query_of: np.ndarray  # int64 [M]: place in `queries`
    positive_of: np.ndarray  # int64 [M]: place in `candidates`
    bad: dict[int, str]  # of the others: place in the file -> cause


def read_corpus(dataset: PairDataset, mode: str, *, across_data_sets: bool) -> Corpus:
    """Every pair looked at once, media untouched.

    mode: in disc mode a side is its text and media, in gen mode its response too.
    across_data_sets: equal sides of several data sets are one; otherwise each data set has its own.
    """
    (queries, candidates), rows, bad = (Sides(mode == "gen") for _ in range(2)), [], {}
    for index in range(len(dataset)):
        try:
            pair = dataset.read(index)
        except BadSample as error:
            bad[index] = error.cause
            continue
        group = 0 if across_data_sets else int(dataset.name_ids[index])
        query = queries.add("qry", pair.query, index, group)
        rows.append((index, query, candidates.add("pos", pair.positive, index, group)))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Corpus(queries, candidates, *columns, bad)
