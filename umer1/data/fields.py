"""Fields that records of SFT and RL files share: media paths, and the JSON words for what stands there instead."""

from typing import Any

from umer1.data.bad_samples import BadSample


def image_paths(name: str, value: Any) -> tuple[str, ...]:
    """A path or a list of them; empty strings are none.  `name` is said when the form is wrong."""
    if value is None:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BadSample("bad_record", f"{name} must be a path or a list of paths")
    return tuple(path for path in paths if path)


def video_paths(name: str, value: Any) -> tuple[tuple[str, ...], ...]:
    """A list of frame paths is one video, a list of such lists several; empty strings and lists are none."""
    if value is None or value == "":
        return ()
    if not isinstance(value, list):
        raise BadSample("bad_record", f"{name} must be a list of frame paths, not {kind_of(value)}")
    several = [value] if all(isinstance(item, str) for item in value) else value
    videos = []
    for frames in several:
        if not isinstance(frames, list) or not all(isinstance(path, str) for path in frames):
            raise BadSample("bad_record", f"{name} must be a list of frame paths, or a list of such lists")
        kept = tuple(path for path in frames if path)
        if kept:
            videos.append(kept)
    return tuple(videos)


def kind_of(value: Any) -> str:
    """The JSON word for a value's type."""
    words = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "missing"}
    return words.get(type(value), "a number")
