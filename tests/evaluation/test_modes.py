"""Scores of one task from embeddings made so that every number is known."""

import numpy as np
import pytest

from umer1.evaluation.modes import (
    GenOutputs,
    ModeEmbeddings,
    TaskOutputs,
    derangement,
    mean_over_tasks,
    reasoning_of,
    replace_thoughts,
    score_task,
    thought_similarity,
)

AXES = np.eye(4, dtype=np.float32)


def outputs(metric: str = "hit@1", with_gen: bool = True) -> TaskOutputs:
    """Four queries whose right candidates are 0..3: disc hits 0 and 1, gen hits 1 and 2, query 3 is never right."""
    gen = GenOutputs(
        embeddings=ModeEmbeddings(AXES[[1, 1, 2, 0]], AXES),
        empty_thoughts=AXES[[1, 0, 0, 0]],
        shuffled_thoughts=AXES[[0, 1, 2, 3]],
        samples=AXES[[[0, 0], [1, 0], [0, 0], [0, 0]]],
        texts=["one", "two", "three", "four"],
        sample_texts=[["a", "b"], ["a", "b"], ["c", "c"], ["d", "d"]],
        lengths=np.array([3, 5, 4, 4]),
        well_formed=np.array([True, True, True, False]),
        missing=np.array([False, False, False, True]),
        seconds_per_query=2.0,
    )
    return TaskOutputs(
        metric=metric,
        labels=np.arange(4),
        disc=ModeEmbeddings(AXES[[0, 1, 0, 0]], AXES),
        disc_seconds_per_query=0.5,
        gen=gen if with_gen else None,
        groups={"hops": ["0", "0", "1", ""]},
    )


def test_modes_oracle_and_splits():
    result = score_task(outputs())
    assert result["queries"] == {
        "disc": [1, 1, 0, 0],
        "gen": [0, 1, 1, 0],
        "oracle": [1, 1, 1, 0],
        "adaptive": [1, 1, 0, 0],  # all are probes: both lists fused, equal ones in candidate order
        "reasoned": [1, 1, 1, 1],
        "response": ["one", "two", "three", "four"],
    }
    values = {name: entry["value"] for name, entry in result["score"].items()}
    assert (values.pop("adaptive"), values.pop("fused")) == (0.5, 0.5)
    assert values == {"disc": 0.5, "gen": 0.5, "oracle": 0.75, "empty_thoughts": 0.0, "shuffled_thoughts": 1.0}
    assert result["adaptive"]["new_tokens"]["value"] == 4.0 and result["adaptive"]["oracle_reasoned"]["value"] == 0.25
    assert {k: entry["value"] for k, entry in result["self_consistency"].items()} == {"1": 0.375, "2": 0.25}
    assert result["pass@k"]["1"]["value"] == pytest.approx((1.0 + 0.5) / 4)
    assert result["pass@k"]["2"]["value"] == pytest.approx(2 / 4)
    assert set(result["pass@k"]) == {"1", "2"}
    hops = {
        group: (entry["disc"]["value"], entry["gen"]["value"], entry["gen"]["n"])
        for group, entry in result["splits"]["hops"].items()
    }
    assert hops == {"0": (1.0, 0.5, 2), "1": (0.0, 1.0, 1)}
    responses = {name: entry["value"] for name, entry in result["responses"].items()}
    assert responses == {
        "response_length": 4.0,
        "format_rate": 0.75,
        "missing_gen_emb": 0.25,
        "thought_cosine": 0.5,  # query 0 agrees (1.0), query 1 is orthogonal (0.0), the others repeat themselves
        "distinct_thoughts": 0.5,
    }


def test_documents_are_scored_by_ndcg_and_hit():
    result = score_task(outputs("ndcg@5"))
    # Query 0 in gen: candidate 1 first, then 0, 2, 3 at equal similarity in candidate order: the label is second.
    second, fourth = 1 / np.log2(3), 1 / np.log2(5)
    assert result["score"]["gen"]["value"] == pytest.approx((second + 1 + 1 + fourth) / 4)
    assert result["hit@1"]["gen"]["value"] == 0.5
    with pytest.raises(ValueError, match="recall"):
        score_task(outputs("recall"))


def test_mean_over_tasks_keeps_what_only_some_tasks_have():
    first, second = score_task(outputs()), score_task(outputs())
    second["score"]["disc"] = {"value": 0.0, "stderr": 0.0, "n": 4}
    second["splits"] = {}
    mean = mean_over_tasks({"a": first, "b": second})
    assert mean["score"]["disc"]["value"] == 0.25
    assert mean["score"]["disc"]["stderr"] == pytest.approx(first["score"]["disc"]["stderr"] / 2)
    assert mean["splits"]["hops"]["0"]["disc"]["value"] == 1.0
    assert mean["seconds_per_query"] == {"disc": 0.5, "gen": 2.0}


def test_thoughts_are_replaced_and_the_summary_kept():
    response = "<think>red to blue</think><answer>blue 4<gen_emb>"
    assert reasoning_of(response) == "red to blue"
    assert replace_thoughts(response, "") == "<think></think><answer>blue 4<gen_emb>"
    assert replace_thoughts(response, "x\ny") == "<think>x\ny</think><answer>blue 4<gen_emb>"
    assert replace_thoughts("no thoughts<gen_emb>", "x") == "no thoughts<gen_emb>"


@pytest.mark.parametrize("size", [2, 3, 17])
def test_derangement_never_gives_a_query_its_own(size):
    other = derangement(size, seed=3)
    assert sorted(other) == list(range(size))
    assert (other != np.arange(size)).all()
    assert (other == derangement(size, seed=3)).all()


def test_no_distinct_thoughts_means_no_cosine():
    cosines, shares = thought_similarity(AXES[[[0, 0]]], [["same", "same"]])
    assert cosines.size == 0 and shares.tolist() == [0.0]


def test_disc_alone_has_no_gen_numbers():
    result = score_task(outputs(with_gen=False))
    assert set(result["score"]) == {"disc"}
    assert result["score"]["disc"]["value"] == 0.5
    assert set(result["splits"]["hops"]["0"]) == {"disc"}
    assert "pass@k" not in result and result["seconds_per_query"] == {"disc": 0.5}
