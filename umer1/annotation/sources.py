"""Pair files to samples: one reader for JSON, JSONL and parquet, one rule for each published layout.

Layouts (columns, as published):
    mmeb                qry, qry_image_path, pos_text, pos_image_path            (MMEB-train, VLM2Vec)
    llavahound-caption  video, conversations [human, gpt]: video and question -> answer
    llavahound-video    the same file: answer (a caption) -> video
    vidore              query, image, answer: page and question -> answer        (ColPali's training set)
    vidore-page         query, image: question -> page
    visrag              query, image: question -> page                           (VisRAG-Ret-Train)

An `image` column holds a path, or {bytes, path} as parquet files of `datasets` do.  A video is a folder of frames or a
video file.
Every pass over the inputs gives the same samples in the same order.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from umer1.annotation.config import InputFile, is_parquet
from umer1.annotation.media import Library
from umer1.annotation.samples import Broken, Sample
from umer1.data.bad_samples import BadSample
from umer1.data.dataset import RecordFile
from umer1.data.prompts import task_text
from umer1.data.schema import Side
from umer1.errors import UserError

_ROWS_AT_ONCE = 64  # parquet rows may hold pictures
_MMEB_MARKER = re.compile(r"<\|image_\d+\|>[ \t]*\n?")

# Words before the text of a query and of a positive, where the file has none of its own.
_TEXTS = {
    "llavahound-video": ("Find a video that shows the following:", "Represent the given video."),
    "vidore-page": ("Find a document page that answers the following:", "Represent the given document page."),
    "visrag": ("Find a document page that answers the following:", "Represent the given document page."),
}


def read_samples(inputs: list[InputFile], library: Library) -> Iterator[Sample | Broken]:
    """All pairs of all inputs; a row that is none is a Broken with its cause."""
    for place, item in enumerate(inputs):
        for number, (file, row) in enumerate(_rows(item, library)):
            if item.limit is not None and number >= item.limit:
                break
            name, identity = item.dataset or file.stem, f"{place}:{number}"
            try:
                if isinstance(row, BadSample):
                    raise row
                query, positive = _LAYOUTS[item.layout](_Row(row, item, library))
            except BadSample as error:
                yield Broken(identity, name, error.cause, error.detail)
            else:
                yield Sample(identity, name, item.kind(), query, positive)


def _rows(item: InputFile, library: Library) -> Iterator[tuple[Path, dict | BadSample]]:
    for file in item.files():
        rows = _parquet_rows(file) if is_parquet(file) else _json_rows(file, library)
        for row in rows:
            yield file, row


def _json_rows(file: Path, library: Library) -> Iterator[dict | BadSample]:
    records = RecordFile(file, library.media.root)
    for index in range(len(records)):
        try:
            row = records.read_record(index)
            yield row if isinstance(row, dict) else BadSample("bad_record", "a pair must be an object")
        except BadSample as error:
            yield error
    records.close()


def _parquet_rows(file: Path) -> Iterator[dict]:
    import pyarrow.parquet  # an optional package; the configuration has asked for it

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no whole parquet file: {error}") from None


class _Row:
    """One row of a file, its columns read with clear errors."""

    def __init__(self, values: dict[str, Any], item: InputFile, library: Library):
        self.values, self.item, self.library = values, item, library

    def text(self, *columns: str) -> str:
        """The first column that the row has, as text; "" where it is null."""
        column = next((name for name in columns if name in self.values), None)
        if column is None:
            raise BadSample("bad_record", f"the row has no {' or '.join(columns)}")
        value = self.values[column]
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str | None):
            raise BadSample("bad_record", f"{column} must be a string")
        return _clean(value or "")

    def images(self, column: str) -> tuple[str, ...]:
        """Paths below the data root of a column's picture or pictures; none where it is null or empty."""
        value = self.values.get(column)
        several = value if isinstance(value, list) else [value]
        return tuple(self.library.image(one, self.item.media_folder) for one in several if one not in (None, ""))

    def page(self) -> tuple[str, ...]:
        found = self.images("image") or self.images("image_filename")
        if not found:
            raise BadSample("bad_record", "the row has no image")
        return found

    def video(self) -> tuple[tuple[str, ...], ...]:
        value = self.values.get("video")
        if not isinstance(value, str) or not value:
            raise BadSample("bad_record", "video must name a folder of frames or a video file")
        return (self.library.frames(value, self.item.media_folder),)

    def turns(self) -> tuple[str, str]:
        turns = self.values.get("conversations")
        if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
            raise BadSample("bad_record", "conversations must be a list of two turns")
        human, gpt = (turn.get("value") for turn in turns[:2])
        if not isinstance(human, str) or not isinstance(gpt, str):
            raise BadSample("bad_record", "conversations: value must be a string")
        return _clean(human), _clean(gpt)

    def pair(self, query: Side, positive: Side) -> tuple[Side, Side]:
        """Both sides with the input's words before their texts; each needs a text or a medium."""
        words = (self.item.query_text, self.item.target_text)
        defaults = _TEXTS.get(self.item.layout, ("", ""))
        sides = []
        for name, side, own, default in zip(("query", "positive"), (query, positive), words, defaults, strict=True):
            text = _clean(f"{default if own is None else own}\n{side.text}")
            if not text and not side.images and not side.videos:
                raise BadSample("bad_record", f"the {name} has neither text nor media")
            sides.append(Side(text, side.images, side.videos))
        return sides[0], sides[1]


def _clean(text: str) -> str:
    """Text without media markers: umer1 puts media first."""
    text = task_text(_MMEB_MARKER.sub("", text))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample("bad_record", f"the text is not valid Unicode: {error.reason}") from None
    return text


def _mmeb(row: _Row) -> tuple[Side, Side]:
    return row.pair(
        Side(row.text("qry", "qry_text"), row.images("qry_image_path")),
        Side(row.text("pos_text"), row.images("pos_image_path")),
    )


def _hound_caption(row: _Row) -> tuple[Side, Side]:
    question, answer = row.turns()
    return row.pair(Side(question, videos=row.video()), Side(answer))


def _hound_video(row: _Row) -> tuple[Side, Side]:
    return row.pair(Side(row.turns()[1]), Side("", videos=row.video()))


def _vidore(row: _Row) -> tuple[Side, Side]:
    return row.pair(Side(row.text("query"), row.page()), Side(row.text("answer")))


def _page(row: _Row) -> tuple[Side, Side]:
    return row.pair(Side(row.text("query")), Side("", row.page()))


_LAYOUTS: dict[str, Callable[[_Row], tuple[Side, Side]]] = {
    "mmeb": _mmeb,
    "llavahound-caption": _hound_caption,
    "llavahound-video": _hound_video,
    "vidore": _vidore,
    "vidore-page": _page,
    "visrag": _page,
}
