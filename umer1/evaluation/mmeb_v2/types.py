"""The words of MMEB-V2: what a task is, and what its files hold once they are read."""

from dataclasses import dataclass, field
from typing import Any, Literal

Modality = Literal["image", "video", "visdoc"]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One of the 78 tasks, before any file is read."""

    name: str  # the data set's key, as the reference evaluation has it
    modality: Modality
    group: str  # column of the paper's table: I-CLS, I-QA, I-RET, I-GD, V-CLS, V-QA, V-RET, V-MRET, VDR1, VDR2, ...
    candidates: Literal["local", "global"]  # each query ranks its own names, or all of the task's
    metric: Literal["hit@1", "ndcg_linear@5"]
    layout: str  # the reader, a key of readers.READERS
    in_domain: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # folders (below the data root), subsets, texts of the layout


@dataclass(frozen=True, slots=True)
class Item:
    """What is embedded: one query or one candidate."""

    text: str  # instruction and own text, without media markers: media stand first in umer1's prompt
    images: tuple[str, ...] = ()  # paths relative to the data root
    video: tuple[str, ...] = ()  # frame paths relative to the data root, already chosen, in order
    missing: tuple[str, ...] = ()  # media that the annotation names and the disk does not have


@dataclass(frozen=True, slots=True)
class Query:
    """A query and what is right for it."""

    item: Item
    cand_names: tuple[str, ...]  # as the reference's info file has them; what it ranks where candidates are local
    label_names: tuple[str, ...]  # the right candidates; one for most tasks
    label_is_list: bool = False  # how the reference's info file writes label_name
    rel_scores: tuple[float, ...] | None = None  # graded relevance of each of label_names; None: all 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of a task's distinct candidates."""

    name: str
    item: Item


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task as read from disk."""

    spec: TaskSpec
    queries: list[Query]
    candidates: list[Candidate]  # distinct by name, in the reference's order: by first appearance, then the corpus
    fingerprint: str  # SHA-256 over the annotation files: which version of the data was scored
