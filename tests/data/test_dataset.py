"""Data files: what is an error of the file, what is a bad sample, and that nothing is read whole."""

import json

import numpy as np
import pytest
from data_tools import make_processor, record, record_side, write_picture, write_records

from umer1.data import indexing
from umer1.data.bad_samples import BadSample
from umer1.data.dataset import PairDataset, parse_pair
from umer1.errors import UserError


def cause(dataset: PairDataset, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        dataset[index]
    return caught.value.cause


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("chunk", [7, 64, 8 * 2**20])
def test_both_forms_give_the_same_pairs(tmp_path, monkeypatch, lines, chunk):
    monkeypatch.setattr(indexing, "_CHUNK", chunk)
    records = [record(i, ["é", 'quo"te', "plain"][i % 3]) for i in range(7)]
    records[2]["qry"]["conversations"][0]["value"] = '你好 "dataset_name": "fake" \\ \u2028 \n<disc_emb>'
    path = write_records(tmp_path / "pairs", records, lines=lines)
    dataset = PairDataset(path, None, make_processor())
    assert len(dataset) == 7 and dataset.names == ("é", 'quo"te', "plain")
    assert [dataset.dataset_name(i) for i in range(7)] == [item["dataset_name"] for item in records]
    for index, item in enumerate(records):
        pair = dataset.read(index)
        assert (pair.index, pair.dataset) == (index, item["dataset_name"])
        assert pair.query.text == item["qry"]["conversations"][0]["value"]
        assert pair.positive.response == item["pos"]["conversations"][1]["value"]
    encoded = dataset[3]
    assert (encoded.index, encoded.dataset, encoded.negatives) == (3, "é", ())
    dataset.close()


def test_indented_json_byte_order_marks_and_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(0), record(1)], indent=2) + "\n\n", encoding="utf-8-sig")
    assert PairDataset(path, None, make_processor())[1].dataset == "toy"
    path.write_text("\n\n" + json.dumps(record(0)) + "\r\n\n" + json.dumps(record(1)), encoding="utf-8-sig")
    dataset = PairDataset(path, None, make_processor())
    assert len(dataset) == 2 and dataset[0].index == 0 and dataset[1].index == 1 and not dataset.is_list
    path.write_text(" " * 10_000 + json.dumps([record(0)]), encoding="utf-8-sig")
    assert PairDataset(path, None).is_list


def test_a_number_that_a_chunk_ends_in_is_read_to_its_end(tmp_path, monkeypatch):
    """Numbers are no pairs, but a list that holds some is a list; `2` is whole to a parser that sees no `.5e+30`."""
    path = tmp_path / "numbers.json"
    path.write_text("[2.5e+30 ,-7.25E-1,12,3e5, 0.5]")
    for chunk in range(1, 12):
        monkeypatch.setattr(indexing, "_CHUNK", chunk)
        dataset = PairDataset(path, None)
        assert [dataset.read_record(index) for index in range(len(dataset))] == [2.5e30, -0.725, 12, 3e5, 0.5]
        dataset.close()


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"[]", "holds no records"),
        (b"hello", "starts with"),
        (b"\x1f\x8b\x08\x00", "starts with"),
        (b"id,text\n1,2\n", "starts with"),
        (b'[{"a": 1},\n{"b": }]', "line 2, byte 17"),
        (b'[{"a": 1},\n{"b": 2}', "ends inside the list"),
        (b'[{"a": 1}\n {"b": 2}]', "',' or ']' is expected"),
        (b'[{"a": 1}] {"b": 2}', "goes on after"),
        (b'[{"a": 1},]', "line 1, byte 10"),
        (b'[{"a": "\xff"}]', "UTF-8"),
        ('[{"a": "é"},\n{"b": "'.encode() + b'\xff"}]', "UTF-8: invalid start byte (line 2, byte 21)"),
        (b'{"a": 1,\n "b": 2\n}', "line 1 is not a whole JSON object"),
        (DEEP.encode(), "nested too deeply"),
        ("[1]".encode("utf-16"), "starts with"),
    ],
)
def test_files_that_are_no_data_files(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="JSON list of pairs, or JSONL") as caught:
        PairDataset(path, None)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="does not exist|not a regular file"):
            PairDataset(path, None)
    path = write_records(tmp_path / "a.json", [record()])
    with pytest.raises(UserError, match="data root"):
        PairDataset(path, tmp_path / "nowhere")


def test_a_bad_line_is_a_bad_sample_of_its_data_set(tmp_path):
    good = record(0)
    lines = [
        '{"dataset_name": "cut", "qry": {"conv',
        good,
        "not json at all",
        "[1, 2]",
        '{"dataset_name": "deep", "qry": ' + DEEP,
        "\x00\x00",
        json.dumps({**good, "dataset_name": 3}),
        good,
    ]
    dataset = PairDataset(write_records(tmp_path / "a.jsonl", lines, lines=True), None, make_processor())
    assert len(dataset) == 8
    assert dataset.dataset_name(0) == "cut" and dataset.dataset_name(2) == "" and dataset.dataset_name(4) == "deep"
    assert [cause(dataset, i) for i in (0, 2, 3, 4, 5, 6)] == ["bad_record"] * 6
    assert dataset[1].index == 1 and dataset[7].index == 7


@pytest.mark.parametrize("lines", [True, False])
def test_names_can_always_be_printed(tmp_path, lines):
    records = [{**record(0), "dataset_name": "half \ud800"}, record(1)]
    dataset = PairDataset(write_records(tmp_path / "a", records, lines=lines), None, make_processor())
    assert dataset.dataset_name(0) == "half \\ud800"
    assert dataset[0].index == 0


def test_a_line_longer_than_any_record(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "MAX_RECORD_BYTES", 5000)
    monkeypatch.setattr("umer1.data.dataset.MAX_RECORD_BYTES", 5000)
    lines = [record(0), '{"a": "' + "x" * 20000 + '"}', record(1)]
    dataset = PairDataset(write_records(tmp_path / "a.jsonl", lines, lines=True), None, make_processor())
    assert len(dataset) == 3 and dataset[2].index == 2
    assert cause(dataset, 1) == "bad_record"


def broken(**changes) -> dict:
    return {**record(), **changes}


TURNS = record_side()["conversations"]


@pytest.mark.parametrize(
    "value",
    [
        7,
        None,
        "pair",
        broken(qry=None),
        broken(qry=[]),
        broken(pos="text"),
        broken(neg="text"),
        broken(neg=[1]),
        broken(dataset_name=["a"]),
        broken(qry={"conversations": None}),
        broken(qry={"conversations": {}}),
        broken(qry={"conversations": [1, 2]}),
        broken(qry={"conversations": TURNS[:1]}),
        broken(qry={"conversations": TURNS[::-1]}),
        broken(qry={"conversations": TURNS * 2}),
        broken(qry={"conversations": [TURNS[0], {"from": "gpt", "value": None}]}),
        broken(qry={"conversations": [TURNS[0], {"from": "gpt", "value": ["a"]}]}),
        broken(qry={**record_side(), "image": 3}),
        broken(qry={**record_side(), "image": {"path": "a"}}),
        broken(qry={**record_side(), "image": [None]}),
        broken(qry={**record_side(), "video": "movie.txt"}),
        broken(qry={**record_side(), "video": [1, 2]}),
        broken(qry={**record_side(), "video": [["a.png"], "b.png"]}),
    ],
)
def test_records_of_the_wrong_form(value):
    with pytest.raises(BadSample) as caught:
        parse_pair(value)
    assert caught.value.cause == "bad_record" and caught.value.detail


@pytest.mark.parametrize("image", [None, "", [], [""]])
@pytest.mark.parametrize("video", [None, "", [], [""], [[]], [[""]]])
def test_empty_media_are_none(image, video):
    pair = parse_pair({**record(), "qry": {**record_side(), "image": image, "video": video}})
    assert pair.query.images == () and pair.query.videos == ()


def test_media_and_negatives(tmp_path):
    names = [write_picture(tmp_path, f"m/{i}.png", 28, 28, seed=i) for i in range(5)]
    item = record(0)
    item["qry"] = record_side("<image> and <image>", image=names[:2])
    item["pos"] = record_side("<video>then<video>", video=[names[:3], names[3:]])
    item["neg"] = [record_side("<image>", image=names[0]), record_side("<video>", video=names)]
    path = write_records(tmp_path / "a.json", [item])
    pair = PairDataset(path, None, make_processor())[0]
    assert pair.query.grid_thw.tolist() == [[1, 2, 2]] * 2
    assert pair.positive.grid_thw[:, 0].tolist() == [2, 1]
    assert [side.grid_thw[:, 0].tolist() for side in pair.negatives] == [[1], [3]]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    dataset = PairDataset(path, elsewhere, make_processor())
    with pytest.raises(BadSample, match="missing_file: qry: 'm/0.png'"):
        dataset[0]


def test_jsonl_is_not_read_whole(tmp_path, monkeypatch):
    """Indexing reads line by line, and a record is read by its own bytes."""
    path = write_records(tmp_path / "a.jsonl", [record(i) for i in range(50)], lines=True)
    dataset = PairDataset(path, None, make_processor())
    read = []
    original = indexing.json.loads
    monkeypatch.setattr("umer1.data.dataset.json.loads", lambda raw: read.append(len(raw)) or original(raw))
    dataset.read(30)
    assert len(read) == 1 and read[0] < path.stat().st_size / 40


def test_damaged_files_end_in_one_of_the_two_errors(tmp_path):
    """Whatever is inserted, overwritten or cut out: an error of the file, a bad sample, or a pair."""
    rng = np.random.default_rng(0)
    picture = write_picture(tmp_path, "a.png", 28, 28)
    records = [record(i) for i in range(3)]
    records[1]["qry"] = record_side("<image>é x", image=picture)
    records[2]["pos"] = record_side("<video>y", video=[picture] * 3)
    words = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"\\ud800", b"\\", b"\xff", b"\0", b"\n", b"-"]
    words += [b"<image>", b"<video>", b"<|im_start|>", b"<gen_emb>", b'"image"', b'"neg"', b"../", b"9" * 5000]
    processor, path, outcomes = make_processor(200), tmp_path / "pairs", {"file": 0, "bad": 0, "good": 0}
    for attempt in range(300):
        data = bytearray(write_records(path, records, lines=bool(attempt % 2)).read_bytes())
        at, word = int(rng.integers(len(data))), words[int(rng.integers(len(words)))]
        data[at : at + (0, len(word), 30)[attempt % 3]] = word if attempt % 3 < 2 else b""
        path.write_bytes(bytes(data))
        try:
            dataset = PairDataset(path, None, processor)
        except UserError:
            outcomes["file"] += 1
            continue
        for index in range(len(dataset)):
            try:
                outcomes["good"] += dataset[index].index == index
            except BadSample as error:
                outcomes["bad"] += bool(error.detail)
        dataset.close()
    assert min(outcomes.values()) > 20
