"""A video file in a data file: the sequence that its frames as pictures give, in SFT, RL and inference."""

import json
import sys

import pytest
import torch
from data_tools import make_processor, record, record_side, tiny_hf, write_picture
from PIL import Image
from test_video_files import all_frames, write_video

from umer1.data.bad_samples import BadSample
from umer1.data.dataset import PairDataset, parse_pair
from umer1.data.fields import video_paths
from umer1.data.images import ImageConfig, Patchifier
from umer1.data.loader import DataConfig, Loader, StepMaker
from umer1.data.media import MediaRoot
from umer1.data.video_files import frame_places
from umer1.inference.inputs import Input, read_inputs
from umer1.inference.planning import input_cost
from umer1.training.batches import make_sampler, open_data


@pytest.fixture
def clip(tmp_path):
    """(media root, the file, its 8 evenly spaced frames as pictures); 37 frames of 96 x 64."""
    write_video(tmp_path / "clip.mp4", frames=37, options={"g": "10"})
    every = all_frames(tmp_path / "clip.mp4")
    names = []
    for place in frame_places(37, 8):
        Image.fromarray(every[place]).save(tmp_path / f"{place}.png")
        names.append(f"{place}.png")
    return MediaRoot(tmp_path), "clip.mp4", names


def side(video):
    return parse_pair({**record(), "qry": record_side("<video>what is it?", video=video)}).query


def same(got, want) -> bool:
    names = ("input_ids", "position_ids", "pixel_values", "grid_thw")
    return all(torch.equal(getattr(got, name), getattr(want, name)) for name in names)


@pytest.mark.parametrize("form", [lambda file: file, lambda file: [file], lambda file: [[file]]])
def test_a_file_is_the_video_of_its_frames(clip, form):
    media, file, frames = clip
    processor = make_processor()
    got, want = (processor.encode_side(side(video), media) for video in (form(file), frames))
    assert same(got, want) and got.grid_thw.tolist()[0][0] == 4
    assert same(processor.encode_side(side(form(file)), media), want), "the kept patches"


def test_several_files_and_frames_in_one_text(clip):
    media, file, frames = clip
    text = "<video> or <video>?"
    forms = [file, file], [frames, frames]
    pairs = [parse_pair({**record(), "qry": record_side(text, video=video)}) for video in forms]
    got, want = (make_processor().encode_side(pair.query, media) for pair in pairs)
    assert same(got, want)
    mixed = parse_pair({**record(), "qry": record_side(text, video=[[file], frames])})
    assert same(make_processor().encode_side(mixed.query, media), want)


def test_rollout_prompts_have_the_frames_that_the_patches_are_of(clip):
    media, file, frames = clip
    videos = (file,), tuple(frames)
    got, want = (make_processor().encode_rollout_prompt("what?", (), (video,), media) for video in videos)
    assert same(got.sequence, want.sequence)
    assert (got.videos[0] == want.videos[0]).all() and got.videos[0].shape[0] == 8


@pytest.mark.parametrize("count", [1, 2, 3, 37, 100])
def test_the_number_of_frames_is_a_setting(clip, count):
    media, file, _ = clip
    processor = make_processor(bounds={"num_frames": count})
    steps = -(-min(count, 37) // 2)
    assert processor.encode_side(side(file), media).grid_thw[0, 0] == steps
    cost = input_cost(Input("a", "", (), (file,), 1), "disc", media, Patchifier(processor.image_config))
    assert cost.patches == len(processor.encode_side(side(file), media).pixel_values)


def test_settings_reach_the_processor():
    config = ImageConfig.of_directory(tiny_hf(), DataConfig(num_frames=5))
    assert config.num_frames == 5
    assert any("num_frames=0" in problem for problem in DataConfig(num_frames=0).violations())


def test_a_video_that_does_not_fit_is_refused_before_it_is_decoded(clip, monkeypatch):
    media, file, _ = clip
    monkeypatch.setattr("umer1.data.vision.sample_frames", None)
    with pytest.raises(BadSample) as caught:
        make_processor(40).encode_side(side(file), media)
    assert caught.value.cause == "over_length"


def test_without_a_decoder_the_cause_says_what_to_install(clip, monkeypatch):
    media, file, _ = clip
    monkeypatch.setitem(sys.modules, "av", None)
    for attempt in (lambda: make_processor().encode_side(side(file), media), lambda: _cost(media, file)):
        with pytest.raises(BadSample, match="pip install av") as caught:
            attempt()
        assert caught.value.cause == "no_video_decoder"


def _cost(media, file):
    return input_cost(Input("a", "", (), (file,), 1), "disc", media, Patchifier(make_processor().image_config))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a.mp4", (("a.mp4",),)),
        (["a.mp4", "", "b.webm"], (("a.mp4",), ("b.webm",))),
        (["1.png", "", "2.png"], (("1.png", "2.png"),)),
        ([["a.MP4"], ["1.png"]], (("a.MP4",), ("1.png",))),
    ],
)
def test_forms(value, found):
    assert video_paths("qry.video", value) == found


@pytest.mark.parametrize("value", ["a.png", ["a.mp4", "1.png"], [["a.mp4", "b.mp4"]], [["a.mp4"], "b.mp4"], 7, [7]])
def test_forms_that_are_none(value):
    with pytest.raises(BadSample, match="qry.video must be a video file, a list of frame paths"):
        video_paths("qry.video", value)


def test_encode_takes_a_file_and_refuses_a_mixture(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1, "text": "", "video": "a.mp4"}\n{"id": 2, "text": "", "video": ["a.mp4", "1.png"]}\n')
    inputs, bad = read_inputs(path)
    assert [item.video for item in inputs] == [("a.mp4",)]
    (entry,) = bad
    assert (entry.line, entry.detail) == (2, '"video" must be one video file or the frames of one video')


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_step_decodes_is_counted(clip, tmp_path, workers):
    media, file, frames = clip
    picture = write_picture(tmp_path, "large.png", 280, 280)  # too large to be kept
    sides = {"qry": record_side("<image>a", image=picture), "pos": record_side("<video>b", video=frames)}
    records = [{**record(), **sides}]
    (tmp_path / "pairs.json").write_text(json.dumps(records * 4))
    data = DataConfig(data_path=[str(tmp_path / "pairs.json")], global_batch_size=2, num_workers=workers)
    dataset = open_data(PairDataset, data, make_processor(bounds={"max_pixels": 10**6, "video_max_pixels": 10**6}))
    loader = Loader(StepMaker(dataset, make_sampler(data, dataset, 1), data))
    try:
        for _ in range(3):
            loader.next()
            assert (loader.work.images, loader.work.frames) == (2, 16)
            assert 0 < loader.work.seconds and 0 <= loader.waited
    finally:
        loader.close()
