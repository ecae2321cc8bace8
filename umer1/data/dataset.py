"""Data files, and SFT's form of them (docs/method.md, 6): an index made once, records read and checked one at a time.

A JSONL file is indexed by byte offsets and never held in memory; a JSON list is streamed through once for the same
kind of index.  A file that is not one of the two is a UserError that says where; a record that is wrong is a BadSample
when its turn comes.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from umer1.data.bad_samples import BadSample
from umer1.data.fields import check_keys, image_paths, kind_of, video_paths
from umer1.data.index_cache import content_digest, open_index
from umer1.data.indexing import MAX_RECORD_BYTES, NAME_KEYS, FileIndex
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.data.schema import EncodedPair, Pair, Side

_HUMAN, _GPT = "human", "gpt"
_PAIR_KEYS = ("dataset_name", "qry", "pos", "neg")
_SIDE_KEYS = ("image", "video", "conversations")


class RecordFile:
    """Records of one data file; `self[index]` is a subclass's matter.

    data_root: the folder that media paths start at; the data file's own folder when None.
    name_keys: where a record says its data set, the first that does.
    Raises UserError when the file is missing, empty, or neither a JSON list nor JSONL.
    """

    name_keys: tuple[str, ...] = NAME_KEYS

    def __init__(
        self,
        path: str | Path,
        data_root: str | Path | None,
        processor: Processor | None = None,
        *,
        max_source_pixels: int | None = None,
    ):
        self.path = Path(path)
        self.processor = processor
        bounds = {} if max_source_pixels is None else {"max_source_pixels": max_source_pixels}
        self.media = MediaRoot(self.path.parent if data_root is None else data_root, **bounds)
        self._index: FileIndex = open_index(self.path, self.name_keys)
        self._fd: tuple[int, int] | None = None  # (process, descriptor): workers open their own

    def __len__(self) -> int:
        return len(self._index.starts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the data sets, in order of first appearance."""
        return self._index.names

    @property
    def name_ids(self) -> np.ndarray:
        """int32 [N]: for each pair, which of `names` it belongs to."""
        return self._index.name_ids

    def dataset_name(self, index: int) -> str:
        return self._index.names[self._index.name_ids[index]]

    @property
    def contents(self) -> list[tuple[str, str]]:
        """The file and a digest of what it holds, for checkpoints to compare."""
        return [(str(self.path), content_digest(self.path, self._index))]

    @property
    def is_list(self) -> bool:
        """Whether the file is a JSON list; else it is JSONL."""
        return b"[" in os.pread(self._descriptor(), int(self._index.starts[0]), 0)

    def read_record(self, index: int) -> Any:
        """The JSON value of a record; BadSample("bad_record") when it is none."""
        length = int(self._index.lengths[index])
        if length > MAX_RECORD_BYTES:
            raise BadSample("bad_record", f"the record has {length} bytes, more than {MAX_RECORD_BYTES}")
        try:
            return json.loads(self.read_bytes(index))
        except RecursionError:
            raise BadSample("bad_record", "the record is nested too deeply") from None
        except ValueError as error:
            raise BadSample("bad_record", f"the record is not JSON: {error}") from None

    def read_bytes(self, index: int) -> bytes:
        """A record as it stands in the file."""
        return os.pread(self._descriptor(), int(self._index.lengths[index]), int(self._index.starts[index]))

    def _descriptor(self) -> int:
        if self._fd is None or self._fd[0] != os.getpid():
            self._fd = (os.getpid(), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return self._fd[1]

    def close(self) -> None:
        if self._fd is not None and self._fd[0] == os.getpid():
            os.close(self._fd[1])
        self._fd = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fd": None}


class PairDataset(RecordFile):
    """Pairs of an SFT file; media are opened when a pair is asked for."""

    def read(self, index: int) -> Pair:
        """The record as it is in the file, checked in form; BadSample("bad_record") when it is not well-formed."""
        return parse_pair(self.read_record(index), index)

    def __getitem__(self, index: int) -> EncodedPair:
        """Both sides (and hard negatives) tokenised; raises BadSample."""
        pair = self.read(index)
        return EncodedPair(
            query=self._encode("qry", pair.query),
            positive=self._encode("pos", pair.positive),
            negatives=tuple(self._encode("neg", side) for side in pair.negatives),
            dataset=pair.dataset,
            index=index,
        )

    def _encode(self, name: str, side: Side):
        try:
            return self.processor.encode_side(side, self.media)
        except BadSample as error:
            raise BadSample(error.cause, f"{name}: {error.detail}") from None


def parse_pair(record: Any, index: int = -1) -> Pair:
    """One record of an SFT file; BadSample("bad_record") says what has the wrong form."""
    if not isinstance(record, dict):
        raise BadSample("bad_record", f"a record must be an object, not {kind_of(record)}")
    if "qry" not in record and "qry_text" in record:
        raise BadSample("bad_record", "this is a pair of an RL file; SFT takes SFT files (qry, pos)")
    check_keys("", record, _PAIR_KEYS)
    name = record.get("dataset_name") or ""
    if not isinstance(name, str):
        raise BadSample("bad_record", f"dataset_name must be a string, not {kind_of(name)}")
    negatives = record.get("neg")
    if negatives is None:
        negatives = []
    if not isinstance(negatives, list):
        raise BadSample("bad_record", f"neg must be a list of sides, not {kind_of(negatives)}")
    return Pair(
        dataset=name,
        query=_parse_side("qry", record.get("qry")),
        positive=_parse_side("pos", record.get("pos")),
        negatives=tuple(_parse_side(f"neg[{place}]", side) for place, side in enumerate(negatives)),
        index=index,
    )


def _parse_side(name: str, side: Any) -> Side:
    if not isinstance(side, dict):
        raise BadSample("bad_record", f"{name} must be an object, not {kind_of(side)}")
    check_keys(name, side, _SIDE_KEYS)
    turns = side.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("bad_record", f"{name}.conversations must be a list of turns")
    if [turn.get("from") for turn in turns] != [_HUMAN, _GPT]:
        raise BadSample("bad_record", f"{name}.conversations must be one turn from human and one from gpt")
    human, gpt = (turn.get("value") for turn in turns)
    if not isinstance(human, str) or not isinstance(gpt, str):
        raise BadSample("bad_record", f"{name}.conversations: value must be a string")
    return Side(
        text=human,
        images=image_paths(f"{name}.image", side.get("image")),
        videos=video_paths(f"{name}.video", side.get("video")),
        response=gpt,
    )
