"""`umer1 share` and the files of every export: what transformers' neighbours load, and what the card says."""

import json
import re
import secrets
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from inference_cases import INPUTS, write_inputs
from PIL import Image
from tiny_qwen2_vl import make_tiny_directory

import umer1
from umer1 import conversion
from umer1.checkpoints.fingerprint import model_fingerprint
from umer1.data.prompts import SUFFIX, chat_text, user_text, vision_block
from umer1.errors import ConfigError, UserError
from umer1.inference.encode import main as encode
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.engines.vllm_process import engine_environment
from umer1.sharing.scores import read_results
from umer1.sharing.share import main
from umer1.sharing.training_run import note_start, pairs_of, read_run

MINI_BASE = Path(umer1.__file__).parent / "assets" / "mini_base"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The mini base, shared: without the embedding tokens before, with them after."""
    folder = tmp_path_factory.mktemp("shared") / "mini"
    main(["--model", str(MINI_BASE), "--output", str(folder), "--license", "apache-2.0"])
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """(folder of pictures, input file); some pictures need a resize, as 60 x 40 does."""
    folder = tmp_path_factory.mktemp("media")
    return folder, write_inputs(folder)


@pytest.fixture(scope="module")
def sentence_model(shared):
    package = pytest.importorskip("sentence_transformers")
    return package.SentenceTransformer(
        str(shared), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )


def as_input(item: dict, folder: Path) -> dict:
    """A line of `umer1 encode` as sentence-transformers takes it."""

    def pictures(paths: list[str]) -> list[Image.Image]:
        return [Image.open(folder / path).convert("RGB") for path in paths]

    found = {"text": item["text"]} if item["text"] else {}
    if "image" in item:
        paths = [item["image"]] if isinstance(item["image"], str) else item["image"]
        found["image"] = pictures(paths)
    if "video" in item:
        found["video"] = pictures(item["video"])
    return found


def test_sentence_transformers_gives_umer1s_vectors(shared, sentence_model, media, tmp_path):
    folder, inputs = media
    encode(
        ["--model", str(shared), "--input", str(inputs), "--data-root", str(folder), "--fp32"]
        + ["--output", str(tmp_path / "own.npz")]
    )
    own = np.load(tmp_path / "own.npz")["embeddings"].astype(np.float64)
    alone = np.concatenate([sentence_model.encode([as_input(item, folder)]) for item in INPUTS]).astype(np.float64)
    together = sentence_model.encode([as_input(item, folder) for item in INPUTS]).astype(np.float64)
    for item, *rows in zip(INPUTS, own, alone, together, strict=True):
        cosines = [float(rows[0] @ row / np.linalg.norm(rows[0]) / np.linalg.norm(row)) for row in rows[1:]]
        assert min(cosines) >= 0.99999, (item["id"], cosines)
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-5


def test_an_instruction_may_come_as_the_prompt(sentence_model):
    words = secrets.token_hex(4)
    whole = sentence_model.encode(f"  Find the same thing: {words}\n")
    parts = sentence_model.encode(f"{words}\n", prompt="  Find the same thing: ")
    other = sentence_model.encode(words)
    assert float(whole @ parts) > 0.99999 > 0.999 > float(whole @ other), words


def test_the_prompt_is_the_methods_up_to_disc_emb(shared, sentence_model):
    text = "one <|object_ref_start|>red<|object_ref_end|> square "
    ids = sentence_model.preprocess([text])["input_ids"][0].tolist()
    shown = HFDirectory.open(shared).tokenizer.decode(ids, skip_special_tokens=False)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert shown == head + user_text(text).split("<disc_emb>")[0] + "<disc_emb>"


def test_the_cards_examples_run(shared, media, capsys, monkeypatch):
    pytest.importorskip("sentence_transformers")
    blocks = re.findall(r"```(\w*)\n(.*?)\n```", (shared / "README.md").read_text(), re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "", ""] and blocks[2][1] == SUFFIX
    monkeypatch.chdir(shared.parent)  # the card names the model as its directory is named
    exec(blocks[0][1], {})
    assert "(2, 128)" in capsys.readouterr().out
    folder, inputs = media
    Path("inputs.jsonl").write_text(inputs.read_text())
    program, command, *flags = shlex.split(blocks[1][1].replace("DIR", str(folder)))
    assert (program, command) == ("umer1", "encode")
    encode([*flags, "--max-new-tokens", "4"])
    assert np.load("embeddings.npz")["embeddings"].shape == (len(INPUTS), 128)


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
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"iteration": 8, "lo')
    note_start(folder, 0, pairs_of(["b", "a", "b"], np.array([0, 2, 1, 0])))
    return folder


def test_a_card_tells_run_and_scores(tmp_path, run):
    model = make_tiny_directory(tmp_path / "model")
    scored = {"benchmark": "mmeb-v2", "notes": ["a smoke test"], "model_sha256": model_fingerprint(model)}
    files = []
    for way, score in (("disc-disc", 0.5), ("gen-gen", 0.625)):
        entry = {"metric": "hit@1", "score": score, "num_queries": 1600}
        columns = {"All": {"score": None}, "I-RET": {"score": score}}
        files.append(tmp_path / f"{way}.json")
        files[-1].write_text(json.dumps(scored | {"scoring": way, "tasks": {"CIRR": entry}, "columns": columns}))
    flags = ["--model", str(model), "--run", str(run), "--output", str(tmp_path / "out"), "--name", "me/model"]
    results = ["--results", ",".join(map(str, files))]
    main([*flags, *results, "--base-model", "Qwen/Qwen2-VL-2B-Instruct", "--license", "apache-2.0"])
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "SFT, 7 steps (224 pairs), started from Qwen2-VL-2B.",
        "| b | 3 |\n| all | 4 |",
        "| data_path | `0.7 a.jsonl 0.3 b.json` |",
        "| lr | `5e-05` |",
        "| loss | 2.3 |",
        "| CIRR | hit@1 | 1,600 | 50.0 | 62.5 |\n| I-RET | mean |  | 50.0 | 62.5 |",
        f"SHA-256 `{scored['model_sha256']}`",
        "\n- a smoke test\n",
        f"| training from step 0 | version |\n| --- | --- |\n| umer1 | {umer1.__version__}",
    ):
        assert said in text, said
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen2-VL-2B-Instruct" and data.license == "apache-2.0"
    assert data.library_name == "sentence-transformers" and data.pipeline_tag == "feature-extraction"
    found = {(entry.metric_type, entry.metric_value, entry.task_name) for entry in data.eval_results}
    assert found == {("hit@1", 50.0, "CIRR, disc-disc"), ("hit@1", 62.5, "CIRR, gen-gen")}

    files[0].write_text(files[0].read_text().replace(scored["model_sha256"], "0" * 64))
    with pytest.raises(UserError, match=f"SHA-256 {'0' * 64}.*{scored['model_sha256']}"):
        main([*flags, *results])


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
    path.write_text("[]")
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


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError) as error:
        main(["--output", str(tmp_path / "taken"), "--base-model", "Qwen2-VL", "--dtype", "int8"])
    for said in ("--model is required", "must be a hub id", "is no earlier export", "use float32 or bfloat16"):
        assert said in str(error.value)
    with pytest.raises(UserError, match="give a training run's --save"):
        main(["--model", str(MINI_BASE), "--output", str(tmp_path / "out"), "--run", str(tmp_path)])


def test_vllm_still_takes_it_for_a_model_that_generates(shared):
    """vLLM makes a pooling model of a directory whose modules.json names a pooling class in a way that it knows."""
    config = pytest.importorskip("vllm.transformers_utils.config")
    assert config.get_pooling_config(str(shared), None) is None


@pytest.mark.thorough
def test_vllm_gives_umer1s_responses(shared, tmp_path):
    """As users call vLLM, with nothing set for this model.  The picture needs no resize, where vLLM has its own."""
    pytest.importorskip("vllm")
    seed = secrets.randbits(32)
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    items = [{"id": "text", "text": "one red square"}, {"id": "image", "text": "What is there?", "image": "a.png"}]
    asked = []
    for item in items:
        content = ("image" in item) * vision_block(1) + user_text(item["text"])
        asked.append({"prompt": chat_text(content), "image": str(tmp_path / "a.png") if "image" in item else None})
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    flags = ["--model", str(shared), "--input", str(tmp_path / "inputs.jsonl"), "--data-root", str(tmp_path), "--fp32"]
    flags += ["--mode", "gen", "--no-stop-at-gen-emb", "--missing-gen-emb", "disc", "--max-new-tokens", "16"]
    encode([*flags, "--output", str(tmp_path / "own.npz")])
    own = [json.loads(line)["token_ids"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    program = Path(__file__).with_name("vllm_generates.py")
    command = [sys.executable, str(program), str(shared), str(tmp_path / "prompts.json"), "16"]
    done = subprocess.run(command, env=engine_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    end = HFDirectory.open(shared).special.im_end
    found = [[token for token in ids if token != end] for ids in json.loads(done.stdout.splitlines()[-1])]
    assert found == own, f"seed {seed}"
