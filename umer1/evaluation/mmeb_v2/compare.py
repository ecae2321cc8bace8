"""Results of several MMEB-V2 evaluations under each other: by the paper's columns and by task, and what changed."""

from collections.abc import Mapping
from typing import Any

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.published import COLUMNS
from umer1.evaluation.mmeb_v2.registry import GROUPS
from umer1.evaluation.report import percent, table
from umer1.evaluation.retrieval import mean_of_estimates

Row = dict[str, dict[str, float]]  # result -> estimate


def compare_mmeb(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Row]]:
    """(tables, column -> estimates) of name -> content of results.json; the tasks are those that all of them have.

    UserError where one of these was scored on other data or other queries, or where there is none.
    """
    (first_name, first), *others = results.items()
    tasks = [task for task in first["tasks"] if all(task in result["tasks"] for _, result in others)]
    if not tasks:
        raise UserError(f"no task stands in all of {', '.join(results)}: nothing can be compared")
    for name, result in others:
        unlike = [task for task in tasks if not _same_queries(first["tasks"][task], result["tasks"][task])]
        if unlike:
            raise UserError(
                f"{name} was scored on other queries or another version of the data than {first_name} in "
                f"{', '.join(unlike)}: score both on the same data"
            )
    by_task = {task: {name: _estimate(result["tasks"][task]) for name, result in results.items()} for task in tasks}
    by_column = _columns(by_task)
    header = [*results, *(f"{name} - {first_name}" for name, _ in others)]
    scoring = [result.get("scoring", "") for result in results.values()]
    blocks = [
        table(["modes: query-target", *results], [["", *scoring]]),
        table(["column", *header], [[column, *_cells(row)] for column, row in by_column.items()]),
        table(
            ["task", "metric", "queries", *header],
            [
                [task, first["tasks"][task]["metric"], f"{first['tasks'][task]['num_queries']:,}", *_cells(row)]
                for task, row in by_task.items()
            ],
        ),
    ]
    for name, result in results.items():
        alone = [task for task in result["tasks"] if task not in by_task]
        blocks += [f"of {name} alone, left out: {', '.join(alone)}"] if alone else []
        blocks += [f"note of {name}: {note}" for note in result.get("notes", [])]
    return "\n\n".join(blocks), by_column


def _same_queries(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Rankings of the reference evaluation name no version and no coverage: then the number of queries has to do."""
    if any(one[key] != other[key] for key in ("metric", "num_queries")):
        return False
    return all(one[key] == other[key] for key in ("data_fingerprint", "coverage") if one.get(key) and other.get(key))


def _estimate(entry: Mapping[str, Any]) -> dict[str, float]:
    return {"value": entry["score"], "stderr": entry["stderr"], "n": entry["num_queries"]}


def _columns(by_task: Mapping[str, Row]) -> dict[str, Row]:
    """The paper's columns as plain means over their tasks that are there; the name says where some are not."""
    found = {}
    for column, groups in COLUMNS.items():
        names = [name for group in groups for name in GROUPS[group]]
        there = [by_task[name] for name in names if name in by_task]
        if there:
            label = column if len(there) == len(names) else f"{column} ({len(there)} of {len(names)} tasks)"
            found[label] = {result: mean_of_estimates([row[result] for row in there]) for result in there[0]}
    return found


def _cells(row: Row) -> list[str]:
    first, *others = row.values()
    changes = [f"{100 * (entry['value'] - first['value']):+.1f}" for entry in others]
    return [*(percent(entry) for entry in row.values()), *changes]
