"""A pair on its way from a pair file to a training file."""

import hashlib
from dataclasses import dataclass

from umer1.data.prompts import IMAGE_MARKER, VIDEO_MARKER, user_text
from umer1.data.schema import Side

SIDES = ("qry", "pos")


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair; its sides hold the task's text without markers, and no response."""

    id: str  # place of the input and of the row in it, the same in every run
    dataset: str
    modality: str  # image, video or document
    query: Side
    positive: Side

    def sides(self) -> tuple[tuple[str, Side], ...]:
        return tuple(zip(SIDES, (self.query, self.positive), strict=True))

    def content(self) -> str:
        """Equal for pairs of equal texts and media."""
        return pair_key(self.query, self.positive)


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that is no usable pair."""

    id: str
    dataset: str
    cause: str
    detail: str


def pair_key(query: Side, positive: Side) -> str:
    return side_key(query) + side_key(positive)


def side_key(side: Side, owner: str = "") -> str:
    """128 bits, hexadecimal, of a side's text and media paths; `owner` keeps equal sides of different pairs apart."""
    words = [owner, side.text, "images", *side.images]
    for frames in side.videos:
        words += ["video", *frames]
    # the length before each word keeps ("ab", "c") and ("a", "bc") apart
    joined = "".join(f"{len(word)}:{word}" for word in words).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).hexdigest()


def human_turn(side: Side) -> str:
    """The user's turn of an SFT file: markers first, no line break behind them, then task, `<disc_emb>` and suffix."""
    return IMAGE_MARKER * len(side.images) + VIDEO_MARKER * len(side.videos) + user_text(side.text)
