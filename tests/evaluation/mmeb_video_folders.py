"""The 18 video tasks of MMEB-V2 on disk, tiny: annotation as published and folders of saved frames.

Names of folders, files and columns are the reference evaluation's and the published archives', written out here a
second time.  Layouts: `repository` (annotation below video-tasks/NAME), `hub` (OWNER/NAME beside it) and `archive`
(the annotation files and the frame folders as the published repository's archives unpack them).
"""

import io
import json
from pathlib import Path

import numpy as np
from mmeb_folders import VIDEOS, picture, words, write_file, write_readme, write_table
from PIL import Image

LAYOUTS = ("repository", "hub", "archive")
KINDS = dict(
    zip(VIDEOS.split(), ["video_cls"] * 5 + ["video_qa"] * 5 + ["video_ret"] * 5 + ["video_mret"] * 3, strict=True)
)
# Task -> data set's name, subset, split.
DATA_SETS = {name: (name, None, "test") for name in KINDS} | {
    "K700": ("Kinetics-700", None, "test"),
    "MVBench": ("MVBench", None, "train"),
    "NExTQA": ("NExTQA", "MC", "test"),
    "EgoSchema": ("EgoSchema", "Subset", "test"),
    "MSR-VTT": ("MSR-VTT", "test_1k", "test"),
    "YouCook2": ("YouCook2", None, "val"),
}
FILES = {  # annotation files of the published repository
    "K700": "k700",
    "SmthSmthV2": "ssv2",
    "HMDB51": "hmdb51",
    "UCF101": "ucf101",
    "Breakfast": "breakfast",
    "ActivityNetQA": "activitynetqa",
    "QVHighlight": "qvhighlight",
    "Charades-STA": "charades_sta",
    "MomentSeeker": "momentseeker_1k6",
}
SUBSETS = (
    "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action "
    "object_existence object_interaction object_shuffle moving_direction action_localization scene_transition "
    "action_count moving_count moving_attribute state_change fine_grained_pose character_order egocentric_navigation "
    "counterfactual_inference"
).split()
CLASSES = {
    "K700": "archery luge waiting_in_line",
    "HMDB51": "wave ride_bike dive",
    "UCF101": "Kayaking Diving GolfSwing",
    "Breakfast": "tea pancake juice",
}


def frames_root(name: str, layout: str = "repository") -> str:
    """The folder of a task's frames below the data root."""
    kind, folder = KINDS[name], {"SmthSmthV2": "SSv2", "Charades-STA": "Charades_STA"}.get(name, name)
    if layout != "archive" or name in ("QVHighlight", "MomentSeeker"):
        return f"video-tasks/frames/{kind}/{folder}"
    if kind == "video_cls":
        return f"video-tasks/frames/{folder}"
    if kind == "video_ret":
        return f"video-tasks/frames/video_ret/data/ziyan/video_retrieval/{name}/frames"
    return f"video-tasks/frames/{kind}/{name.lower() if kind == 'video_qa' else name}"


def make_video_task(
    root: Path, name: str, *, seed: int, queries: int = 3, layout: str = "repository", negatives: int = 3
) -> list[dict]:
    """Write one task below `root`; its rows (MVBench: with their `subset`, two of the first, one of the others).

    The first saved video has 12 frames, the others 2 to 4.  negatives: clips that are wrong, of moment retrieval (9 as
    published).  The same seed gives the same bytes.
    """
    root, rng = Path(root), np.random.default_rng([seed, list(KINDS).index(name)])
    rows = video_rows(name, rng, queries, negatives)
    _write_annotation(root, name, rows, layout)
    frames = root / frames_root(name, layout)
    for number, folder in enumerate(saved_folders(name, rows, negatives)):
        write_frames(frames / folder, 12 if number == 0 else int(rng.integers(2, 5)), rng, ending=_ending(name))
    if name == "MomentSeeker":
        for row in rows:
            if row["input_frames"].endswith(".jpg"):
                write_file(frames / f"query_{row['input_frames']}", picture(rng))
    return rows


def video_rows(name: str, rng: np.random.Generator, queries: int, negatives: int) -> list[dict]:
    if name == "MVBench":
        subsets = [*SUBSETS[:1], *SUBSETS]
        return [_question(name, rng, number) | {"subset": subset} for number, subset in enumerate(subsets)]
    make = {"video_cls": _class, "video_qa": _question, "video_ret": _caption}.get(KINDS[name], _moment)
    rows = [make(name, rng, number) for number in range(queries)]
    if KINDS[name] == "video_ret":  # a second caption of the first video
        rows.append(_caption(name, rng, 0))
    if name == "MomentSeeker":
        rows = [_seeker(rng, number, negatives) for number in range(queries)]
    return rows


def saved_folders(name: str, rows: list[dict], negatives: int) -> list[str]:
    """Folders of frames that the rows need, below the task's, each once."""
    if name == "MomentSeeker":
        clips = [row[side] for row in rows for side in ("positive_frames", "negative_frames")]
        files = [row["input_frames"] for row in rows if row["input_frames"].endswith(".mp4")]
        files += [clip["output_path"] for side in clips for clip in side]
        folders = [f"video_frames/{file.replace('/', '_').removesuffix('.mp4')}" for file in files]
    elif KINDS[name] == "video_mret":
        clips = ["query", "positive_clip", *(f"negative_clip_{number}" for number in range(negatives))]
        folders = [f"{Path(row['video_path']).stem}/{clip}" for row in rows for clip in clips]
    elif name == "MVBench":
        folders = [f"{row['subset']}/{row['video']}" for row in rows]
    elif name == "DiDeMo":
        folders = [Path(row["video"]).stem for row in rows]
    elif name == "ActivityNetQA":
        folders = [f"v_{row['video_name']}" for row in rows]
    else:
        columns = ("video_id", "videoID", "video_idx", "id", "video")
        folders = [str(next(row[column] for column in columns if column in row)) for row in rows]
    return list(dict.fromkeys(folders))


def write_frames(folder: Path, count: int, rng: np.random.Generator, ending: str = "jpg") -> None:
    """frame_1 ... frame_12: natural order is not the alphabet's."""
    for number in range(1, count + 1):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(buffer, "JPEG")
        write_file(folder / f"frame_{number}.{ending}", buffer.getvalue())


def _ending(name: str) -> str:
    return "jpeg" if KINDS[name] == "video_qa" else "jpg"


def _write_annotation(root: Path, name: str, rows: list[dict], layout: str) -> None:
    dataset, subset, split = DATA_SETS[name]
    if layout == "archive" and name in FILES:
        write_table(root / f"video-tasks/data/{FILES[name]}.jsonl", rows)
        return
    folder = root / f"video-tasks/{dataset}"
    if layout == "hub":
        folder = root / ("lmms-lab" if name == "YouCook2" else "VLM2Vec") / dataset
    if name == "MVBench":
        for part in SUBSETS:
            kept = [{key: row[key] for key in row if key != "subset"} for row in rows if row["subset"] == part]
            if layout == "hub":
                write_file(folder / f"json/{part}.json", json.dumps(kept).encode())
            else:
                write_table(folder / part / f"{split}-00000-of-00001.parquet", kept)
    elif layout == "hub":
        write_table(folder / f"files/{split}.parquet", rows)
        write_readme(folder, {subset or "default": {split: f"files/{split}.parquet"}})
    else:
        write_table(folder / (subset or "data") / f"{split}-00000-of-00001.parquet", rows)


def _class(name: str, rng: np.random.Generator, number: int) -> dict:
    if name != "SmthSmthV2":
        labels = CLASSES[name].split()
        return {"video_id": f"clip_{number}", "video_path": f"{number}.mp4", "pos_text": labels[number % len(labels)]}
    names = [f"{words(rng, 2)} {number + place}" for place in range(4)]
    return {"video_id": 100 + number, "pos_text": names[0], "neg_text": [names[i] for i in rng.permutation(4)]}


def _caption(name: str, rng: np.random.Generator, number: int) -> dict:
    captions = [f"{words(rng, 4)}{' ' * int(rng.integers(0, 2))}" for _ in range(3)]
    return {
        "DiDeMo": {"video": f"test/user_{number}.avi", "caption": captions[0]},
        "MSR-VTT": {"video_id": f"video{number}", "video": f"video{number}.mp4", "caption": captions[0]},
        "MSVD": {"video_id": f"v_{number}_9", "video": f"v_{number}_9.avi", "caption": captions},
        "VATEX": {"videoID": f"v{number}_0_10", "enCap": captions, "chCap": captions[::-1]},
        "YouCook2": {"id": f"v{number}_0", "video_path": f"YouCook2/v{number}_0.mp4", "sentence": captions[0]},
    }[name]


def _question(name: str, rng: np.random.Generator, number: int) -> dict:
    question, right = f"{words(rng, 4)}?", int(rng.integers(0, 4))
    texts = [f"{words(rng, 2)} {place}" for place in range(5)]
    lettered = [f"{'ABCDE'[place]}. {text}." for place, text in enumerate(texts)]
    return {
        "MVBench": {"video": f"{number}.mp4", "question": question, "candidates": texts[:4], "answer": texts[right]},
        "Video-MME": {
            "videoID": f"y{number}",
            "question": question,
            "options": lettered[:4],
            "answer": "ABCD"[right],
            "question_id": f"{number}-1",
            "domain": "Art",
        },
        "NExTQA": {
            "video": 4000 + number,
            "question": question,
            "answer": right,
            "qid": number,
            "type": "CW",
            **{f"a{place}": text for place, text in enumerate(texts)},
        },
        "EgoSchema": {"video_idx": f"e-{number}", "question": question, "option": lettered, "answer": str(right)},
        "ActivityNetQA": {
            "video_name": f"1QIUV7WYKX{number}",
            "question": question.rstrip("?"),
            "answer": ("yes", "no")[right % 2],
        },
    }[name]


def _moment(name: str, rng: np.random.Generator, number: int) -> dict:
    return {"query": words(rng, 5), "video_path": f"/there/video_{number}.mp4", "clips_dir_path": f"/c/video_{number}"}


def _seeker(rng: np.random.Generator, number: int, negatives: int) -> dict:
    """A video, a picture or nothing beside the question; the first question has two right clips."""
    given = (f"videos/movie/{number}.mp4", f"images/movie/frame_{number}.jpg", "")[number % 3]
    clips = [f"videos/ego_{number}_{place}.00.mp4" for place in range(negatives + 2)]
    entries = [{"output_path": clip, "start_time": 0.5 * place} for place, clip in enumerate(clips)]
    right = 2 if number == 0 else 1
    sides = {"positive_frames": entries[:right], "negative_frames": entries[2:]}
    return {"query": f"{words(rng, 4)}?", "input_frames": given, **sides}
