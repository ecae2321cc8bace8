"""The reader of encode's input file: what it takes, and one message for all that it refuses."""

import json

import pytest

from umer1.errors import UserError
from umer1.inference.inputs import bad_inputs_message, read_inputs


def write(tmp_path, *lines):
    path = tmp_path / "inputs.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_forms_of_media_and_ids(tmp_path):
    path = write(
        tmp_path,
        {"id": "a", "text": "one", "image": "x.png"},
        b"",
        {"id": 7, "text": "two", "image": ["x.png", "y.png"], "_label": "not read"},
        {"id": "c", "video": ["1.png", "2.png"], "image": ""},
    )
    inputs, bad = read_inputs(path)
    assert not bad
    assert [(item.id, item.text, item.images, item.video, item.line) for item in inputs] == [
        ("a", "one", ("x.png",), (), 1),
        ("7", "two", ("x.png", "y.png"), (), 3),
        ("c", "", (), ("1.png", "2.png"), 4),
    ]


def test_every_bad_line_is_named_once(tmp_path):
    path = write(
        tmp_path,
        {"id": "a", "text": "good"},
        b"{not json",
        b"\xff\xfe",
        ["a list"],
        {"text": "no id"},
        {"id": True, "text": "x"},
        {"id": "a", "text": "again"},
        {"id": "b", "text": 3},
        {"id": "c", "text": "x", "image": [1]},
        {"id": "d", "text": "  "},
        {"id": "e\0", "text": "x"},
    )
    inputs, bad = read_inputs(path)
    assert [item.id for item in inputs] == ["a"]
    assert [entry.line for entry in bad] == list(range(2, 12))
    message = bad_inputs_message(path, bad, total=11)
    assert "10 of 11 inputs" in message and "--skip-bad-inputs" in message
    for words in (
        "line 2: bad_record: not JSON",
        "not UTF-8",
        "a list",
        "line 7: bad_record: the id 'a' stands in line 1",
    ):
        assert words in message


def test_a_long_list_is_cut(tmp_path):
    path = write(tmp_path, *[b"{"] * 50)
    message = bad_inputs_message(path, read_inputs(path)[1], total=50)
    assert message.count("\n") == 21 and "and 30 more" in message


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_inputs(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="empty"):
        read_inputs(write(tmp_path, b" "))
