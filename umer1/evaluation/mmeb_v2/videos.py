"""The 18 video tasks, and the readers of classification and retrieval.

Texts are those of the reference evaluation less its media tokens, candidates are called as there, and of a video's
saved frames evenly spaced ones are shown.  `options` of a task:
    places, subset, split   where its annotation may lie (tables.find_annotation)
    frames, videos          folders of saved frames, the first that exists counts; folder of the videos themselves
    text                    instruction before the query's own text
    id, file, caption       retrieval's columns: the candidate's name, its video file, the query's text
    limit                   the first rows that are used; all where it is not given
"""

import posixpath
from typing import Any

from umer1.evaluation.mmeb_v2.fields import name_field, numbered_rows, text_field, texts_field
from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec
from umer1.evaluation.mmeb_v2.video_classes import CLASSES
from umer1.evaluation.mmeb_v2.video_frames import frames_folder, saved_video

TARGET_TEXT = "Understand the content of the provided video."

# Task -> data set's name, folder of its frames, annotation file of the MMEB-V2 repository, instruction.
_CLASSIFICATION = {
    "K700": ("Kinetics-700", "K700", "k700", "Recognize the category of the video content."),
    "SmthSmthV2": (
        "SmthSmthV2",
        "SSv2",
        "ssv2",
        "What actions or object interactions are being performed by the person in the video?",
    ),
    "HMDB51": (
        "HMDB51",
        "HMDB51",
        "hmdb51",
        "What actions or objects interactions are the person in the video doing?",
    ),
    "UCF101": (
        "UCF101",
        "UCF101",
        "ucf101",
        "What activities or sports are being performed by the person in the video?",
    ),
    "Breakfast": (
        "Breakfast",
        "Breakfast",
        "breakfast",
        "Recognize the breakfast type that the person is cooking in the video.",
    ),
}
# Task -> columns of name, file and caption, instruction.
_RETRIEVAL = {
    "DiDeMo": ("video", "video", "caption", "Find a video that includes the following described scenes:"),
    "MSR-VTT": ("video_id", "video", "caption", "Find a video that contains the following visual content:"),
    "MSVD": ("video_id", "video", "caption", "Find the video snippet that corresponds to the given summary:"),
    "VATEX": ("videoID", "video", "enCap", "Select a video that fits the description provided:"),
    "YouCook2": (
        "id",
        "video_path",
        "sentence",
        "Find a video that demonstrates the following action while making a recipe:",
    ),
}
# Task -> subset and split of its annotation.
_QUESTIONS = {
    "MVBench": (None, "train"),
    "Video-MME": (None, "test"),
    "NExTQA": ("MC", "test"),
    "EgoSchema": ("Subset", "test"),
    "ActivityNetQA": (None, "test"),
}


def _places(dataset: str, *files: str, owner: str = "VLM2Vec") -> tuple[str, ...]:
    """The repository as downloaded, the data set's own repository beside it, the repository's annotation files."""
    own = dict.fromkeys((f"{owner}/{dataset}", f"VLM2Vec/{dataset}", dataset))
    return (f"video-tasks/{dataset}", *own, *(f"video-tasks/data/{file}.jsonl" for file in files))


_KINDS = {"V-CLS": "video_cls", "V-QA": "video_qa", "V-RET": "video_ret", "V-MRET": "video_mret"}  # folders, layouts


def _spec(name: str, group: str, *, folder: str = "", layout: str = "", **options: Any) -> TaskSpec:
    """`folder`: of the frames, where it is not called as the task; options["frames"]: where else archives have them."""
    kind = _KINDS[group]
    is_global = group == "V-RET" or (group == "V-CLS" and name in CLASSES)
    options["frames"] = (f"video-tasks/frames/{kind}/{folder or name}", *options.get("frames", ()))
    options["videos"] = f"video-tasks/videos/{kind}/{folder or name}"
    options = {"places": _places(name), "subset": None, "split": "test"} | options
    return TaskSpec(name, "video", group, "global" if is_global else "local", "hit@1", layout or kind, options=options)


def _classification(name: str, dataset: str, folder: str, file: str, text: str) -> TaskSpec:
    frames, limit = (f"video-tasks/frames/{folder}",), 1000 if name == "SmthSmthV2" else None
    return _spec(name, "V-CLS", folder=folder, places=_places(dataset, file), frames=frames, text=text, limit=limit)


def _questions(name: str, subset: str | None, split: str) -> TaskSpec:
    places = _places(name, *(["activitynetqa"] if name == "ActivityNetQA" else []))
    if name == "MVBench":
        places += ("OpenGVLab/MVBench",)  # where it was before VLM2Vec kept a copy
    frames = (f"video-tasks/frames/video_qa/{name.lower()}",)
    return _spec(name, "V-QA", places=places, subset=subset, split=split, frames=frames)


def _retrieval(name: str, *columns: str) -> TaskSpec:
    # The published archive has its maker's folders before the data set's.
    archive = f"data/ziyan/video_retrieval/{name}/frames"
    return _spec(
        name,
        "V-RET",
        places=_places(name, owner="lmms-lab" if name == "YouCook2" else "VLM2Vec"),
        subset="test_1k" if name == "MSR-VTT" else None,
        split="val" if name == "YouCook2" else "test",
        frames=(f"video-tasks/frames/video_ret/{archive}", f"video-tasks/frames/{archive}"),
        **dict(zip(("id", "file", "caption", "text"), columns, strict=True)),
    )


VIDEO_TASKS = (
    *(_classification(name, *words) for name, words in _CLASSIFICATION.items()),
    *(_questions(name, *words) for name, words in _QUESTIONS.items()),
    *(_retrieval(name, *words) for name, words in _RETRIEVAL.items()),
    _spec("QVHighlight", "V-MRET", places=_places("QVHighlight", "qvhighlight")),
    _spec(
        "Charades-STA",
        "V-MRET",
        folder="Charades_STA",
        places=_places("Charades-STA", "charades_sta"),
        frames=("video-tasks/frames/video_mret/Charades-STA",),
    ),
    _spec(
        "MomentSeeker",
        "V-MRET",
        layout="video_momentseeker",
        places=(*_places("MomentSeeker", "momentseeker_1k6", "momentseeker"), "VLM2Vec/MomentSeeker_1k8"),
    ),
)


def read_video_classes(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """Video -> class.  Candidates: the rows' classes by first appearance, then the task's others.

    SmthSmthV2 has its candidates row by row (`neg_text`, the right one among them).
    """
    options, folder, local = spec.options, frames_folder(spec, tree), spec.candidates == "local"
    annotation = tree.annotation(options["places"], subset=options["subset"], split=options["split"])
    columns = ("video_id", "pos_text", *(["neg_text"] if local else []))
    queries: list[Query] = []
    for where, row in numbered_rows(annotation, columns, limit=options["limit"]):
        video, label = name_field(row, "video_id", where), name_field(row, "pos_text", where)
        names = tuple(texts_field(row, "neg_text", where)) if local else (label,)
        item = saved_video(tree, options["text"], f"{folder}/{video}", num_frames, f"{options['videos']}/{video}.mp4")
        queries.append(Query(item, names, (label,)))
    names = dict.fromkeys(name for query in queries for name in query.cand_names)
    names |= dict.fromkeys(CLASSES.get(spec.name, ()))
    return TaskData(spec, queries, [Candidate(name, Item(name.strip())) for name in names], annotation.fingerprint)


def read_video_retrieval(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """Caption -> video.  Candidates: the rows' videos by first appearance; of several captions the first counts."""
    options, folder = spec.options, frames_folder(spec, tree)
    annotation = tree.annotation(options["places"], subset=options["subset"], split=options["split"])
    queries: list[Query] = []
    candidates: dict[str, Candidate] = {}
    for where, row in numbered_rows(annotation, (options["id"], options["caption"]), (options["file"],)):
        name, file = name_field(row, options["id"], where), row.get(options["file"])
        if options["id"] == options["file"]:  # DiDeMo knows its videos by their files
            name = posixpath.splitext(posixpath.basename(name))[0]
        file = posixpath.basename(file) if isinstance(file, str) else f"{name}.mp4"
        if name not in candidates:
            item = saved_video(tree, TARGET_TEXT, f"{folder}/{name}", num_frames, f"{options['videos']}/{file}")
            candidates[name] = Candidate(name, item)
        text = f"{options['text']} {_caption(row, options['caption'], where)}"
        queries.append(Query(Item(text.strip()), (name,), (name,)))
    return TaskData(spec, queries, list(candidates.values()), annotation.fingerprint)


def _caption(row: dict[str, Any], column: str, where: str) -> str:
    return texts_field(row, column, where)[0] if isinstance(row[column], list) else text_field(row, column, where)
