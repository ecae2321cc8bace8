"""Rules that settings of many sections share.  Each broken one is a violation beside the others, whatever a path is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def bound_problems(settings: Any, least: int, *names: str) -> list[str]:
    """The violations of those settings that are numbers below `least`; None is no number."""
    values = {name: getattr(settings, name) for name in names}
    return [
        f"{name}={value} must be {least} or above"
        for name, value in values.items()
        if value is not None and value < least
    ]


def cannot_be_looked_at(place: object, error: OSError) -> str:
    """What is said of a path that the system refuses to look at: in a closed folder, with too long a name."""
    return f"{place} cannot be looked at: {error.strerror or error}"


def path_problems(name: str, path: str | Path | None, fits: Callable[[Path], bool], rule: str) -> list[str]:
    """[] or the one violation of the setting `name`: `rule` where `fits` is False, or why it could not be asked.

    Without a path there is none.
    """
    try:
        return [] if not path or fits(Path(path)) else [f"{name}={path} {rule}"]
    except OSError as error:
        return [cannot_be_looked_at(f"{name}={path}", error)]


def data_root_problems(path: str | Path | None) -> list[str]:
    """The rule of every `data_root`."""
    return path_problems(
        "data_root", path, Path.is_dir, "is not a directory; give the folder that media paths start at"
    )


def same_place(first: str | Path, second: str | Path) -> bool:
    """Whether two paths, which need not exist, lead to the same place; one that cannot be followed leads to itself."""
    return os.path.realpath(first) == os.path.realpath(second)
