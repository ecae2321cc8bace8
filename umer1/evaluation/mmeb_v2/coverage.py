"""What of a task can be scored: media that are missing, what has to be left out without them, and the message."""

from collections import Counter
from dataclasses import dataclass, field, replace

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.types import Query, TaskData, TaskSpec
from umer1.evaluation.report import table

_EXAMPLES = 3  # paths that a message names of each task
MISSING_MEDIA = "missing_media"
NO_RIGHT_CANDIDATE = "no_right_candidate"


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of a task that is scored."""

    task: TaskData  # less what was left out
    numbers: list[int]  # of the task's queries: which ones are kept, ascending
    left_out_queries: dict[str, int]  # cause -> count
    left_out_candidates: dict[str, int]


@dataclass(frozen=True, slots=True)
class Coverage:
    """A task's data as far as it can be told without a model."""

    task: str
    queries: int = 0  # of the annotation
    candidates: int = 0
    kept_queries: int = 0
    kept_candidates: int = 0
    missing: int = 0  # distinct media that the annotation names and the disk does not have
    examples: tuple[str, ...] = ()
    left_out_queries: dict[str, int] = field(default_factory=dict)
    left_out_candidates: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    unreadable: str | None = None  # why the annotation cannot be read


def leave_out(
    task: TaskData,
    lost_queries: dict[int, str],
    lost_candidates: dict[str, str],
    max_queries: int | None = None,
) -> Kept:
    """The task without what is lost (query number or candidate name -> cause).

    Lost candidates leave the pools and the labels; a query that has no right candidate, or none any more, is left out.
    Where candidates are local, those that no query names any more go, too.  max_queries: of the task's first ones.
    """
    numbers, queries, causes = [], [], Counter()
    for number, query in enumerate(task.queries[:max_queries]):
        kept = _without(query, lost_candidates) if lost_candidates else query
        if number in lost_queries:
            causes[lost_queries[number]] += 1
        elif not kept.label_names:
            causes[NO_RIGHT_CANDIDATE] += 1
        else:
            numbers.append(number)
            queries.append(kept)
    candidates = [candidate for candidate in task.candidates if candidate.name not in lost_candidates]
    if task.spec.candidates == "local":
        named = {name for query in queries for name in query.cand_names}
        candidates = [candidate for candidate in candidates if candidate.name in named]
    left_out = dict(Counter(lost_candidates.values()))
    return Kept(replace(task, queries=queries, candidates=candidates), numbers, dict(causes), left_out)


def _without(query: Query, lost: dict[str, str]) -> Query:
    if lost.keys().isdisjoint(query.cand_names) and lost.keys().isdisjoint(query.label_names):
        return query
    places = [place for place, name in enumerate(query.label_names) if name not in lost]
    return replace(
        query,
        cand_names=tuple(name for name in query.cand_names if name not in lost),
        label_names=tuple(query.label_names[place] for place in places),
        rel_scores=None if query.rel_scores is None else tuple(query.rel_scores[place] for place in places),
    )


def without_missing(task: TaskData, max_queries: int | None = None) -> Kept:
    """`leave_out` of what the disk does not have."""
    queries = {number: MISSING_MEDIA for number, query in enumerate(task.queries) if query.item.missing}
    candidates = {item.name: MISSING_MEDIA for item in task.candidates if item.item.missing}
    return leave_out(task, queries, candidates, max_queries)


def cover(task: TaskData, max_queries: int | None = None) -> Coverage:
    """Counts of one task."""
    items = [query.item for query in task.queries] + [candidate.item for candidate in task.candidates]
    missing = dict.fromkeys(path for item in items for path in item.missing)
    kept = without_missing(task, max_queries)
    return Coverage(
        task=task.spec.name,
        queries=len(task.queries),
        candidates=len(task.candidates),
        kept_queries=len(kept.task.queries),
        kept_candidates=len(kept.task.candidates),
        missing=len(missing),
        examples=tuple(missing)[:_EXAMPLES],
        left_out_queries=kept.left_out_queries,
        left_out_candidates=kept.left_out_candidates,
        fingerprint=task.fingerprint,
    )


def check_coverage(covered: list[Coverage], *, allow_missing: bool) -> None:
    """UserError about all tasks that cannot be read, lack media, or have nothing left to be scored."""
    lines = [f"  {entry.task}: {entry.unreadable}" for entry in covered if entry.unreadable]
    if lines:
        raise UserError(f"the data of {len(lines)} of {len(covered)} tasks cannot be read:\n" + "\n".join(lines))
    partial = [entry for entry in covered if entry.missing]
    if partial and not allow_missing:
        raise UserError(
            f"media are missing in {len(partial)} of {len(covered)} tasks; put them in place, name other --tasks, or "
            "leave them out and have them counted by --allow-missing:\n" + "\n".join(map(_missing_line, partial))
        )
    empty = [entry.task for entry in covered if not entry.kept_queries or not entry.kept_candidates]
    if empty:
        raise UserError(f"nothing can be scored of {', '.join(empty)}: no query has its media and a right candidate")


def _missing_line(entry: Coverage) -> str:
    def count(causes: dict[str, int], total: int, what: str) -> str:
        return f"{sum(causes.values()):,} of {total:,} {what}"

    files = f"{entry.missing:,} file{'s' if entry.missing > 1 else ''}, e.g. {', '.join(entry.examples)}"
    queries = count(entry.left_out_queries, entry.queries, "queries")
    return f"  {entry.task}: {queries} and {count(entry.left_out_candidates, entry.candidates, 'candidates')}; {files}"


def coverage_report(covered: list[Coverage], specs: list[TaskSpec]) -> str:
    """A line a task: what is there, what is not, and which version of the data it is."""
    rows = []
    for spec, entry in zip(specs, covered, strict=True):
        numbers = (entry.queries, entry.candidates, entry.missing, sum(entry.left_out_queries.values()))
        state = "unreadable" if entry.unreadable else "incomplete" if entry.missing else "complete"
        rows.append([spec.name, spec.group, *(f"{number:,}" for number in numbers), state, entry.fingerprint[:12]])
    headers = ["task", "group", "queries", "candidates", "media missing", "queries lost", "state", "version"]
    return table(headers, rows)
