"""RL files: what is accepted, what is a bad sample, and that pictures and patches are one resize."""

import json

import numpy as np
import pytest
import torch
from data_tools import make_processor, tiny_directory, tiny_hf, write_picture, write_records
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umer1.data import prompts
from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot
from umer1.data.rl_dataset import PromptDataset


def rl_record(**changes) -> dict:
    sides = {f"{side}_{part}": "" for side in ("qry", "pos") for part in ("image", "video")}
    plain = {"dataset": "mine", "dataset_name": "toy", "qry_text": "a query", "pos_text": "a target", "solution": "x"}
    return plain | sides | changes


def one(tmp_path, record: dict, **options) -> PromptDataset:
    return PromptDataset(write_records(tmp_path / "rl.json", [record]), None, make_processor(**options))


def cause(dataset: PromptDataset) -> tuple[str, str]:
    with pytest.raises(BadSample) as caught:
        dataset[0]
    return caught.value.cause, caught.value.detail


@pytest.mark.parametrize("lines", [True, False])
def test_names_come_from_dataset_name_and_else_from_dataset(tmp_path, lines):
    records = [
        rl_record(dataset_name="a"),
        rl_record(dataset_name=""),
        rl_record(dataset_name=None, dataset='quo"te'),
        {"qry_text": 'says "dataset": "fake"', "pos_text": "x", "dataset": "b"},
        {"qry_text": "q", "pos_text": "x"},
    ]
    dataset = PromptDataset(write_records(tmp_path / "rl", records, lines=lines), None, make_processor())
    names = ["a", "mine", 'quo"te', "b", ""]
    assert [dataset.dataset_name(index) for index in range(5)] == names
    assert [dataset[index].dataset for index in range(5)] == names
    assert [dataset[index].index for index in range(5)] == list(range(5))
    assert {dataset[index].slot for index in range(5)} == {-1}
    dataset.close()


def test_a_repeated_key_is_not_guessed(tmp_path):
    inner = json.dumps(rl_record(solution={"dataset_name": "inner"}))
    path = write_records(tmp_path / "rl.jsonl", [inner], lines=True)
    assert PromptDataset(path, None, make_processor()).names == ("toy",)


@pytest.mark.parametrize("none", ["", [""], [], None, "absent"])
def test_every_form_of_none(tmp_path, none):
    media = {f"{side}_{part}": none for side in ("qry", "pos") for part in ("image", "video")}
    record = rl_record(**media)
    if none == "absent":
        record = {key: value for key, value in record.items() if value != "absent"}
    pair = one(tmp_path, record)[0]
    for prompt, text in ((pair.query, "a query"), (pair.positive, "a target")):
        assert prompt.images == prompt.videos == () and not len(prompt.sequence.grid_thw)
        want = make_processor().encode_prompt(text, [], [], None)
        assert torch.equal(prompt.sequence.input_ids, want.input_ids)
        assert prompt.sequence.gen_index == -1 and prompt.sequence.prompt_length == len(prompt.sequence)


def test_pictures_and_patches_are_one_resize(tmp_path):
    names = [write_picture(tmp_path, f"{i}.png", *size, seed=i) for i, size in enumerate([(30, 500), (333, 60)])]
    frames = [write_picture(tmp_path, f"f/{i}.png", 150, 90, seed=i) for i in range(3)]
    others = [write_picture(tmp_path, f"g/{i}.png", 60, 60, seed=i) for i in range(2)]
    record = rl_record(qry_image=names, qry_video=[frames, others], pos_image=names[1], pos_video=frames)
    pair = one(tmp_path, record)[0]
    processor, media = make_processor(), MediaRoot(tmp_path)
    for prompt, text, images, videos in (
        (pair.query, "a query", names, [frames, others]),
        (pair.positive, "a target", names[1:], [frames]),
    ):
        want = processor.encode_prompt(text, images, videos, media)
        assert all(
            torch.equal(getattr(prompt.sequence, name), getattr(want, name))
            for name in ("input_ids", "position_ids", "pixel_values", "grid_thw")
        )
        assert prompt.sequence.target_id == want.target_id
        assert (len(prompt.images), len(prompt.videos)) == (len(images), len(videos))
    # transformers makes the same patches of the pictures, and has nothing left to resize
    reference = Qwen2VLImageProcessorPil.from_pretrained(tiny_directory())
    made = reference(images=list(pair.query.images), do_resize=False, return_tensors="pt")
    count = len(made["pixel_values"])
    assert torch.equal(pair.query.sequence.pixel_values[:count], made["pixel_values"])
    assert torch.equal(pair.query.sequence.grid_thw[:2], made["image_grid_thw"])
    start = count
    for video, grid in zip(pair.query.videos, pair.query.sequence.grid_thw[2:].tolist(), strict=True):
        assert video.dtype == np.uint8 and video.shape == (2 * grid[0], 14 * grid[1], 14 * grid[2], 3)
        stills = reference(images=list(video), do_resize=False, return_tensors="pt")["pixel_values"]
        stills = stills.view(grid[0], 2, grid[1] * grid[2], 3, 2, 196)[:, :, :, :, 0]
        size = grid[0] * grid[1] * grid[2]
        got = pair.query.sequence.pixel_values[start : start + size].view(grid[0], -1, 3, 2, 196)
        assert torch.equal(got, stills.permute(0, 2, 3, 1, 4))
        start += size
    assert (pair.query.videos[0][2] == pair.query.videos[0][3]).all(), "the incomplete last step is filled"


def test_texts_may_be_whole_user_texts(tmp_path):
    picture = write_picture(tmp_path, "a.png")
    frames = [write_picture(tmp_path, f"f/{i}.png", seed=i) for i in range(2)]
    plain = one(tmp_path, rl_record(qry_image=picture, pos_video=frames))[0]
    whole = rl_record(qry_image=[picture], pos_video=[frames])
    whole["qry_text"] = f"<image>\n{prompts.user_text('a query')}"
    whole["pos_text"] = [f"<video>{prompts.user_text('a target')}"]
    pair = one(tmp_path, whole)[0]
    for side in ("query", "positive"):
        left, right = getattr(pair, side), getattr(plain, side)
        assert torch.equal(left.sequence.input_ids, right.sequence.input_ids)
        assert left.sequence.target_id == right.sequence.target_id
        assert left.sequence.input_ids.tolist().count(tiny_hf().special.disc_emb) == 1


@pytest.mark.parametrize(
    "changes, expected, words",
    [
        ({"qry_text": 5}, "bad_record", "qry_text must be a string, not a number"),
        ({"pos_text": ["a", "b"]}, "bad_record", "pos_text must be a string, not a list"),
        ({"qry_text": "<image>\n"}, "marker_mismatch", "qry: 1 <image> and 0 <video> markers for 0 images"),
        ({"qry_text": "", "qry_image": [""]}, "bad_record", "qry has neither text nor media"),
        ({"pos_text": prompts.user_text("")}, "bad_record", "pos has neither text nor media"),
        ({"qry_image": {"path": "a"}}, "bad_record", "qry_image must be a path or a list of paths"),
        ({"pos_video": "clip.png"}, "bad_record", "'clip.png' is no video file"),
        ({"pos_video": ["clip.mp4", "0.png"]}, "bad_record", "mixes them in one video"),
        ({"pos_video": [["a.png"], "b.png"]}, "bad_record", "pos_video must be a video file, a list of"),
        ({"dataset_name": 7}, "bad_record", "dataset_name must be a string"),
        ({"dataset": ["x"]}, "bad_record", "dataset must be a string"),
        ({"qry_text": "<|image_pad|>"}, "reserved_token", "qry: the text spells"),
        ({"qry_text": "<|im_end|>"}, "reserved_token", "im_end"),
        ({"qry_image": "none.png"}, "missing_file", "qry:"),
        ({"pos_image": "../a.png"}, "path_escape", "pos:"),
        ({"qry_text": "\ud800"}, "bad_record", "Unicode"),
    ],
)
def test_bad_records(tmp_path, changes, expected, words):
    found, detail = cause(one(tmp_path, rl_record(**changes)))
    assert found == expected and words in detail


def test_values_that_are_no_records(tmp_path):
    dataset = PromptDataset(write_records(tmp_path / "rl.json", ["[1]", "{}"]), None, make_processor())
    assert cause(dataset) == ("bad_record", "a record must be an object, not a list")
    with pytest.raises(BadSample, match="neither text nor media"):
        dataset[1]


def test_a_prompt_has_to_leave_room_for_the_response(tmp_path):
    record = rl_record(qry_text="a longer query " * 9)
    length = len(one(tmp_path, record)[0].query.sequence)
    assert len(one(tmp_path, record, max_length=length)[0].query.sequence) == length
    found, detail = cause(one(tmp_path, record, max_length=length - 1))
    assert found == "over_length" and f"qry: {length} tokens, more than {length - 1}" in detail


def test_the_white_image_of_upstream(tmp_path):
    for text in ("a query", "<image>\na query"):
        pair = one(tmp_path, rl_record(qry_text=text), blank_image_for_text=True)[0]
        for prompt in (pair.query, pair.positive):
            (image,) = prompt.images
            assert (
                image.shape == (28, 28, 3) and (image == 255).all() and prompt.sequence.grid_thw.tolist() == [[1, 2, 2]]
            )
    assert cause(one(tmp_path, rl_record(qry_text="<video>a"), blank_image_for_text=True))[0] == "marker_mismatch"
