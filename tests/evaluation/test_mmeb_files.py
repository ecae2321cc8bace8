"""Files of the reference evaluation, read back by its own conventions; pickles of more than arrays are refused."""

import builtins
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.reference_files import (
    ReferenceNames,
    find_reference,
    score_reference,
    write_reference_files,
)
from umer1.evaluation.mmeb_v2.safe_arrays import load_array, load_named_arrays
from umer1.evaluation.mmeb_v2.score import score_task
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec

FRESH = int.from_bytes(os.urandom(4), "little")


def unit(rng, count, dim=8):
    rows = rng.normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def graded_task(rng) -> tuple[TaskData, np.ndarray, list[str], np.ndarray]:
    names = [f"doc/{i} ü" for i in range(12)]
    queries = []
    for _ in range(9):
        labels = tuple(rng.choice(names, size=rng.integers(1, 5), replace=False).tolist())
        grades = tuple(float(g) for g in rng.integers(1, 4, len(labels)))
        queries.append(Query(Item("q"), labels, labels, True, grades))
    spec = TaskSpec("ViDoRe_docvqa", "visdoc", "VDR1", "global", "ndcg_linear@5", "vidore")
    task = TaskData(spec, queries, [Candidate(name, Item("")) for name in names], "f" * 64)
    return task, unit(rng, len(queries)), names, unit(rng, len(names))


def test_files_are_as_the_reference_reads_and_writes_them(tmp_path):
    rng = np.random.default_rng(FRESH)
    task, queries, names, targets = graded_task(rng)
    score = score_task(task, queries, names, targets)
    files = ReferenceNames(tmp_path, task.spec.name, "gen", "disc")
    write_reference_files(files, task, score, vectors=(queries, names, targets))
    found = sorted(path.name for path in tmp_path.iterdir())
    stem = "ViDoRe_docvqa"
    assert found == sorted(
        [f"{stem}_gen_qry", f"{stem}_disc_tgt"] + [f"{stem}_gen_disc_{x}" for x in ("info.jsonl", "pred.jsonl")]
        + [f"{stem}_gen_disc_score.json"]
    )  # fmt: skip
    with open(files.queries(), "rb") as file:
        np.testing.assert_array_equal(pickle.load(file), queries)
    with open(files.targets(), "rb") as file:
        named = pickle.load(file)
    assert list(named) == names and all((named[n] == t).all() for n, t in zip(names, targets, strict=True))
    infos = [json.loads(line) for line in open(files.info())]
    assert [i["label_name"] for i in infos] == [list(q.label_names) for q in task.queries]
    assert [i["rel_scores"] for i in infos] == [list(q.rel_scores) for q in task.queries]
    preds = [json.loads(line) for line in open(files.predictions())]
    for pred, row in zip(preds, queries.astype(np.float64) @ targets.astype(np.float64).T, strict=True):
        assert pred["prediction"] == [names[i] for i in np.argsort(-row)], f"seed {FRESH}"
    written = json.loads(files.scores().read_text())
    assert list(written)[:4] == ["hit@1", "hit@5", "hit@10", "ndcg_linear@1"]
    assert written == {**score.summary, "num_pred": 9, "num_data": 9}
    # and back: from the rankings, and from the vectors
    assert find_reference(tmp_path, ["MSVD", stem]) == [files]
    for unpickle in (False, True):
        assert score_reference(files, task.spec, unpickle=unpickle).summary == score.summary, f"seed {FRESH}"


def test_vectors_that_were_normalised_in_bf16_are_ranked_as_they_stand(tmp_path):
    """Their lengths are off by up to 0.25%; the reference evaluation takes dot products of them as they are."""
    rng = np.random.default_rng(FRESH)
    task, _, names, _ = graded_task(rng)
    queries, targets = (
        torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, 64))).bfloat16(), dim=1).float().numpy()
        for count in (len(task.queries), len(names))
    )
    assert np.abs(np.linalg.norm(np.concatenate([queries, targets]), axis=1) - 1).max() > 1e-3, FRESH
    files = ReferenceNames(tmp_path, task.spec.name, "gen", "gen")
    score = score_task(task, queries, names, targets, within=0.01)
    write_reference_files(files, task, score, vectors=(queries, names, targets))
    found = score_reference(files, task.spec, unpickle=True)
    for ranked, row in zip(found.predictions, queries.astype(np.float64) @ targets.astype(np.float64).T, strict=True):
        assert ranked == [names[i] for i in np.argsort(-row, kind="stable")], FRESH
    with pytest.raises(ValueError, match="norms"):
        score_task(task, queries, names, targets)


def test_names_without_modes_and_without_vectors(tmp_path):
    rng = np.random.default_rng(FRESH)
    task, queries, names, targets = graded_task(rng)
    files = ReferenceNames(tmp_path, task.spec.name, None, None)
    write_reference_files(files, task, score_task(task, queries, names, targets), vectors=None)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".jsonl", ".jsonl"]
    assert find_reference(tmp_path, [task.spec.name]) == [files]
    with pytest.raises(UserError, match="ViDoRe_docvqa_qry"):
        score_reference(files, task.spec, unpickle=True)
    with pytest.raises(UserError, match="no file of the reference evaluation"):
        find_reference(tmp_path, ["MSVD"])


@pytest.mark.parametrize(
    "line",
    ("[" * 100_000, '{"prediction": "a", "label": "a"}', *(
        f'{{"prediction": ["a"], "label": ["a"], "rel_scores": {scores}}}'
        for scores in ("7", '["x"]', "[null]", "[[1]]", "[true]", "[NaN]", "[1, 2]", "[1e999]", "[1%s]" % ("0" * 400))
    )),
)  # fmt: skip
def test_damaged_predictions_are_named(tmp_path, line):
    files = ReferenceNames(tmp_path, "MSVD", None, None)
    files.predictions().write_text(line + "\n")
    spec = TaskSpec("MSVD", "video", "V-RET", "global", "hit@1", "video_ret")
    with pytest.raises(UserError, match="MSVD_pred.jsonl"):
        score_reference(files, spec)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_arrays_of_every_protocol(tmp_path, protocol, dtype):
    rows = np.random.default_rng(FRESH).normal(size=(3, 4)).astype(dtype)
    for array in (rows, np.asfortranarray(rows)):
        (tmp_path / "a").write_bytes(pickle.dumps(array, protocol=protocol))
        np.testing.assert_array_equal(load_array(tmp_path / "a"), rows.astype(np.float32), err_msg=f"seed {FRESH}")
        (tmp_path / "d").write_bytes(pickle.dumps({"x": array[0], 7: array[1]}, protocol=protocol))
        named = load_named_arrays(tmp_path / "d")
        assert list(named) == ["x", "7"] and (named["7"] == rows[1].astype(np.float32)).all()


class Runs:
    """What a hostile file would have done on being read."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(target) -> dict[str, bytes]:
    rows = np.ones((2, 3), dtype=np.float32)
    plain = pickle.dumps(rows, protocol=4)
    return {
        "system": pickle.dumps(Runs(os.system, f"touch {target}")),
        "exec": pickle.dumps({"a": Runs(builtins.exec, f"open({str(target)!r}, 'w')")}),
        "inside an array": pickle.dumps({"a": np.array([Runs(os.system, f"touch {target}")], dtype=object)}),
        "getattr": pickle.dumps(Runs(getattr, "", "join")),
        "load of another file": pickle.dumps(Runs(np.load, str(target))),
        "objects": pickle.dumps(np.array(["a", None], dtype=object)),
        "integers": pickle.dumps(np.ones(3, dtype=np.int64)),
        "cut off": plain[:-10],
        "longer shape": plain.replace(b"K\x02K\x03", b"K\x7fK\x7f"),
        "large memo": b"\x80\x04r" + struct.pack("<I", 2**32 - 1) + b"N.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "persistent id": b"\x80\x04\x8c\x01aQ.",
        "extension": b"\x80\x02\x82\x01.",
        "set a class's name": b"\x80\x02cnumpy\ndtype\n(NX\x01\x00\x00\x00a}tb.",
        "not a pickle": b"\x93NUMPY",
        "empty": b"",
        "text": pickle.dumps("vectors"),
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_pickles_are_refused(tmp_path, name):
    target = tmp_path / "touched"
    (tmp_path / "file").write_bytes(hostile(target)[name])
    for load in (load_array, load_named_arrays):
        with pytest.raises(UserError, match=f"{tmp_path}/file"):
            load(tmp_path / "file")
    assert not target.exists()
