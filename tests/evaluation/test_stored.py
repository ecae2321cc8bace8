"""Arrays of an evaluation on disk: the same bits come back, and scores follow from them alone."""

import os

import numpy as np
import pytest

from umer1.errors import UserError
from umer1.evaluation.modes import AdaptiveTiming, GenOutputs, ModeEmbeddings, TaskOutputs, score_task
from umer1.evaluation.stored import load_outputs, save_outputs

FRESH = int.from_bytes(os.urandom(4), "little")


def outputs(with_gen: bool = True, num_samples: int = 3) -> TaskOutputs:
    rng = np.random.default_rng(FRESH)

    def rows(*shape):
        values = rng.normal(size=(*shape, 6)).astype(np.float32)
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    gen = GenOutputs(
        embeddings=ModeEmbeddings(rows(20), rows(5)),
        empty_thoughts=rows(20),
        shuffled_thoughts=rows(20),
        samples=rows(20, num_samples),
        texts=["", "größer\n<gen_emb>", *["a"] * 18],
        sample_texts=[[f"{q}:{i}" for i in range(num_samples)] for q in range(20)],
        lengths=rng.integers(1, 9, 20),
        well_formed=rng.random(20) < 0.5,
        missing=rng.random(20) < 0.5,
        seconds_per_query=0.25,
    )
    task = TaskOutputs(
        metric="ndcg@5",
        labels=rng.integers(0, 5, 20),
        disc=ModeEmbeddings(rows(20), rows(5)),
        disc_seconds_per_query=0.125,
        gen=gen if with_gen else None,
        groups={"hops": [str(i % 3) for i in range(20)], "answer": [""] * 20},
    )
    if with_gen:
        task.timing = AdaptiveTiming(np.array(score_task(task)["queries"]["reasoned"], dtype=bool), 0.2)
    return task


@pytest.mark.parametrize(("with_gen", "num_samples"), [(True, 3), (True, 0), (False, 0)])
def test_scores_from_a_file_equal_those_of_the_run(tmp_path, with_gen, num_samples):
    made = outputs(with_gen, num_samples)
    save_outputs(made, tmp_path / "a" / "task.npz")
    with np.load(tmp_path / "a" / "task.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file)
    again = load_outputs(tmp_path / "a" / "task.npz")
    assert score_task(again) == score_task(made), f"seed {FRESH}"
    assert again.groups == made.groups
    if with_gen:
        assert again.gen.texts == made.gen.texts and again.gen.sample_texts == made.gen.sample_texts
        np.testing.assert_array_equal(again.gen.samples, made.gen.samples)


def test_other_labels_change_no_decision():
    """Scores follow the labels; who reasons, the calibration and the cost do not."""
    made = outputs()
    before = score_task(made)
    made.labels = (made.labels + 1 + np.random.default_rng(FRESH).integers(0, 4, 20)) % 5
    after = score_task(made)
    assert after["queries"]["reasoned"] == before["queries"]["reasoned"]
    for key in ("rule", "calibration", "reasoned", "new_tokens"):
        assert after["adaptive"][key] == before["adaptive"][key]
    for price, point in before["curve"].items():
        assert after["curve"][price]["reasoned"] == point["reasoned"]
    assert after["score"]["gen"] != before["score"]["gen"], f"seed {FRESH}"


def test_time_is_reported_for_the_decisions_it_was_taken_with():
    made = outputs()
    assert score_task(made)["seconds_per_query"] == {"disc": 0.125, "gen": 0.25, "adaptive": 0.2}
    made.timing.reasoned = ~made.timing.reasoned
    assert set(score_task(made)["seconds_per_query"]) == {"disc", "gen"}


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "task.npz"
    save_outputs(outputs(), path)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    cases = {
        "cut.npz": whole[: len(whole) // 2],
        "text.npz": b"nothing of the kind",
        "empty.npz": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "newer.npz", **{**arrays, "format": np.array(99)})
    np.savez(tmp_path / "lacking.npz", **{name: rows for name, rows in arrays.items() if name != "labels"})
    np.savez(tmp_path / "objects.npz", **{**arrays, "labels": np.array([{}], dtype=object)})
    for name in (*cases, "newer.npz", "lacking.npz", "objects.npz", "nowhere.npz"):
        with pytest.raises(UserError, match=f"{name}: not the stored outputs"):
            load_outputs(tmp_path / name)
