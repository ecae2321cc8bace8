"""Moment retrieval: a description and the whole video -> the clip of it, among the clips cut out of that video."""

import posixpath
from typing import Any

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.fields import name_field, numbered_rows, text_field
from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec
from umer1.evaluation.mmeb_v2.video_frames import frames_folder, saved_video

QUERY_TEXT = "Find the clip that corresponds to the described scene in the given video:"
TARGET_TEXT = "Understand the content of the provided video."

SEEKER_TEXT = "Find the clip that corresponds to the given text:"
SEEKER_IMAGE = "Select the video clip that aligns with the given text and image:"
SEEKER_VIDEO = "Find the clip that corresponds to the given sentence and video segment:"
SEEKER_TARGET = "Understand the content of the provided video clip."


def read_moments(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """QVHighlight and Charades-STA.  Columns: query, video_path.

    The frames' folder of a video holds `query` (the whole video) and one folder a clip, the right one's name beginning
    with `positive`.  Clips are called by their folders, relative to the data root, in natural order; the reference
    evaluation has absolute paths in the disk's order.  Hidden folders (.ipynb_checkpoints) are no clips.  A video
    without a right clip has one that is missing.
    """
    options, frames = spec.options, frames_folder(spec, tree)
    annotation = tree.annotation(options["places"], subset=options["subset"], split=options["split"])
    queries: list[Query] = []
    candidates: dict[str, Candidate] = {}
    for where, row in numbered_rows(annotation, ("query", "video_path")):
        file = posixpath.basename(name_field(row, "video_path", where))
        folder = f"{frames}/{posixpath.splitext(file)[0]}"
        names = [f"{folder}/{clip}" for clip in tree.folders(folder) if clip != "query" and clip[0] != "."]
        right = [name for name in names if posixpath.basename(name).startswith("positive")]
        if not right:
            right = [f"{folder}/positive"]
            names += right
        for name in names:
            if name not in candidates:
                candidates[name] = Candidate(name, saved_video(tree, TARGET_TEXT, name, num_frames))
        text = f"{QUERY_TEXT} {text_field(row, 'query', where)}"
        item = saved_video(tree, text, f"{folder}/query", num_frames, f"{options['videos']}/{file}")
        queries.append(Query(item, tuple(names), tuple(right), label_is_list=len(right) > 1))
    return TaskData(spec, queries, list(candidates.values()), annotation.fingerprint)


def read_momentseeker(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """MomentSeeker.  Columns: query, input_frames (a video, a picture or neither), positive_frames and negative_frames
    (lists of {output_path}).  Its clips are saved with 8 frames, of which the reference evaluation shows all.
    """
    options, frames = spec.options, frames_folder(spec, tree)
    annotation = tree.annotation(options["places"], subset=options["subset"], split=options["split"])
    queries: list[Query] = []
    candidates: dict[str, Candidate] = {}
    for where, row in numbered_rows(annotation, ("query", "input_frames", "positive_frames", "negative_frames")):
        right, wrong = (_clips(row, column, where) for column in ("positive_frames", "negative_frames"))
        if not right:
            raise UserError(f"{where}: positive_frames must name at least one clip")
        videos = {_clip_folder(frames, file): file for file in (*right, *wrong)}
        for name, file in videos.items():
            if name not in candidates:
                item = saved_video(tree, SEEKER_TARGET, name, num_frames, f"{options['videos']}/{file}")
                candidates[name] = Candidate(name, item)
        names, labels = (tuple(_clip_folder(frames, file) for file in files) for files in ((*right, *wrong), right))
        queries.append(
            Query(_seeker_query(spec, tree, frames, row, where, num_frames), names, labels, label_is_list=True)
        )
    return TaskData(spec, queries, list(candidates.values()), annotation.fingerprint)


def _seeker_query(
    spec: TaskSpec, tree: MediaTree, frames: str, row: dict[str, Any], where: str, num_frames: int
) -> Item:
    text, given = text_field(row, "query", where), text_field(row, "input_frames", where)
    if given.endswith(".mp4"):
        video = f"{spec.options['videos']}/{given}"
        return saved_video(tree, f"{SEEKER_VIDEO} {text}", _clip_folder(frames, given), num_frames, video)
    if given.endswith(".jpg"):
        return tree.image_item(f"{SEEKER_IMAGE} {text}", [f"{frames}/query_{given}"])
    return Item(f"{SEEKER_TEXT} {text}".strip())


def _clip_folder(frames: str, file: str) -> str:
    return f"{frames}/video_frames/{file.split('.mp4')[0].replace('/', '_')}"


def _clips(row: dict[str, Any], column: str, where: str) -> list[str]:
    clips = row[column]
    if not isinstance(clips, list) or not all(isinstance(clip, dict) and "output_path" in clip for clip in clips):
        raise UserError(f"{where}: {column} must be a list of objects with output_path, not {clips!r:.80}")
    return [name_field(clip, "output_path", f"{where}, {column}") for clip in clips]
