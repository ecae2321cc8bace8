"""A run that goes on reads no task again that is scored, as long as its files and folders are as they were."""

import json
import os

import mmeb_folders
import numpy as np
import pytest

from umer1.data.mini_mmeb import MINI_BASE
from umer1.errors import UserError
from umer1.evaluation.command import main
from umer1.evaluation.mmeb_v2 import memory
from umer1.evaluation.mmeb_v2.memory import Memory
from umer1.evaluation.mmeb_v2.registry import TASKS

FRESH = int.from_bytes(os.urandom(4), "little")
NAMES = ["VOC2007", "MSVD", "ViDoRe_docvqa"]


@pytest.fixture
def read(monkeypatch):
    """Names of the tasks that readers were asked for, as it grows."""
    asked = []
    for layout, reader in memory.READERS.items():
        monkeypatch.setitem(
            memory.READERS, layout, lambda spec, *rest, reader=reader: asked.append(spec.name) or reader(spec, *rest)
        )
    return asked


def test_a_finished_task_is_read_again_only_where_something_changed(tmp_path, read, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    mmeb_folders.make_folders(data, NAMES, seed=FRESH)
    flags = ["--benchmark", "mmeb-v2", "--model", str(MINI_BASE), "--data-root", str(data), "--output", str(out)]

    def run(*more):
        read.clear()
        main([*flags, "--tasks", *NAMES, "--fp32", *more])
        return json.loads((out / "results.json").read_text()), list(read)

    first, _ = run()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*_*") if "results" not in path.name}
    again, looked = run()
    assert looked == [] and again == first, FRESH
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    (out / "MSVD_disc_disc_score.json").unlink()  # killed while its files were written
    assert run() == (first, ["MSVD"])
    (out / "coverage" / "VOC2007.json").write_text("{")
    assert run() == (first, ["VOC2007"])  # its coverage, which turns out as it was
    (data / "image-tasks/VOC2007/more.png").touch()  # what there is more may be what was missing
    assert run() == (first, ["VOC2007", "VOC2007"])  # its coverage, then itself
    assert run("--num-workers", "1")[1] == []
    next((data / "image-tasks/VOC2007").glob("q*.png")).unlink()
    with pytest.raises(UserError, match="media are missing in 1 of 3 tasks"):
        run()
    mmeb_folders.write_table(
        data / "visdoc-tasks/docvqa_test_subsampled_beir/qrels/test-00000-of-00001.parquet",
        [{"query-id": 0, "corpus-id": 1, "score": 1}],
    )
    with pytest.raises(UserError, match="of another version of the data"):
        main([*flags, "--tasks", "ViDoRe_docvqa", "--fp32"])


@pytest.mark.parametrize("name", ("GQA", "MVBench", "Charades-STA", "MomentSeeker", "VisRAG_PlotQA", "ViDoSeek-page"))
def test_what_a_reader_was_told_is_noticed_when_it_changes(tmp_path, name):
    """A frame more, a folder less, a better place for the annotation: each is seen, and nothing else is."""
    mmeb_folders.make_folders(tmp_path, [name], seed=FRESH)
    kept, spec = Memory(tmp_path / "out", tmp_path, 8, None), TASKS[name]
    task, coverage, seen = kept.look(spec)
    if spec.modality == "visdoc":  # pages were written: the next look is the first to be kept
        assert seen is None
        kept.keep(coverage, None)
        task, coverage, seen = kept.look(spec)
    kept.keep(coverage, seen)
    assert kept.recall(spec) == coverage and coverage.missing == 0
    assert Memory(tmp_path / "out", tmp_path, 4, None).recall(spec) is None
    media = [*(c.item for c in task.candidates), *(q.item for q in task.queries)]
    paths = [path for item in media for path in (*item.images, *item.video)]
    picture = tmp_path / paths[np.random.default_rng(FRESH).integers(len(paths))]
    content = picture.read_bytes()
    picture.unlink()
    assert kept.recall(spec) is None, f"{picture}, seed {FRESH}"
    picture.write_bytes(content)
    kept.keep(*kept.look(spec)[1:])
    assert kept.recall(spec) == coverage
    files = [*tmp_path.rglob("*.parquet")]
    place = files[FRESH % len(files)]
    os.utime(place)
    assert kept.recall(spec) is None, f"{place}, seed {FRESH}"
    kept.keep(*kept.look(spec)[1:])
    if name == "ViDoSeek-page":
        (tmp_path / "visdoc-tasks/ViDoSeek-page").rename(tmp_path / "visdoc-tasks/pages")
        mmeb_folders.make_folders(tmp_path, [name], seed=FRESH, hub=True)
        assert kept.recall(spec) is None
