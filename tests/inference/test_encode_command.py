"""`umer1 encode --mode gen` from the command line, and what it says to wrong settings."""

import json

import numpy as np
import pytest
from inference_cases import INPUTS, cosine, prompts, reference_model, reference_states, tokenizer, write_inputs
from safetensors.torch import load_file, save_file
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints.fingerprint import model_fingerprint
from umer1.conversion import main as convert
from umer1.errors import ConfigError, UserError
from umer1.inference.encode import main
from umer1.progress import Progress


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model directory, input file)."""
    folder = tmp_path_factory.mktemp("command")
    directory = make_tiny_directory(folder / "model")
    (folder / "media").mkdir()
    return directory, write_inputs(folder / "media")


def encode(case, output, *flags: str):
    directory, path = case
    main(
        ["--model", str(directory), "--input", str(path), "--data-root", str(path.parent), "--output", str(output)]
        + ["--fp32", "--max-new-tokens", "6", *flags]
    )


def test_gen_mode_writes_embeddings_and_responses(case, tmp_path, capsys):
    encode(case, tmp_path / "out.npz", "--mode", "gen")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        ids, embeddings = arrays["ids"].tolist(), arrays["embeddings"]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == [line["id"] for line in lines] == [item["id"] for item in INPUTS]
    directory, path = case
    model, decode = reference_model(directory), tokenizer(directory).decode
    gen_emb = tokenizer(directory).token_to_id("<gen_emb>")
    wanted = prompts(directory, path.parent)
    for line, row in zip(lines, embeddings, strict=True):
        prompt, tokens = wanted[line["id"]], line["token_ids"]
        assert line["response"] == decode(tokens, skip_special_tokens=False)
        assert tokens[-1] == gen_emb and not line["well_formed"]
        assert line["num_tokens"] == len(tokens) - line["missing_gen_emb"] <= 6
        state = reference_states(model, prompt, tokens)[len(prompt) + len(tokens) - 1]
        assert cosine(row, state) >= 0.99999, line["id"]
    missing = sum(line["missing_gen_emb"] for line in lines)
    assert f"{missing} of them without <gen_emb>" in capsys.readouterr().err


def test_vectors_say_what_they_were_made_by(case, tmp_path):
    encode(case, tmp_path / "out.npz", "--max-pixels", "3136", "--num-frames", "3")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        made = json.loads(str(arrays["made_by"]))
    assert (made["mode"], made["dtype"], made["generation"]) == ("disc", "float32", None)
    assert made["model_sha256"] == model_fingerprint(case[0])
    assert (made["inputs"]["image_max_pixels"], made["inputs"]["num_frames"]) == (3136, 3)
    assert made["inputs"]["blank_image_for_text"] is False
    assert {"umer1", "transformers", "Pillow"} <= set(made["versions"])
    encode(case, tmp_path / "gen.npz", "--mode", "gen")
    made = json.loads(str(np.load(tmp_path / "gen.npz")["made_by"]))
    assert made["mode"] == "gen" and made["generation"]["max_new_tokens"] == 6


def test_self_consistency_is_the_mean_of_sampled_responses(case, tmp_path):
    flags = ["--mode", "gen", "--temperature", "1.3"]
    encode(case, tmp_path / "mean.npz", *flags, "--mean-of-samples", "3")
    encode(case, tmp_path / "one.npz", *flags)
    lines = [json.loads(line) for line in (tmp_path / "mean.jsonl").read_text().splitlines()]
    single = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    directory, path = case
    model, wanted = reference_model(directory), prompts(directory, path.parent)
    distinct = 0
    for line, one, row in zip(lines, single, np.load(tmp_path / "mean.npz")["embeddings"], strict=True):
        assert {name: line[name] for name in one} == one, "the first sample is that of a run with one"
        states = []
        for sample in (line, *line["others"]):
            prompt, tokens = wanted[line["id"]], sample["token_ids"]
            states.append(reference_states(model, prompt, tokens)[len(prompt) + len(tokens) - 1])
        distinct += len({tuple(sample["token_ids"]) for sample in (line, *line["others"])}) > 1
        mean = sum(state / state.norm() for state in states)
        assert cosine(row, mean) >= 0.99999 and abs(np.linalg.norm(row) - 1) < 1e-5, line["id"]
    assert distinct, "all samples were equal"
    with pytest.raises(ConfigError, match="mean_of_samples=2 needs --temperature above 0"):
        encode(case, tmp_path / "none.npz", "--mode", "gen", "--mean-of-samples", "2")


def test_missing_gen_emb_can_fall_back_or_stop(case, tmp_path):
    encode(case, tmp_path / "disc.npz")
    encode(case, tmp_path / "gen.npz", "--mode", "gen", "--missing-gen-emb", "disc")
    disc, gen = (np.load(tmp_path / name)["embeddings"] for name in ("disc.npz", "gen.npz"))
    lines = [json.loads(line) for line in (tmp_path / "gen.jsonl").read_text().splitlines()]
    missing = [line["missing_gen_emb"] for line in lines]
    assert any(missing)
    assert np.abs(gen[missing] - disc[missing]).max() < 1e-5
    with pytest.raises(UserError, match="missing_gen_emb: the response has no <gen_emb>"):
        encode(case, tmp_path / "error.npz", "--mode", "gen", "--missing-gen-emb", "error")
    assert not (tmp_path / "error.npz").exists()


def test_half_precision_stays_close(case, tmp_path):
    directory, path = case
    for name, flag in (("wide", "--fp32"), ("half", "--bf16")):
        main(
            ["--model", str(directory), "--input", str(path), "--data-root", str(path.parent)]
            + ["--output", str(tmp_path / f"{name}.npz"), flag]
        )
    wide, half = (np.load(tmp_path / f"{name}.npz")["embeddings"] for name in ("wide", "half"))
    assert half.dtype == np.float32
    assert (wide * half).sum(axis=1).min() > 0.995


def test_a_checkpoint_encodes_like_the_directory_it_came_from(case, tmp_path):
    directory, path = case
    convert(["--from-hf", str(directory), "--to-checkpoint", str(tmp_path / "save")])
    encode(case, tmp_path / "hf.npz")
    for name, model in (("save", tmp_path / "save"), ("one", tmp_path / "save" / "iter_0000000")):
        encode((model, path), tmp_path / f"{name}.npz")
        got, want = (np.load(tmp_path / f"{file}.npz")["embeddings"] for file in (name, "hf"))
        assert (got == want).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "both"], "mode='both' is not legal"),
        (["--max-new-tokenz", "3"], "did you mean --max-new-tokens"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["--tensor-model-parallel-size", "3"], "must divide the number of processes, 1"),
        (["--bf16"], "fp32 and bf16 are both set"),
        (["--kv-cache-gib", "inf"], "kv_cache_gib=inf must be a finite number above 0"),
        (["--num-workers", "0", "--top-p", "0"], "2 problems(.|\n)*num_workers=0(.|\n)*top_p"),
    ],
)
def test_wrong_settings_end_in_one_message(case, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        encode(case, tmp_path / "out.npz", *flags)


def test_wrong_paths(case, tmp_path):
    directory, path = case
    with pytest.raises(ConfigError, match=r"must end in \.npz"):
        encode(case, tmp_path / "out.txt")
    with pytest.raises(ConfigError, match="over the input"):
        encode(case, path.with_suffix(".npz"), "--mode", "gen")
    with pytest.raises(ConfigError, match="--model is required(.|\n)*--output is required|--output(.|\n)*--model"):
        main(["--input", str(path)])
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ConfigError, match="is a directory; name a file"):
        encode(case, tmp_path / "folder.npz")
    (tmp_path / "folder.npz").rmdir()
    with pytest.raises(UserError, match="cannot be made a directory"):
        encode(case, path / "out.npz")
    with pytest.raises(UserError, match="not a directory"):
        encode((tmp_path / "nowhere", path), tmp_path / "out.npz")
    with pytest.raises(UserError, match="--data-root"):
        main(["--model", str(directory), "--input", str(path), "--output", str(tmp_path / "out.npz")])
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_noticed(tmp_path, case):
    directory = make_tiny_directory(tmp_path / "model", layers=1)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    tensors[name].fill_(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not finite for 6 of 6 inputs \(text, image"):
        encode((directory, case[1]), tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_progress_tells_rate_and_time_left(capsys):
    clock = iter([0.0, 2.0, 8.0, 9.0, 60.0]).__next__
    progress = Progress("job", 100, now=clock)
    for count in (10, 30, 30):
        progress.add(count)
    progress.finish()
    assert capsys.readouterr().err.splitlines() == [
        "job: 40/100 inputs, 5.0/s, ETA 0:00:12",
        "job: 70 inputs in 60.0 s",
    ]
