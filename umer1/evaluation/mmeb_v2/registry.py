"""All 78 tasks by name, in the order of the paper's tables, and the groups that its columns average."""

import difflib
from collections.abc import Sequence

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.documents import DOCUMENT_TASKS
from umer1.evaluation.mmeb_v2.images import IMAGE_TASKS
from umer1.evaluation.mmeb_v2.types import TaskSpec
from umer1.evaluation.mmeb_v2.videos import VIDEO_TASKS

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in (*IMAGE_TASKS, *VIDEO_TASKS, *DOCUMENT_TASKS)}
MODALITIES = ("image", "video", "visdoc")

# Group -> its tasks, in the paper's order.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(spec.name for spec in TASKS.values() if spec.group == group)
    for group in dict.fromkeys(spec.group for spec in TASKS.values())
}


def select(names: Sequence[str] | None = None, modality: str | None = None) -> list[TaskSpec]:
    """The named tasks, or those of a modality, or all, in the paper's order and each once.

    UserError with near matches for names that are none, and where a named task is not of the modality.
    """
    problems = []
    if modality is not None and modality not in MODALITIES:
        problems.append(f"modality {modality!r} must be one of {', '.join(MODALITIES)}")
    for name in names or ():
        if name not in TASKS:
            problems.append(f"{name!r} is not a task of MMEB-V2{_near(name)}")
        elif modality in MODALITIES and TASKS[name].modality != modality:
            problems.append(f"{name!r} is a task of modality {TASKS[name].modality!r}, not {modality!r}")
    if problems:
        raise UserError("; ".join(problems) + f". Tasks: {', '.join(TASKS)}")
    wanted = set(names) if names else set(TASKS)
    return [spec for spec in TASKS.values() if spec.name in wanted and modality in (None, spec.modality)]


def _near(name: str) -> str:
    if "," in name:
        return " (names stand behind --tasks with blanks between them)"
    folded = {task.casefold(): task for task in TASKS}
    near = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
