"""`umer1 share` and the files of every export: what transformers' neighbours load, and what the card says."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_qwen2_vl import make_tiny_directory

import umer1
from umer1 import conversion
from umer1.checkpoints.fingerprint import model_fingerprint
from umer1.data.mini_mmeb import MINI_BASE
from umer1.errors import ConfigError, UserError
from umer1.evaluation.mmeb_v2.registry import GROUPS
from umer1.evaluation.mmeb_v2.results import make_results
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.sharing.card import Subject, model_card
from umer1.sharing.scores import read_results
from umer1.sharing.share import main
from umer1.sharing.training_run import note_start, pairs_of, read_run
from umer1.sharing.versions import versions
from umer1.testing import run_distributed


@pytest.fixture
def run(tmp_path):
    """What a training run leaves beside its checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "model": {"hf_model": str(tmp_path / "Qwen2-VL-2B")},
        "data": {"data_path": ["0.7", str(tmp_path / "a.jsonl"), "0.3", str(tmp_path / "b.json")]}
        | {"data_root": str(tmp_path), "global_batch_size": 32},
        "optimizer": {"train_iters": 7, "lr": 5e-5},
        "loss": {"variant": "umer1"},
        "checkpoint": {"save": str(folder), "load": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"iteration": n, "loss": 3.0 - n / 10, "grad_norm": None} for n in (5, 6, 7)]
    damage = b'7\n\xff\n{"iteration": 8, "lo'
    (folder / "metrics.jsonl").write_bytes("".join(json.dumps(r) + "\n" for r in records).encode() + damage)
    note_start(folder, 0, pairs_of(["b", "a", "b"], np.array([0, 2, 1, 0])))
    return folder


def test_a_card_tells_run_and_scores(tmp_path, run):
    model = make_tiny_directory(tmp_path / "model")
    sha256, files = model_fingerprint(model), []
    for way, score in (("disc-disc", 0.5), ("gen-gen", 0.625)):
        entry = {"metric": "hit@1", "score": score, "num_queries": 1600}
        about = {"notes": ["a smoke test"], "model_sha256": sha256}
        files.append(tmp_path / f"{way}.json")
        results = make_results(dict.fromkeys(GROUPS["I-RET"], entry), scoring=way, about=about)
        files[-1].write_text(json.dumps(results))
    flags = ["--model", str(model), "--run", str(run), "--output", str(tmp_path / "out"), "--name", "me/model"]
    scores = ["--results", *map(str, files)]
    main([*flags, *scores, "--base-model", "Qwen/Qwen2-VL-2B-Instruct", "--license", "apache-2.0"])
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "SFT, 7 steps (224 pairs), started from Qwen2-VL-2B.",
        "| b | 3 |\n| all | 4 |",
        "| data_path | `0.7 a.jsonl 0.3 b.json` |",
        "| lr | `5e-05` |",
        "| loss | 2.3 |",
        "| CIRR | hit@1 | 1,600 | 50.0 | 62.5 |",
        "| I-RET | mean |  | 50.0 | 62.5 |",
        f"SHA-256 `{sha256}`",
        "\n- a smoke test\n",
        f"| training from step 0 | version |\n| --- | --- |\n| umer1 | {umer1.__version__}",
    ):
        assert said in text, said
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen2-VL-2B-Instruct" and data.license == "apache-2.0"
    assert data.library_name == "sentence-transformers" and data.pipeline_tag == "feature-extraction"
    found = {(entry.metric_type, entry.metric_value, entry.task_name) for entry in data.eval_results}
    assert {("hit@1", 50.0, "CIRR, disc-disc"), ("hit@1", 62.5, "CIRR, gen-gen")} < found and len(found) == 24

    files[0].write_text(files[0].read_text().replace(sha256, "0" * 64))
    with pytest.raises(UserError, match=f"SHA-256 {'0' * 64}.*{sha256}"):
        main([*flags, *scores])


def test_a_data_set_of_any_name_is_one_row(run):
    note_start(run, 0, {"a|b\n\u2028c": 3})
    directory = HFDirectory.open(MINI_BASE)
    card = model_card(Subject("m", directory.config, "float32", run=read_run(run)))
    assert "| data set | pairs |\n| --- | --- |\n| a\\|b  c | 3 |\n| all | 3 |" in card


def test_nothing_of_this_machine_is_in_what_is_shared(tmp_path, run):
    model = make_tiny_directory(tmp_path / "somebody" / "model")
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: str(model)}))
    main(["--model", str(model), "--run", str(run), "--output", str(tmp_path / "out")])
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for private in (str(tmp_path), str(Path.home()) + "/", "somebody"):
                assert private.encode() not in content, (path.name, private)


def test_a_run_keeps_the_versions_of_every_step(tmp_path, run, monkeypatch):
    monkeypatch.setattr("umer1.sharing.training_run.versions", lambda: {"umer1": "next"})
    note_start(run, 6, {"a": 1})
    assert [(step, found["umer1"] == "next") for step, found in read_run(run).versions] == [(0, False), (6, True)]
    early = read_run(run, step=6)
    assert len(early.versions) == 1 and early.last["iteration"] == 6 and early.step == 6
    note_start(run, 0, {"a": 1})
    assert read_run(run).versions == [(0, {"umer1": "next"})]
    for damaged in ("[]", '{"pairs": {}}', '{"pairs"'):
        (run / "run.json").write_text(damaged)
        with pytest.raises(UserError, match="run.json is damaged"):
            read_run(run)


def test_a_commit_whose_files_were_changed_is_dirty(tmp_path, monkeypatch):
    file = tmp_path / "versions.py"
    monkeypatch.setattr("umer1.sharing.versions.__file__", str(file))

    def git(*words):
        return subprocess.check_output(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path)

    def said():
        return versions()["umer1"].removeprefix(umer1.__version__)

    file.write_text("one")
    git("init", "-q")
    assert said() == ""  # a checkout that this code is no part of
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").decode().strip()
    assert said() == f", commit {commit}"
    file.write_text("two")
    assert said() == f", commit {commit}-dirty"


def test_results_of_the_generated_benchmark(tmp_path):
    estimate = {"value": 0.25, "stderr": 0.1, "n": 96}
    task = {"metric": "hit@1", "num_queries": 96, "score": {"disc": estimate, "empty_thoughts": estimate}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmark": "mini", "tasks": {"colours": task}, "mean": {"score": task["score"]}}))
    found = read_results(path)
    assert [(score.task, score.way, score.value, score.queries) for score in found.scores] == [
        ("colours", "disc", 25.0, 96),
        ("mean", "disc", 25.0, None),
    ]
    assert found.sha256 is None
    for damaged in ("[]", "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(UserError, match="not a results.json"):
            read_results(path)


def test_every_export_has_them_and_replaces_them(tmp_path):
    model = make_tiny_directory(tmp_path / "model")
    conversion.main(["--from-hf", str(model), "--to-checkpoint", str(tmp_path / "run")])
    conversion.main(["--from-checkpoint", str(tmp_path / "run"), "--to-hf", str(tmp_path / "out")])
    main(["--model", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--name", "again"])
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "2_Normalize/config.json", "model.safetensors"} <= names
    assert "# again\n" in (tmp_path / "out" / "README.md").read_text()
    hidden = HFDirectory.open(tmp_path / "out").config.hidden_size
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["embedding_dimension"] == hidden


@pytest.mark.parametrize("layout", ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"))
def test_several_ranks_write_what_one_writes(tmp_path, layout):
    """Also the card and the files of sentence-transformers, each by one rank."""
    model = make_tiny_directory(tmp_path / "model", layers=2)
    main(["--model", str(model), "--output", str(tmp_path / "one" / "mine")])
    flags = ["--model", str(model), "--output", str(tmp_path / "two" / "mine"), *layout.split()]
    run_distributed(main, 2, flags)
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) > 10


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError) as error:
        main(["--output", str(tmp_path / "taken"), "--base-model", "Qwen2-VL", "--dtype", "int8"])
    for said in ("--model is required", "must be a hub id", "is no earlier export", "use float32 or bfloat16"):
        assert said in str(error.value)
    with pytest.raises(UserError, match="give a training run's --save"):
        main(["--model", str(MINI_BASE), "--output", str(tmp_path / "out"), "--run", str(tmp_path)])
