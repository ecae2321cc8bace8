"""Rows of an annotation with where they stand, and their fields as the type they must have, or a UserError."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.tables import Annotation


def numbered_rows(
    annotation: Annotation, columns: Sequence[str], optional: Sequence[str] = (), *, limit: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of the first `limit` rows, or of all; `where` names the row in messages."""
    rows = (row for batch in annotation.batches(columns, optional) for row in batch)
    for number, row in enumerate(islice(rows, limit)):
        yield f"{annotation.files[0].parent}: row {number}", row


def text_field(row: dict[str, Any], column: str, where: str) -> str:
    """A string; none is the empty one."""
    value = row[column]
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {column} must be a string, not {value!r:.80}")
    return value or ""


def texts_field(row: dict[str, Any], column: str, where: str) -> list[str]:
    """A list of at least one string."""
    value = row[column]
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {column} must be a list of at least one string, not {value!r:.80}")
    return value


def name_field(row: dict[str, Any], column: str, where: str) -> str:
    """What a file or a folder is called: a string that is not empty, or a whole number."""
    value = row[column]
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise UserError(f"{where}: {column} must be a name or a number, not {value!r:.80}")
    return str(value)
