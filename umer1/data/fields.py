"""Fields that records of SFT and RL files share: media paths, and JSON's words for what stands there instead."""

import difflib
from typing import Any

from umer1.data.bad_samples import BadSample
from umer1.data.video_files import is_video_file

_FREE = ("id", "metadata")  # what a user may keep beside a record, as under any name that begins with _


def check_keys(where: str, record: dict[str, Any], known: tuple[str, ...]) -> None:
    """BadSample("bad_record") on a key that no reader knows: a misspelt one would lose its picture without a word."""
    unknown = [key for key in record if key not in known and key not in _FREE and not key.startswith("_")]
    if not unknown:
        return
    key = unknown[0]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    nearest = f"; did you mean {close[0]}?" if close else "."
    place = f"{where} has" if where else "there is"
    raise BadSample(
        "bad_record",
        f"{place} an unknown key {key[:80]!r}{nearest or '.'} Known are {', '.join(known)}"
        f" (and what is not read: {', '.join(_FREE)}, names with a leading _)",
    )


def image_paths(name: str, value: Any) -> tuple[str, ...]:
    """A path or a list of them; empty strings are none.  `name` is said when the form is wrong."""
    if value is None:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BadSample("bad_record", f"{name} must be a path or a list of paths")
    return tuple(path for path in paths if path)


def video_paths(name: str, value: Any) -> tuple[tuple[str, ...], ...]:
    """Each video's paths: those of its frames, or the one of a video file (umer1.data.video_files).

    A list of frame paths is one video, a list of such lists several.  The path of a video file, alone, in a list of
    such paths or in a list of its own, is one video.  Empty strings and lists are none.
    """
    if value is None or value == "":
        return ()
    rule = f"{name} must be a video file, a list of frame paths or of video files, or a list of such lists"
    if isinstance(value, str) and not is_video_file(value):
        raise BadSample("bad_record", f"{rule}; {value!r} is no video file")
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise BadSample("bad_record", f"{rule}, not {kind_of(value)}")
    if all(isinstance(item, str) for item in listed):
        paths = [path for path in listed if path]
        listed = [[path] for path in paths] if all(map(is_video_file, paths)) else [paths]
    videos = []
    for paths in listed:
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise BadSample("bad_record", rule)
        kept = tuple(path for path in paths if path)
        if len(kept) > 1 and any(map(is_video_file, kept)):
            raise BadSample("bad_record", f"{rule}; {list(kept)} mixes them in one video")
        if kept:
            videos.append(kept)
    return tuple(videos)


def kind_of(value: Any) -> str:
    """The JSON word for a value's type."""
    words = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "missing"}
    return words.get(type(value), "a number")
