"""Indexes that are kept beside large files: as good as new ones, and never those of another file."""

import json
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from umer1.data import index_cache
from umer1.data.index_cache import content_digest, index_path, open_index
from umer1.data.indexing import index_file

KEYS = ("dataset_name",)


@pytest.fixture(params=["list", "lines"])
def path(request, tmp_path, monkeypatch):
    """A file that counts as large."""
    monkeypatch.setattr(index_cache, "KEPT_BYTES", 1000)
    records = [{"dataset_name": f"set {place % 3} \u00e9", "text": "x" * (place % 50)} for place in range(400)]
    path = tmp_path / "pairs.json"
    if request.param == "list":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def same(got, want) -> bool:
    arrays = all((getattr(got, name) == getattr(want, name)).all() for name in ("starts", "lengths", "name_ids"))
    return arrays and got.names == want.names


def test_the_second_time_nothing_is_read(path, monkeypatch):
    assert same(open_index(path, KEYS), index_file(path, KEYS)) and index_path(path).exists()
    want = index_file(path, KEYS)
    monkeypatch.setattr(index_cache, "index_file", None)
    assert same(open_index(path, KEYS), want)


def test_small_files_leave_nothing_behind(path, monkeypatch):
    monkeypatch.setattr(index_cache, "KEPT_BYTES", 10**6)
    open_index(path, KEYS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("fault", ["grown", "touched", "other keys", "truncated", "no archive", "other arrays"])
def test_an_index_that_does_not_fit_is_made_anew(path, fault):
    open_index(path, KEYS)
    keys = KEYS
    if fault == "grown":
        text = path.read_text()
        path.write_text(text.replace("x]", "y]") if text.startswith("[") else text + '{"dataset_name": "new"}\n')
        os.utime(path, ns=(1, 1))
    elif fault == "touched":
        path.write_text(path.read_text().replace("set 1", "tes 1"))
    elif fault == "other keys":
        keys = ("text",)
    elif fault == "truncated":
        index_path(path).write_bytes(index_path(path).read_bytes()[:-300])
    elif fault == "no archive":
        index_path(path).write_text("not an archive")
    else:
        with np.load(index_path(path)) as file:
            arrays = dict(file)
        arrays["starts"] = arrays["starts"][:-1]
        with open(index_path(path), "wb") as file:
            np.savez(file, **arrays)
    assert same(open_index(path, keys), index_file(path, keys))
    assert same(open_index(path, keys), index_file(path, keys))


def test_a_folder_that_cannot_be_written_costs_time_alone(path, monkeypatch, capsys):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_cache, "atomic_path", refuse)
    assert same(open_index(path, KEYS), index_file(path, KEYS))
    assert "cannot be kept beside it: Permission denied" in capsys.readouterr().err


def opened(path, kept: int) -> int:
    index_cache.KEPT_BYTES = kept
    return len(open_index(path, KEYS).starts)


def test_several_processes_at_once(path):
    with ProcessPoolExecutor(4) as processes:
        found = list(processes.map(opened, [path] * 8, [1000] * 8))
    assert found == [400] * 8
    assert sorted(entry.name for entry in path.parent.iterdir()) == [index_path(path).name, path.name]


def test_a_digest_sees_a_changed_byte_of_a_small_file(path):
    before = content_digest(path, index_file(path, KEYS))
    assert before == content_digest(path, index_file(path, KEYS))
    text = path.read_text()
    place = text.rindex("x")
    path.write_text(text[:place] + "y" + text[place + 1 :])
    assert content_digest(path, index_file(path, KEYS)) != before
