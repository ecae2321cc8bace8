"""A key that no reader knows is an error with the nearest known one: a misspelt one lost its picture without a word."""

import json

import pytest

from umer1.data.bad_samples import BadSample
from umer1.data.dataset import parse_pair
from umer1.data.rl_dataset import PromptDataset
from umer1.inference.inputs import read_inputs

TURNS = [{"from": "human", "value": "a\n<disc_emb>\n"}, {"from": "gpt", "value": "<think>b</think>"}]


def pair(**more):
    return {"dataset_name": "x", "qry": {"conversations": TURNS}, "pos": {"conversations": TURNS}, **more}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (pair(qry={"conversations": TURNS, "images": ["a.png"]}), ["qry has", "'images'", "did you mean image?"]),
        (pair(pos={"conversations": TURNS, "vidoe": ["a.png"]}), ["pos has", "did you mean video?"]),
        (pair(neg=[{"conversation": TURNS}]), ["neg[0] has", "did you mean conversations?"]),
        (pair(negatives=[]), ["there is", "did you mean neg?"]),
        (pair(zzz=1), ["'zzz'.", "Known are dataset_name, qry, pos, neg"]),
    ],
)
def test_sft_records(record, words):
    with pytest.raises(BadSample) as caught:
        parse_pair(record)
    assert caught.value.cause == "bad_record" and all(word in caught.value.detail for word in words)


def test_what_a_user_keeps_beside_a_record_is_not_read_and_null_is_missing():
    kept = parse_pair(pair(id=7, metadata={"a": 1}, _note="mine", dataset_name=None, neg=None))
    assert kept.dataset == "" and kept.negatives == ()


@pytest.mark.parametrize(
    ("key", "nearest"), [("pos_images", "pos_image"), ("qry_image_path", "qry_image"), ("datset", "dataset")]
)
def test_rl_records(tmp_path, key, nearest):
    path = tmp_path / "rl.jsonl"
    path.write_text(json.dumps({"qry_text": "a", "pos_text": "b", "solution": "c", key: "x.png"}) + "\n")
    with pytest.raises(BadSample, match=f"did you mean {nearest}"):
        PromptDataset(path, tmp_path, None).read(0)


def test_encode_lines(tmp_path):
    path = tmp_path / "inputs.jsonl"
    lines = [{"id": "a", "text": "b", "images": ["x.png"]}, {"id": "c" * 2000, "text": "d"}, {"id": "e", "text": "f"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs, bad = read_inputs(path)
    assert [item.id for item in inputs] == ["e"]
    assert "did you mean image?" in bad[0].detail and "2000 characters, more than 1024" in bad[1].detail
