"""Token ids, pixels, positions and labels equal what transformers makes of the same conversation."""

import os
import pickle

import numpy as np
import pytest
import torch
from data_tools import make_processor, tiny_directory, tiny_hf, write_picture
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umer1.data import prompts
from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot
from umer1.data.processor import IGNORE, content_id
from umer1.data.schema import Side
from umer1.errors import UserError

ANSWER = prompts.assistant_text("two and three are five", "a red square")
TEXTS = [
    "a red square",
    "",
    "\n\nleading and trailing newlines\n\n",
    "Ünïcödé 你好 e\u0301 \u202e \u0000 \U0001f600   spaces\t",
    "<think> markup </answer> <disc_emb> <gen_emb> {{ jinja }} {% raw %}",
    "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2)<|box_end|>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_directory())


def messages(content: list, response: str | None) -> list:
    turns = [
        {"role": "system", "content": prompts.SYSTEM},
        {"role": "user", "content": content},
    ]
    return turns if response is None else [*turns, {"role": "assistant", "content": response}]


def reference_ids(tokenizer, content: list, counts: list[int], response: str | None = None) -> list[int]:
    """transformers: render the directory's own template, expand each pad, tokenise the whole text at once."""
    text = tokenizer.apply_chat_template(
        messages(content, response), tokenize=False, add_generation_prompt=response is None
    )
    pieces = text.split("<|vision_end|>")
    for index, count in enumerate(counts):
        for pad in ("<|image_pad|>", "<|video_pad|>"):
            pieces[index] = pieces[index].replace(pad, pad * count)
    text = "<|vision_end|>".join(pieces)
    return tokenizer(text.removesuffix("\n") if response is not None else text, add_special_tokens=False)["input_ids"]


def check_positions(sequence) -> None:
    config = Qwen2VLConfig.from_pretrained(tiny_directory())
    kinds = (sequence.input_ids == config.image_token_id).int() + 2 * (
        sequence.input_ids == config.video_token_id
    ).int()
    holder = Qwen2VLModel.__new__(Qwen2VLModel)
    torch.nn.Module.__init__(holder)
    holder.config = config
    is_video = [bool((kinds[start] == 2).item()) for start in _span_starts(kinds)]
    grids = sequence.grid_thw
    images = grids[[not video for video in is_video]] if len(grids) else grids
    videos = grids[is_video] if len(grids) else grids
    want, _ = holder.get_rope_index(
        sequence.input_ids[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=images if len(images) else None,
        video_grid_thw=videos if len(videos) else None,
    )
    torch.testing.assert_close(sequence.position_ids, want[:, 0].long())


def _span_starts(kinds: torch.Tensor) -> list[int]:
    values = kinds.tolist()
    return [i for i, value in enumerate(values) if value and (i == 0 or not values[i - 1])]


@pytest.mark.parametrize("text", TEXTS)
def test_text_ids_equal_transformers(tokenizer, tmp_path, text):
    processor = make_processor()
    user = prompts.user_text(text)
    prompt = processor.encode_prompt(text, [], [], None)
    assert prompt.input_ids.tolist() == reference_ids(tokenizer, [{"type": "text", "text": user}], [])
    side = Side(text=f"{text}\n<disc_emb>\n{prompts.SUFFIX}", response=ANSWER)
    sequence = processor.encode_side(side, MediaRoot(tmp_path))
    whole = reference_ids(tokenizer, [{"type": "text", "text": side.text}], [], ANSWER)
    assert sequence.input_ids.tolist() == whole
    check_positions(sequence)
    special = tiny_hf().special
    assert sequence.input_ids[sequence.disc_index] == special.disc_emb
    assert special.disc_emb not in sequence.input_ids[sequence.disc_index + 1 :]
    assert sequence.gen_index == len(sequence) - 2 and sequence.input_ids[-2] == special.gen_emb


def test_markers_anywhere_with_images_of_any_shape(tokenizer, tmp_path):
    processor = make_processor()
    names = [
        write_picture(tmp_path, f"{i}.png", *size, seed=i) for i, size in enumerate([(30, 500), (333, 60), (1, 1)])
    ]
    text = f"look: <image> and<image>\n then<image><disc_emb>\n{prompts.SUFFIX}"
    sequence = processor.encode_side(Side(text=text, images=tuple(names), response=ANSWER), MediaRoot(tmp_path))
    reference = Qwen2VLImageProcessorPil.from_pretrained(tiny_directory())
    pictures = [Image.open(tmp_path / name) for name in names]
    want = reference(images=pictures, return_tensors="pt")
    torch.testing.assert_close(sequence.pixel_values, want["pixel_values"], rtol=0, atol=0)
    torch.testing.assert_close(sequence.grid_thw, want["image_grid_thw"])
    image = {"type": "image"}
    content = [{"type": "text", "text": "look: "}, image, {"type": "text", "text": " and"}, image]
    content += [{"type": "text", "text": "\n then"}, image, {"type": "text", "text": f"<disc_emb>\n{prompts.SUFFIX}"}]
    counts = (want["image_grid_thw"].prod(1) // 4).tolist()
    assert sequence.input_ids.tolist() == reference_ids(tokenizer, content, counts, ANSWER)
    check_positions(sequence)


def test_prompt_with_images_and_videos(tokenizer, tmp_path):
    processor = make_processor()
    image = write_picture(tmp_path, "a.png", 84, 56)
    frames = [write_picture(tmp_path, f"f/{i}.png", 60, 90, seed=i) for i in range(5)]
    prompt = processor.encode_prompt("what?", [image], [frames, frames[:1]], MediaRoot(tmp_path))
    counts = (prompt.grid_thw.prod(1) // 4).tolist()
    assert prompt.grid_thw[:, 0].tolist() == [1, 3, 1]
    video = {"type": "video"}
    content = [{"type": "image"}, video, video, {"type": "text", "text": prompts.user_text("what?")}]
    assert prompt.input_ids.tolist() == reference_ids(tokenizer, content, counts)
    assert prompt.pixel_values.shape == (int(prompt.grid_thw.prod(1).sum()), 3 * 2 * 14 * 14)
    assert prompt.gen_index == -1 and prompt.prompt_length == len(prompt)
    assert (prompt.labels == IGNORE).all()
    check_positions(prompt)
    short = processor.encode_prompt("what?", [image], [frames, frames[:1]], MediaRoot(tmp_path), disc_only=True)
    assert len(short) == prompt.disc_index + 1 == short.disc_index + 1
    assert torch.equal(short.input_ids, prompt.input_ids[: len(short)])
    assert torch.equal(short.position_ids, prompt.position_ids[:, : len(short)])


def test_labels_are_the_response_and_its_end_one_to_the_left(tmp_path):
    processor, special = make_processor(), tiny_hf().special
    side = Side(text=prompts.user_text("q"), response=ANSWER)
    sequence = processor.encode_side(side, MediaRoot(tmp_path))
    want = tiny_hf().tokenizer.encode(ANSWER, add_special_tokens=False).ids + [special.im_end]
    start = sequence.prompt_length
    assert sequence.input_ids[start:].tolist() == want
    assert sequence.labels[start - 1 : -1].tolist() == want
    assert (sequence.labels[: start - 1] == IGNORE).all() and sequence.labels[-1] == IGNORE
    prompt = processor.encode_prompt("q", [], [], None)
    assert torch.equal(prompt.input_ids, sequence.input_ids[:start])
    again = processor.encode_response(prompt, ANSWER)
    for name in ("input_ids", "labels", "position_ids", "gen_index", "disc_index", "prompt_length"):
        assert np.array_equal(getattr(again, name), getattr(sequence, name)), name
    by_ids = processor.encode_response(prompt, want)
    assert torch.equal(by_ids.input_ids, again.input_ids) and by_ids.gen_index == again.gen_index
    assert processor.encode_response(prompt, want[:2]).gen_index == -1


def test_response_positions_follow_a_long_video(tmp_path):
    processor = make_processor()
    frames = [write_picture(tmp_path, f"{i}.png", 28, 28, seed=i) for i in range(20)]
    side = Side(text=f"<video>{prompts.user_text('q')}", videos=(tuple(frames),), response=ANSWER)
    whole = processor.encode_side(side, MediaRoot(tmp_path))
    parts = processor.encode_response(processor.encode_prompt("q", [], [frames], MediaRoot(tmp_path)), ANSWER)
    assert torch.equal(whole.input_ids, parts.input_ids)
    assert torch.equal(whole.position_ids, parts.position_ids)


STRUCTURE = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
STRUCTURE += ["<|vision_pad|>", "<|endoftext|>"]


@pytest.mark.parametrize("token", STRUCTURE)
def test_text_cannot_forge_structure(tmp_path, token):
    processor, media = make_processor(), MediaRoot(tmp_path)
    cases = [
        Side(text=f"x{token}y\n<disc_emb>\n{prompts.SUFFIX}", response=ANSWER),
        Side(text=f"x\n<disc_emb>\n{prompts.SUFFIX}{token}", response=ANSWER),
        Side(text=token + prompts.user_text("q"), response=ANSWER),
        Side(text=prompts.user_text("q"), response=token + ANSWER),
        Side(text=prompts.user_text("q"), response=ANSWER + token),
    ]
    for side in cases:
        with pytest.raises(BadSample, match="reserved_token"):
            processor.encode_side(side, media)
    with pytest.raises(BadSample, match="reserved_token"):
        processor.encode_prompt(f"a {token}", [], [], media)


def side_cause(side: Side, root, processor=None) -> str:
    with pytest.raises(BadSample) as caught:
        (processor or make_processor()).encode_side(side, MediaRoot(root))
    assert caught.value.detail
    return caught.value.cause


def test_causes(tmp_path):
    user = prompts.user_text("q")
    picture = write_picture(tmp_path, "a.png")
    write_picture(tmp_path, "long.png", 2, 500)
    cases = [
        ("marker_mismatch", Side(text=user, images=(picture,), response=ANSWER)),
        ("marker_mismatch", Side(text=f"<image>{user}", response=ANSWER)),
        ("marker_mismatch", Side(text=f"<image><image>{user}", images=(picture,), response=ANSWER)),
        ("marker_mismatch", Side(text=f"<image>{user}", videos=((picture,),), response=ANSWER)),
        ("no_disc_emb", Side(text="q", response=ANSWER)),
        ("no_gen_emb", Side(text=user, response="<think>a</think><answer>b")),
        ("empty_response", Side(text=user, response=" \n")),
        ("missing_file", Side(text=f"<image>{user}", images=("none.png",), response=ANSWER)),
        ("aspect_ratio", Side(text=f"<image>{user}", images=("long.png",), response=ANSWER)),
        ("bad_record", Side(text=f"\ud800{user}", response=ANSWER)),
        ("bad_record", Side(text=f"<video>{user}", videos=((),), response=ANSWER)),
        ("too_many_frames", Side(text=f"<video>{user}", videos=((picture,) * 9,), response=ANSWER)),
    ]
    processor = make_processor(max_frames=8)
    for cause, side in cases:
        assert side_cause(side, tmp_path, processor) == cause


def test_prompt_arguments_of_the_wrong_form(tmp_path):
    for arguments in ((None, [], []), ("q", "a.png", []), ("q", [], ["a.png"]), ("q", [3], [])):
        with pytest.raises(BadSample, match="bad_record"):
            make_processor().encode_prompt(*arguments, MediaRoot(tmp_path))
    with pytest.raises(UserError, match="--data-root"):
        make_processor().encode_prompt("q", ["a.png"], [], None)


def test_a_changed_picture_is_decoded_anew(tmp_path):
    processor, media = make_processor(), MediaRoot(tmp_path)
    side = Side(text=f"<image>{prompts.user_text('q')}", images=("a.png",), response=ANSWER)
    write_picture(tmp_path, "a.png", 28, 28, seed=0)
    first = processor.encode_side(side, media)
    assert torch.equal(processor.encode_side(side, media).pixel_values, first.pixel_values)
    write_picture(tmp_path, "a.png", 28, 28, seed=1)
    os.utime(tmp_path / "a.png", ns=(1, 1))  # file systems' clocks are coarse
    assert not torch.equal(processor.encode_side(side, media).pixel_values, first.pixel_values)
    first.pixel_values.zero_()  # what is handed out is the caller's own
    write_picture(tmp_path, "b.png", 28, 28, seed=1)
    again = processor.encode_side(Side(side.text, ("b.png",), (), ANSWER), media)
    assert torch.equal(processor.encode_side(side, media).pixel_values, again.pixel_values)


def test_over_length_cuts_reasoning_at_its_end_and_nothing_else(tmp_path):
    picture = write_picture(tmp_path, "a.png", 56, 56)
    response = prompts.assistant_text("one two three four five six seven eight nine ten " * 3, "a red square")
    side = Side(text=f"<image>{prompts.user_text('q')}", images=(picture,), response=response)
    whole = make_processor().encode_side(side, MediaRoot(tmp_path))
    decode = tiny_hf().tokenizer.decode
    for limit in range(len(whole), whole.prompt_length, -1):
        try:
            cut = make_processor(limit).encode_side(side, MediaRoot(tmp_path))
        except BadSample as error:
            assert error.cause == "over_length"
            break
        assert len(cut) <= limit
        assert torch.equal(cut.input_ids[: whole.prompt_length], whole.input_ids[: whole.prompt_length])
        text = decode(cut.input_ids[cut.prompt_length :].tolist(), skip_special_tokens=False)
        reasoning = text.removeprefix("<think>").removesuffix("</think><answer>a red square<gen_emb><|im_end|>")
        assert f"<think>{reasoning}</think><answer>a red square<gen_emb><|im_end|>" == text
        assert response.startswith(f"<think>{reasoning}")
        assert cut.input_ids[cut.gen_index] == tiny_hf().special.gen_emb and cut.gen_index == len(cut) - 2
    else:
        raise AssertionError("no limit was too small")
    assert reasoning == ""  # every reasoning token was given up before the sample was
    for bad in ("no reasoning <gen_emb>" * 30, "<think>a <gen_emb> b</think> " + "long " * 200):
        plain = Side(text=prompts.user_text("q"), response=bad)
        assert side_cause(plain, tmp_path, make_processor(whole.prompt_length + 20)) == "over_length"


def test_media_stop_being_decoded_once_the_prompt_cannot_fit(tmp_path):
    picture = write_picture(tmp_path, "a.png", 112, 112)
    side = Side(text="<image>" * 500 + prompts.user_text("q"), images=(picture,) * 500, response=ANSWER)

    class Counting(MediaRoot):
        opened = 0

        def open_image(self, relative):
            self.opened += 1
            return super().open_image(relative)

    media = Counting(tmp_path)
    with pytest.raises(BadSample, match="over_length"):
        make_processor(400).encode_side(side, media)
    assert media.opened < 40
    media.opened = 0
    video = Side(text=f"<video>{prompts.user_text('q')}", videos=((picture,) * 500,), response=ANSWER)
    with pytest.raises(BadSample, match="over_length"):
        make_processor(400).encode_side(video, media)
    assert media.opened == 1


def test_blank_image_is_an_option(tmp_path):
    media, processor = MediaRoot(tmp_path), make_processor(blank_image_for_text=True)
    text = prompts.user_text("q")
    with_marker = processor.encode_side(Side(text=f"<image>\n{text}", response=ANSWER), media)
    without = processor.encode_side(Side(text=text, response=ANSWER), media)
    prompt = processor.encode_prompt("q", [], [], None)
    for sequence in (with_marker, without, prompt):
        assert sequence.grid_thw.tolist() == [[1, 2, 2]]
        assert (sequence.pixel_values[:, 0] == sequence.pixel_values[0, 0]).all()
    assert torch.equal(without.input_ids[: without.prompt_length], prompt.input_ids)
    assert len(make_processor().encode_prompt("q", [], [], None).grid_thw) == 0


def test_equal_targets_have_equal_ids(tmp_path):
    media, processor = MediaRoot(tmp_path), make_processor()
    first = processor.encode_side(Side(text=prompts.user_text("q"), response=ANSWER), media)
    second = processor.encode_side(Side(text=prompts.user_text("q"), response="x<gen_emb>"), media)
    other = processor.encode_side(Side(text=prompts.user_text("r"), response=ANSWER), media)
    assert first.target_id == second.target_id != other.target_id
    assert content_id("a", ("b",)) == 2454880412851023840  # the same on every machine and release
    assert content_id("a", ("b", "c")) != content_id("a", ("bc",)) != content_id("a", (), (("bc",),))
    assert 0 <= content_id("x" * 100) < 2**63


def test_a_processor_and_a_bad_sample_survive_pickling(tmp_path):
    processor = pickle.loads(pickle.dumps(make_processor()))
    assert len(processor.encode_prompt("q", [], [], None)) > 10
    error = pickle.loads(pickle.dumps(BadSample("missing_file", "x")))
    assert (error.cause, error.detail) == ("missing_file", "x")
