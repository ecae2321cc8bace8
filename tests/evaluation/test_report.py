"""Tables, plots and comparisons of results that were made by the scoring code itself."""

import json
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from umer1.errors import UserError
from umer1.evaluation.compare import changes, compare
from umer1.evaluation.compare import main as compare_main
from umer1.evaluation.curves import plot_training, read_metrics
from umer1.evaluation.mmeb_v2.registry import GROUPS, TASKS
from umer1.evaluation.mmeb_v2.results import make_results, task_entry, write_results
from umer1.evaluation.mmeb_v2.score import TaskScore
from umer1.evaluation.modes import GenOutputs, ModeEmbeddings, TaskOutputs, mean_over_tasks, score_task
from umer1.evaluation.report import evaluation_report, table, write_evaluation


def result(seed: int, with_gen: bool = True, fingerprint: str = "f") -> dict:
    rng = np.random.default_rng(seed)

    def rows(*shape):
        values = rng.normal(size=(*shape, 8)).astype(np.float32)
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    tasks = {}
    for name, metric in (("img", "hit@1"), ("doc", "ndcg@5")):
        gen = GenOutputs(
            embeddings=ModeEmbeddings(rows(10), rows(6)),
            empty_thoughts=rows(10),
            shuffled_thoughts=rows(10),
            samples=rows(10, 4),
            texts=["a"] * 10,
            sample_texts=[[str(i) for i in range(4)]] * 10,
            lengths=rng.integers(3, 9, 10),
            well_formed=rng.random(10) < 0.5,
            missing=np.zeros(10, dtype=bool),
            seconds_per_query=0.01,
        )
        tasks[name] = score_task(
            TaskOutputs(
                metric=metric,
                labels=rng.integers(0, 6, 10),
                disc=ModeEmbeddings(rows(10), rows(6)),
                disc_seconds_per_query=0.002,
                gen=gen if with_gen else None,
                groups={"hops": [str(i % 3) for i in range(10)]},
            )
        )
    return {
        "benchmark": "mini",
        "data_fingerprint": fingerprint,
        "tasks": tasks,
        "mean": mean_over_tasks(tasks),
    }


def test_table_aligns_columns():
    assert table(["a", "number"], [["long name", "1"], ["b", "22.5"]]).splitlines() == [
        "a          number",
        "---------  ------",
        "long name       1",
        "b            22.5",
    ]


def test_report_shows_the_numbers_of_the_result(tmp_path):
    made = result(0)
    write_evaluation(made, tmp_path)
    text = (tmp_path / "results.txt").read_text()
    gen = made["tasks"]["doc"]["score"]["gen"]
    assert f"{100 * gen['value']:.1f} ±{100 * gen['stderr']:.1f}" in text
    for words in ("ndcg@5", "k=4", "by hops", "gen, shuffled", "mean", "ms gen", "always disc", "mean of k"):
        assert words in text
    assert json.loads((tmp_path / "results.json").read_text()) == made
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG" and picture.width > 600


def test_compare_puts_models_side_by_side(tmp_path):
    one, two = result(0), result(1, with_gen=False)
    text = compare({"umer1": one, "dume": two}, tmp_path / "compare.png")
    scores, hits, samples, responses = text.split("\n\n")
    lines = scores.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        ["umer1", "disc"],
        ["umer1", "gen"],
        ["umer1", "oracle"],
        ["umer1", "adaptive"],
        ["dume", "disc"],
    ]
    assert f"{100 * two['mean']['score']['disc']['value']:.1f}" in lines[-1]
    assert "dume" not in hits + samples + responses  # it was run in disc mode alone
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.format == "PNG"
    assert "-" in evaluation_report(two)


def test_compare_before_and_after():
    """Per task: gen hit@1 and its paired change, pass@k, and the responses, the two models under each other."""
    before, after = result(0), result(1)
    _, hits, samples, responses = compare({"sft": before, "grpo": after}).split("\n\n")
    doc = [model["tasks"]["doc"] for model in (before, after)]
    change = np.array(doc[1]["queries"]["gen"]) - np.array(doc[0]["queries"]["gen"])
    entry = changes(before, after, "gen")["doc"]
    assert entry == {"value": change.mean(), "stderr": change.std(ddof=1) / 10**0.5, "n": 10}
    assert doc[1]["hit@1"]["gen"]["value"] - doc[0]["hit@1"]["gen"]["value"] == pytest.approx(entry["value"])
    last = hits.splitlines()[-1]
    assert last.startswith("grpo - sft") and f"{100 * entry['value']:+.1f} ±{100 * entry['stderr']:.1f}" in last
    assert [line.split()[:2] for line in samples.splitlines()[2:]] == [
        [task, model] for task in ("img", "doc", "mean") for model in ("sft", "grpo")
    ]
    assert f"{100 * doc[1]['pass@k']['4']['value']:.1f}" in samples.splitlines()[5]
    assert (
        "tokens" in responses and f"{doc[0]['responses']['thought_cosine']['value']:.3f}" in responses.splitlines()[4]
    )
    del before["tasks"]["img"]["queries"]  # written by an older version
    assert changes(before, after, "gen") is None and "grpo - sft" not in compare({"sft": before, "grpo": after})


def test_compare_says_where_inputs_had_another_shape():
    one, two = result(1), result(1)
    assert "inputs differ" not in compare({"a": one, "b": two})
    one["inputs"] = {"image_max_pixels": 1568, "num_frames": 8}
    assert "inputs differ" not in compare({"a": one, "b": two})  # an older version's, which did not say
    two["inputs"] = {"image_max_pixels": 65536, "num_frames": 8}
    assert compare({"a": one, "b": two}).endswith("inputs differ: image_max_pixels 1568 (a) and 65536 (b)")


def test_compare_refuses_results_on_other_queries():
    with pytest.raises(UserError, match="b was scored on other queries than a"):
        compare({"a": result(0), "b": result(0, fingerprint="other")})


def mmeb_result(scores: dict[str, float], version: str = "v", queries: int = 100) -> dict:
    """results.json of `umer1 eval --benchmark mmeb-v2` with these tasks; task -> share of 100 queries that hit."""
    entries = {}
    for task, share in scores.items():
        hits = np.arange(queries) < share * queries
        score = TaskScore({TASKS[task].metric: hits}, {}, [])
        entries[task] = task_entry(TASKS[task], score, fingerprint=version)
    return make_results(entries, scoring="gen-gen", about={"notes": []})


def test_compare_mmeb_by_modality_and_task(tmp_path, capsys):
    """From the files: the columns that tasks in common make, their parts named, and the differences in points."""
    grounding = dict.fromkeys(GROUPS["I-GD"], 0.5)
    before = mmeb_result({**grounding, "K700": 0.25, "VisRAG_ChartQA": 0.5})
    after = mmeb_result({**grounding, "MSCOCO": 0.7, "K700": 0.5})
    for name, made in (("sft", before), ("grpo", after)):
        write_results(made, tmp_path / name, "results_gen-gen")
    paths = [f"{name}={tmp_path / name / 'results_gen-gen.json'}" for name in ("sft", "grpo")]
    compare_main([*paths, "--png", str(tmp_path / "c.png")])
    modes, columns, tasks, alone = capsys.readouterr().out.strip().split("\n\n")
    assert modes.splitlines()[2].split() == ["gen-gen", "gen-gen"]
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in columns.splitlines()}
    assert rows["column"] == ["sft", "grpo", "grpo - sft"]
    assert [cell.split()[0] for cell in rows["I-GD"]] == ["50.0", "55.0", "+5.0"]  # all four tasks: no count
    assert [cell.split()[0] for cell in rows["Video (1 of 18 tasks)"]] == ["25.0", "50.0", "+25.0"]
    assert [cell.split()[0] for cell in rows["All (5 of 78 tasks)"]] == ["45.0", "54.0", "+9.0"]
    assert "VisDoc" not in columns and len(tasks.splitlines()) == 2 + 5
    assert next(line for line in tasks.splitlines() if line.startswith("K700")).split()[1:3] == ["hit@1", "100"]
    assert alone == "of sft alone, left out: VisRAG_ChartQA"
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"


def test_compare_refuses_mmeb_results_on_other_data():
    one = mmeb_result({"K700": 0.25, "MSVD": 0.5})
    for other in (mmeb_result({"K700": 0.25}, version="w"), mmeb_result({"K700": 0.25}, queries=40)):
        with pytest.raises(UserError, match="b was scored on other queries or another version of the data than a in K"):
            compare({"a": one, "b": other})
    assert "+0.0" in compare({"a": one, "b": mmeb_result({"MSVD": 0.5}, version="")})  # the reference's files name none
    with pytest.raises(UserError, match="no task stands in all of a, b"):
        compare({"a": one, "b": mmeb_result({"VATEX": 0.5})})
    with pytest.raises(UserError, match=r"several benchmarks \(mini, mmeb-v2\)"):
        compare({"a": one, "b": result(0)})


def test_training_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"iteration": step, "loss": 3.0 / step, "gen_recall": 0.1 * step, "grad_norm": 1.0, "note": "text"}
        for step in (1, 2, 3)
    ]
    lines = [json.dumps(record) for record in (*records, {"iteration": 2, "loss": 9.0})]
    path.write_text("\n".join(lines) + '\n{"iteration": 4, "lo')
    read = read_metrics(path)
    assert [(record["iteration"], record["loss"]) for record in read] == [(1, 3.0), (2, 9.0), (3, 1.0)]
    plot_training(path, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
    path.write_text("{}\n")
    with pytest.raises(UserError, match="no line with an 'iteration'"):
        plot_training(path, tmp_path / "curve.png")


def test_grpo_curves(tmp_path, monkeypatch):
    """Evaluations stand in lines of their own; the reward's terms are drawn under whatever names the run had."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"iteration": 0, "eval_gen_hit1": 0.5}]
    for step in (1, 2):
        lines.append({"iteration": step, "reward": 1.0, "reward_format": 1.0, "reward_mine": 0.2, "reward_std": 0.1})
    lines += [{"iteration": 2, "eval_gen_hit1": 0.75}, {"iteration": 3, "reward": None, "kl": 0.1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = {}
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, label, **style: drawn.update({label: (x, y)}))
    monkeypatch.setattr(Axes, "legend", lambda axes, **style: None)
    plot_training(path, tmp_path / "curve.png")
    assert drawn == {
        "reward": ((1, 2), (1.0, 1.0)),
        "reward_format": ((1, 2), (1.0, 1.0)),
        "reward_mine": ((1, 2), (0.2, 0.2)),
        "reward_std": ((1, 2), (0.1, 0.1)),
        "eval_gen_hit1": ((0, 2), (0.5, 0.75)),
        "kl": ((3,), (0.1,)),
    }


def test_compare_command(tmp_path, capsys):
    for name, seed in (("one", 0), ("two", 1)):
        write_evaluation(result(seed), tmp_path / name)
    compare_main([f"a={tmp_path / 'one'}", f"b={tmp_path / 'two' / 'results.json'}", "--png", str(tmp_path / "c.png")])
    assert "oracle" in capsys.readouterr().out and (tmp_path / "c.png").exists()
    (tmp_path / "other.json").write_text("[]")
    for bad, message in (("one", "NAME=PATH"), ("a=nowhere", "cannot be read"), (f"a={tmp_path}/other.json", "not a")):
        with pytest.raises(UserError, match=message):
            compare_main([bad])
