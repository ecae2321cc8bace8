"""The 18 video tasks against what the reference evaluation does with the same rows and folders, and the odd cases."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from mmeb_folders import write_file, write_table
from mmeb_video_folders import KINDS, LAYOUTS, SUBSETS, frames_root, make_video_task, write_frames

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.readers import read_task
from umer1.evaluation.mmeb_v2.registry import GROUPS, TASKS
from umer1.evaluation.mmeb_v2.video_classes import CLASSES

FRESH = int.from_bytes(os.urandom(4), "little")
TOKEN, IMAGE = "<|video_pad|>", "<|image_pad|>"
GLOBAL = "K700 HMDB51 UCF101 Breakfast DiDeMo MSR-VTT MSVD VATEX YouCook2".split()
ASK = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question: "
)
CLASS_TEXTS = {
    "K700": "Recognize the category of the video content.",
    "SmthSmthV2": "What actions or object interactions are being performed by the person in the video?",
    "UCF101": "What activities or sports are being performed by the person in the video?",
    "HMDB51": "What actions or objects interactions are the person in the video doing?",
    "Breakfast": "Recognize the breakfast type that the person is cooking in the video. ",
}
FIND_TEXTS = {
    "DiDeMo": "Find a video that includes the following described scenes:",
    "MSR-VTT": "Find a video that contains the following visual content:",
    "MSVD": "Find the video snippet that corresponds to the given summary:",
    "VATEX": "Select a video that fits the description provided:",
    "YouCook2": "Find a video that demonstrates the following action while making a recipe:",
}


def shown(root: Path, folder: str, count: int) -> tuple[str, ...]:
    """Frames by name with numbers as numbers; evenly spaced ones where there are enough."""
    names = sorted(os.listdir(root / folder), key=lambda name: int(re.findall(r"\d+", name)[0]))
    if len(names) >= count:
        names = [names[int(place)] for place in np.linspace(0, len(names) - 1, count)]
    return tuple(f"{folder}/{name}" for name in names)


def join(instruction: str, text: str = "", token: str = "") -> str:
    prompt = f"{instruction} {text}" if text else instruction
    return f"{token} {prompt}" if token else prompt


def with_options(question: str, texts: list[str]) -> tuple[str, list[str]]:
    question += "\nOptions:\n"
    for letter, text in zip("ABCDEFGH", texts, strict=False):
        question += f"({letter}) {text}\n"
    return question.rstrip(), [f"({letter}) {text}" for letter, text in zip("ABCDEFGH", texts, strict=False)]


def reference(root: Path, name: str, rows: list[dict], layout: str, count: int):
    """([query text, images, frames, names, labels], name -> (text, frames)), tokens where the reference has them."""
    base, queries, candidates = frames_root(name, layout), [], {}

    def frames(folder: str) -> tuple[str, ...]:
        return shown(root, f"{base}/{folder}", count)

    for row in rows:
        images, video, new = (), (), []
        if KINDS[name] == "video_cls":
            text, video = join(CLASS_TEXTS[name], token=TOKEN), frames(str(row["video_id"]))
            label = row["pos_text"]
            new = [(each, each, ()) for each in row.get("neg_text", [label])]
        elif KINDS[name] == "video_ret":
            caption = next(row[column] for column in ("caption", "enCap", "sentence") if column in row)
            text = join(FIND_TEXTS[name], caption if isinstance(caption, str) else caption[0])
            label = Path(row["video"]).stem if name == "DiDeMo" else None
            label = label or row.get("video_id") or row.get("videoID") or row["id"]
            new = [(label, join("Understand the content of the provided video.", token=TOKEN), frames(label))]
        elif name == "ActivityNetQA":
            text, video = f"{TOKEN} {ASK} {row['question']}? (A) yes; (B) no.", frames(f"v_{row['video_name']}")
            label, new = row["answer"], [("yes", "yes", ()), ("no", "no", ())]
        elif name == "MVBench":
            text, options = with_options(f"{TOKEN} {ASK} {row['question']}", row["candidates"])
            video, new = frames(f"{row['subset']}/{row['video']}"), [(option, option, ()) for option in options]
            label = options[row["candidates"].index(row["answer"])]
        elif name == "NExTQA":
            options = [row[f"a{place}"] for place in range(5)]
            text, video = with_options(f"{TOKEN} {ASK} {row['question']}", options)[0], frames(str(row["video"]))
            label, new = options[row["answer"]], [(option, option, ()) for option in options]
        elif name == "Video-MME":
            options, video = row["options"], frames(row["videoID"])
            text = f"{TOKEN} {ASK} {row['question']}" + "\n" + "\n".join(options)
            label = options["ABCD".index(row["answer"])]
            new = [(option, option.partition(". ")[2].rstrip("."), ()) for option in options]
        elif name == "EgoSchema":
            options, video = row["option"], frames(row["video_idx"])
            text, label = f"{TOKEN} {ASK} {row['question']}" + " ".join(options), options[int(row["answer"])]
            new = [(option, option.partition(". ")[2].rstrip("."), ()) for option in options]
        elif name == "MomentSeeker":
            given = row["input_frames"]
            if given.endswith(".mp4"):
                instruction = "Find the clip that corresponds to the given sentence and video segment:"
                text, video = join(instruction, row["query"], TOKEN), frames(f"video_frames/{flat(given)}")
            elif given.endswith(".jpg"):
                instruction = "Select the video clip that aligns with the given text and image:"
                text, images = join(instruction, row["query"], IMAGE), (f"{base}/query_{given}",)
            else:
                text = join("Find the clip that corresponds to the given text:", row["query"])
            right = [f"video_frames/{flat(clip['output_path'])}" for clip in row["positive_frames"]]
            clips = right + [f"video_frames/{flat(clip['output_path'])}" for clip in row["negative_frames"]]
            target = join("Understand the content of the provided video clip.", token=TOKEN)
            label = [f"{base}/{clip}" for clip in right]
            new = [(f"{base}/{clip}", target, frames(clip)) for clip in clips]
        else:
            folder = Path(row["video_path"]).stem
            instruction = "Find the clip that corresponds to the described scene in the given video:"
            text, video = join(instruction, row["query"], TOKEN), frames(f"{folder}/query")
            clips = sorted(clip for clip in os.listdir(root / base / folder) if clip != "query")
            target = join("Understand the content of the provided video.", token=TOKEN)
            label = f"{base}/{folder}/{next(clip for clip in clips if clip.startswith('positive'))}"
            new = [(f"{base}/{folder}/{clip}", target, frames(f"{folder}/{clip}")) for clip in clips]
        queries.append((text, images, video, [each[0] for each in new], label))
        for each in new:
            candidates.setdefault(each[0], each[1:])
    for label in CLASSES.get(name, ()):
        candidates.setdefault(label, (label, ()))
    return queries, candidates


def flat(path: str) -> str:
    return path.replace("/", "_").removesuffix(".mp4")


def plain(text: str) -> str:
    return text.replace(TOKEN, "").replace(IMAGE, "").strip()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_as_the_reference_reads_it(tmp_path, name, layout):
    rows = make_video_task(tmp_path, name, seed=FRESH, layout=layout)
    for count in (8, 3):
        task = read_task(TASKS[name], tmp_path, num_frames=count)
        queries, candidates = reference(tmp_path, name, rows, layout, count)
        seed = f"seed {FRESH}, {count} frames"
        got = [
            (
                query.item.text,
                query.item.images,
                query.item.video,
                list(query.cand_names),
                list(query.label_names) if query.label_is_list else query.label_names[0],
            )
            for query in task.queries
        ]
        assert got == [(plain(text), *others) for text, *others in queries], seed
        assert [(each.name, each.item.text, each.item.video) for each in task.candidates] == [
            (key, plain(text), video) for key, (text, video) in candidates.items()
        ], seed
        assert not any(each.item.missing for each in (*task.queries, *task.candidates)), seed
    assert all(query.rel_scores is None for query in task.queries)


def test_specs():
    """The paper's columns, and which tasks rank all candidates."""
    names = [name for name, spec in TASKS.items() if spec.modality == "video"]
    assert names == list(KINDS) and len(TASKS) == 78
    assert [len(GROUPS[group]) for group in ("V-CLS", "V-QA", "V-RET", "V-MRET")] == [5, 5, 5, 3]
    assert {name for name in names if TASKS[name].candidates == "global"} == set(GLOBAL)
    assert {TASKS[name].metric for name in names} == {"hit@1"}


@pytest.mark.parametrize(
    "name, count, digest",
    (
        ("K700", 700, "f86e6c34187b6301eef12197c21aed5afdf749f398db41511e18f3259e9fa20a"),
        ("HMDB51", 51, "d5d503903cc4fe696ed0d9f239f5c3c5d72650f70018dff6cd18a3d375eb989e"),
        ("UCF101", 101, "acf087eb9a8e514021dde43bb0ba36ddcf2f1cec43839ba9d0181b51c95c1901"),
        ("Breakfast", 10, "bc78c1ae402dc8cc8fcf7c7e9eb0a346331cb152a5436b4dbb120549d763e093"),
    ),
)
def test_class_names(name, count, digest):
    """SHA-256 of the reference's own list, a name a line."""
    assert len(set(CLASSES[name])) == count
    assert hashlib.sha256("\n".join(CLASSES[name]).encode()).hexdigest() == digest


def test_a_class_outside_the_list_is_a_candidate_too(tmp_path):
    write_table(tmp_path / "video-tasks/HMDB51/test.jsonl", [{"video_id": "a", "pos_text": "yodel"}])
    task = read_task(TASKS["HMDB51"], tmp_path)
    assert [each.name for each in task.candidates] == ["yodel", *CLASSES["HMDB51"]]


def test_the_first_thousand_of_smthsmth(tmp_path):
    rows = [{"video_id": n, "pos_text": "a", "neg_text": ["b", "a"]} for n in range(1003)]
    write_table(tmp_path / "video-tasks/SmthSmthV2/test.jsonl", rows)
    task = read_task(TASKS["SmthSmthV2"], tmp_path)
    assert len(task.queries) == 1000 and [each.name for each in task.candidates] == ["b", "a"]
    assert task.queries[-1].item.missing == ("video-tasks/frames/video_cls/SSv2/999",)


@pytest.mark.parametrize(
    "name, folder, video",
    (
        ("K700", "clip_1", "clip_1.mp4"),
        ("MSVD", "v_1_9", "v_1_9.avi"),
        ("MVBench", "action_sequence/2.mp4", "star/Charades_v1_480/2.mp4"),
        ("ActivityNetQA", "v_1QIUV7WYKX1", "v_1QIUV7WYKX1.mp4"),
        ("QVHighlight", "video_1/query", "video_1.mp4"),
        ("MomentSeeker", "video_frames/videos_movie_0", "videos/movie/0.mp4"),
    ),
)
def test_missing_frames_are_named_and_so_is_a_video_that_is_there(tmp_path, name, folder, video):
    make_video_task(tmp_path, name, seed=FRESH)
    frames = f"{frames_root(name)}/{folder}"
    for file in (tmp_path / frames).iterdir():
        file.unlink()

    def missing() -> list[tuple[str, ...]]:
        task = read_task(TASKS[name], tmp_path)
        return [each.item.missing for each in (*task.queries, *task.candidates) if each.item.missing]

    assert missing() == [(frames,)], f"seed {FRESH}"
    path = f"{frames_root(name).replace('frames', 'videos', 1)}/{video}"
    write_file(tmp_path / path, b"")
    assert missing() == [(f"{frames} (its frames are not saved; the video is {path})",)], f"seed {FRESH}"


def test_moments_without_the_right_clip_or_without_any(tmp_path):
    """What is right is known to be missing, so that nothing is scored as a miss; several right clips all count."""
    make_video_task(tmp_path, "QVHighlight", seed=FRESH)
    frames = frames_root("QVHighlight")
    (tmp_path / frames / "video_0").rename(tmp_path / frames / "elsewhere")
    (tmp_path / frames / "video_1/positive_clip").rename(tmp_path / frames / "video_1/negative_clip_9")
    write_frames(tmp_path / frames / "video_2/positive_clip_1", 2, np.random.default_rng(FRESH))
    (tmp_path / frames / "video_1/.ipynb_checkpoints").mkdir()
    task = read_task(TASKS["QVHighlight"], tmp_path)
    gone, wrong, two = task.queries
    right = f"{frames}/video_0/positive"
    assert (gone.item.missing, gone.cand_names, gone.label_names) == ((f"{frames}/video_0/query",), (right,), (right,))
    assert len(wrong.cand_names) == 5 and wrong.label_names == (f"{frames}/video_1/positive",)
    assert {each.name for each in task.candidates if each.item.missing} == {right, *wrong.label_names}
    assert [name.rpartition("/")[2] for name in two.label_names] == ["positive_clip", "positive_clip_1"]
    assert two.label_is_list and not wrong.label_is_list


@pytest.mark.parametrize("owner", ("VLM2Vec", "OpenGVLab"))
def test_mvbench_answers_that_are_two_options_or_none(tmp_path, owner):
    for subset in SUBSETS:
        row = {"video": "v.mp4", "question": "q", "candidates": ["x", "y", "x"], "answer": "x"}
        rows = [row, row | {"answer": "z"}] if subset == SUBSETS[0] else []
        write_file(tmp_path / f"{owner}/MVBench/json/{subset}.json", json.dumps(rows).encode())
    task = read_task(TASKS["MVBench"], tmp_path)
    assert [query.label_names for query in task.queries] == [("(C) x",), ("(@) z",)]
    assert [each.name for each in task.candidates] == ["(A) x", "(B) y", "(C) x"]


def test_options_of_one_name_are_one_candidate(tmp_path):
    row = {"videoID": "v", "question": "q", "options": ["A. Yes.", "No"], "answer": "A"}
    write_table(tmp_path / "video-tasks/Video-MME/test.jsonl", [row, row | {"options": ["A. Yes.", "1.5 m. long"]}])
    task = read_task(TASKS["Video-MME"], tmp_path)
    # Without a full stop and a blank the reference keeps the last letter.
    assert [(each.name, each.item.text) for each in task.candidates] == [
        ("A. Yes.", "Yes"),
        ("No", "o"),
        ("1.5 m. long", "long"),
    ]


@pytest.mark.parametrize(
    "name, change, message",
    (
        ("Video-MME", {"answer": "E"}, "answer 'E' must be one of A, B, C, D"),
        ("NExTQA", {"answer": 5}, "answer 5 must be a whole number from 0 to 4"),
        ("EgoSchema", {"answer": "9" * 5000}, "answer '999"),
        ("EgoSchema", {"answer": None}, "answer None must be a whole number from 0 to 4"),
        ("ActivityNetQA", {"answer": "maybe"}, "answer 'maybe' must be yes or no"),
        ("HMDB51", {"pos_text": ""}, "pos_text must be a name or a number, not ''"),
        ("SmthSmthV2", {"neg_text": []}, "neg_text must be a list of at least one string"),
        ("MSVD", {"caption": [None]}, "caption must be a list of at least one string"),
        ("MSR-VTT", {"caption": 5}, "caption must be a string, not 5"),
        ("MomentSeeker", {"positive_frames": []}, "positive_frames must name at least one clip"),
        ("MomentSeeker", {"negative_frames": ["x"]}, "negative_frames must be a list of objects with output_path"),
    ),
)
def test_rows_that_cannot_be_meant(tmp_path, name, change, message):
    rows = make_video_task(tmp_path, name, seed=FRESH)
    other = tmp_path / "other"
    subset = TASKS[name].options["subset"]
    write_table(other / f"VLM2Vec/{name}/{subset or 'data'}/test.jsonl", [rows[0], rows[1] | change])
    with pytest.raises(UserError, match=re.escape(f"row 1: {message}")):
        read_task(TASKS[name], other)


@pytest.mark.parametrize("name", KINDS)
def test_annotation_that_is_not_there_names_the_places(tmp_path, name):
    owner = "lmms-lab" if name == "YouCook2" else "VLM2Vec"
    with pytest.raises(UserError, match=f"(?s){tmp_path}/video-tasks/.*{tmp_path}/{owner}/"):
        read_task(TASKS[name], tmp_path)


def test_names_that_lead_out_of_the_root_are_missing(tmp_path):
    rows = [{"video_id": "../../../../out", "pos_text": "wave"}]
    write_table(tmp_path / "root/video-tasks/HMDB51/test.jsonl", rows)
    write_frames(tmp_path / "out", 3, np.random.default_rng(0))
    item = read_task(TASKS["HMDB51"], tmp_path / "root").queries[0].item
    assert item.video == () and len(item.missing) == 1


def test_the_same_seed_gives_the_same_folders(tmp_path):
    for place in ("one", "two"):
        for name in ("MVBench", "MomentSeeker"):
            make_video_task(tmp_path / place, name, seed=FRESH)
    found = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in tmp_path.iterdir()
    ]
    assert found[0] == found[1] and len(found[0]) > 50
