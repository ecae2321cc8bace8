"""`umer1 encode --mode disc` against transformers' last_hidden_state at the token, in every layout."""

import json

import numpy as np
import pytest
from inference_cases import INPUTS, cosine, prompts, reference_model, reference_states, write_inputs
from tiny_qwen2_vl import make_tiny_directory

from umer1.inference.encode import main
from umer1.testing import run_distributed

# A tied model with grouped KV heads and an untied one with another split of heads and M-RoPE sections.
MODELS = {
    "tied": dict(tied=True, layers=2, embedding_tokens=True, max_shard_size="60KB"),
    "untied": dict(tied=False, layers=4, hidden=96, heads=2, kv_heads=2, mrope_section=(8, 12, 4), old_format=True),
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, tmp_path_factory):
    """(model directory, input file, {id: transformers' state at <disc_emb>})."""
    folder = tmp_path_factory.mktemp(request.param)
    directory = make_tiny_directory(folder / "model", **MODELS[request.param])
    root = folder / "media"
    root.mkdir()
    path = write_inputs(root)
    model = reference_model(directory)
    states = {}
    for name, prompt in prompts(directory, root).items():
        states[name] = reference_states(model, prompt)[prompt.disc_index]
    return directory, path, states


def encode(case, output, *flags: str):
    directory, path, _ = case
    main(
        ["--model", str(directory), "--input", str(path), "--data-root", str(path.parent), "--output", str(output)]
        + ["--fp32", *flags]
    )


def check(case, output):
    with np.load(output, allow_pickle=False) as arrays:
        ids, embeddings = arrays["ids"], arrays["embeddings"]
    assert ids.tolist() == [item["id"] for item in INPUTS]
    assert embeddings.dtype == np.float32
    assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() < 1e-6
    for name, row in zip(ids, embeddings, strict=True):
        assert cosine(row, case[2][name]) >= 0.99999, name


def test_one_process(case, tmp_path):
    encode(case, tmp_path / "out.npz", "--mode", "disc")
    check(case, tmp_path / "out.npz")
    assert not (tmp_path / "out.jsonl").exists()
    # Small budgets: many batches, the same numbers in the same order.
    encode(case, tmp_path / "small.npz", "--max-tokens-per-batch", "40", "--max-patches-per-batch", "20")
    check(case, tmp_path / "small.npz")


LAYOUTS = {"TP2xPP2": (2, 2), "TP2 x DP2": (2, 1), "PP2 x DP2": (1, 2), "DP4": (1, 1)}


def encode_in_layouts(case, folder):
    for name, (tp, pp) in LAYOUTS.items():
        sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
        encode(case, folder / f"{name}.npz", *sizes)


def test_layouts(case, tmp_path):
    run_distributed(encode_in_layouts, 4, case, tmp_path, timeout=300)
    for name in LAYOUTS:
        check(case, tmp_path / f"{name}.npz")


def test_bad_inputs_stop_or_are_left_out(case, tmp_path, capsys):
    directory, path, states = case
    lines = path.read_text().splitlines()
    broken = [*lines[:2], json.dumps({"id": "gone", "text": "x", "image": "gone.png"}), "{", *lines[2:]]
    broken_path = path.parent / "broken.jsonl"
    broken_path.write_text("\n".join(broken))
    (path.parent / "cut.png").write_bytes((path.parent / "c.png").read_bytes()[:500])
    with open(broken_path, "a") as file:
        file.write("\n" + json.dumps({"id": "cut", "text": "x", "image": "cut.png"}))
    case = (directory, broken_path, states)
    with pytest.raises(Exception, match=r"2 of 9 inputs cannot be embedded(.|\n)*line 3: missing_file(.|\n)*line 4"):
        encode(case, tmp_path / "out.npz")
    assert not list(tmp_path.iterdir())
    encode(case, tmp_path / "out.npz", "--skip-bad-inputs")
    check(case, tmp_path / "out.npz")
    bad = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["cause"]) for entry in bad] == [
        (3, "missing_file"),
        (4, "bad_record"),
        (9, "corrupt_image"),
    ]
    assert "3 of 9 inputs left out" in capsys.readouterr().err
    encode((directory, path, states), tmp_path / "out.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["out.npz"], "a list of what was left out of other embeddings"
