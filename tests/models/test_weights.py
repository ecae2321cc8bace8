"""Hugging Face -> megatron -> Hugging Face is bit-exact in every layout, and transformers loads what is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.export import destination_problem
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import (
    export_hf,
    load_hf,
    load_stream,
    named_weights,
    save_hf,
    stored_dtype,
    stream_hf,
)
from umer1.testing import run_distributed


def _stored(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _expected(path):
    """What an export of `path` must hold: its tensors, with the rows of the added tokens put in."""
    directory = HFDirectory.open(path)
    tensors = _stored(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in tensors:
            continue
        table = tensors[name]
        grown = torch.cat([table, table.new_zeros(directory.config.vocab_size - table.shape[0], table.shape[1])])
        for row, start in directory.initial_rows.items():
            if name.startswith("model") or row >= table.shape[0]:
                grown[row] = table[start]
        tensors[name] = grown
    return tensors


def _assert_same(got, want):
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, f"{name}: {got[name].dtype}"
        assert torch.equal(got[name], tensor), f"{name} differs"


def round_trip(path, layout, destination=None, dtype=None):
    """One rank: import, then export as tensors (or save); returns the exported tensors of rank 0."""
    directory = HFDirectory.open(path)
    parallel = ParallelConfig(**layout)
    with init_distributed(parallel) as state:
        models = build_model(directory.config, parallel, state, params_dtype=dtype or stored_dtype(directory))
        with torch.no_grad():
            for parameter in named_weights(models).values():
                parameter.fill_(float("nan"))  # whatever the import leaves out shows
        load_hf(models, directory, state)
        if destination is not None:
            save_hf(models, directory, destination, state, max_shard_bytes=40_000)
            return {}
        return {name: tensor.clone() for name, tensor in export_hf(models, state)}


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
CASES = {
    "one process, tied": (1, {}, {}),
    "one process, untied, bf16, old config": (
        1,
        {},
        {"tied": False, "dtype": torch.bfloat16, "old_format": True, "max_shard_size": "40KB"},
    ),
    "tp2, odd vocabulary that grows, one head in the ViT": (
        2,
        TP2,
        {"vocab_rows": 0, "hidden": 80, "kv_heads": 4, "vision_heads": 1},
    ),
    "tp2 untied, spare rows": (2, TP2, {"tied": False, "vocab_rows": 421, "vision_heads": 4, "kv_heads": 2}),
    "tp2, ViT cut": (2, {**TP2, "vision_data_parallel": False}, {"vision_heads": 4}),
    "pp2 tied": (2, PP2, {"layers": 2}),
    "pp2 untied, embedding tokens there": (2, PP2, {"tied": False, "embedding_tokens": True}),
    "tp2 pp2, interleaved, sequence parallel": (4, {**TP2, **VPP, "sequence_parallel": True}, {"layers": 4}),
    "pp2 uneven dp2": (4, {**PP2, "decoder_first_pipeline_num_layers": 1}, {"layers": 3}),
}


def stream_trip(path, layout):
    """One rank: import, stream, fill a second model from the stream; (what streamed, the second model's export)."""
    directory = HFDirectory.open(path)
    parallel = ParallelConfig(**layout)
    with init_distributed(parallel) as state:
        models, others = (
            build_model(directory.config, parallel, state, params_dtype=stored_dtype(directory)) for _ in range(2)
        )
        load_hf(models, directory, state)
        with torch.no_grad():
            for parameter in named_weights(others).values():
                parameter.fill_(float("nan"))
        streamed = {name: tensor.clone() for name, tensor in stream_hf(models, state)}
        load_stream(others, iter(streamed.items()), directory.config, state)
        return streamed, {name: tensor.clone() for name, tensor in export_hf(others, state)}


def round_trips(cases):
    """One rank: several layouts, one after the other (starting processes costs more than the work)."""
    return [(round_trip(path, layout), *stream_trip(path, layout)) for path, layout in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_round_trip_is_bit_exact(tmp_path, world_size):
    names = [name for name, case in CASES.items() if case[0] == world_size]
    paths = [make_tiny_directory(tmp_path / str(i), **CASES[name][2]) for i, name in enumerate(names)]
    cases = [(path, CASES[name][1]) for path, name in zip(paths, names, strict=True)]
    ranks = [round_trips(cases)] if world_size == 1 else run_distributed(round_trips, world_size, cases)
    for index, name in enumerate(names):
        print(name)  # shown when it fails
        want = _expected(paths[index])
        exported, _, refilled = ranks[0][index]
        _assert_same(exported, want)
        _assert_same(refilled, want)
        for rank in ranks:
            _assert_same(rank[index][1], want)
        assert all(not rank[index][0] for rank in ranks[1:])


@pytest.mark.parametrize("tied", [True, False])
def test_a_stream_with_wrong_tensors_is_refused(tmp_path, tied):
    directory = HFDirectory.open(make_tiny_directory(tmp_path / "tiny", tied=tied))
    parallel = ParallelConfig()
    with init_distributed(parallel) as state:
        models = build_model(directory.config, parallel, state, params_dtype=torch.float32)
        load_hf(models, directory, state)
        good = {name: tensor.clone() for name, tensor in stream_hf(models, state)}

        def fill(items):
            load_stream(models, items, directory.config, state)

        fill(reversed(good.items()))
        _assert_same({name: tensor.clone() for name, tensor in export_hf(models, state)}, good)
        some = "model.layers.1.self_attn.k_proj.weight"
        with pytest.raises(ValueError, match=f"1 tensors did not come: {some}"):
            fill((name, tensor) for name, tensor in good.items() if name != some)
        with pytest.raises(ValueError, match="surprise is not a tensor"):
            fill([*good.items(), ("surprise", torch.zeros(2))])
        with pytest.raises(ValueError, match=f"{some} came twice"):
            fill([*good.items(), (some, good[some])])
        with pytest.raises(ValueError, match=r"has shape \[3\], expected \[64\]"):
            fill((good | {"model.norm.weight": torch.zeros(3)}).items())
        if tied:
            with pytest.raises(ValueError, match="lm_head.weight is not a tensor"):
                fill([*good.items(), ("lm_head.weight", good["model.embed_tokens.weight"])])


def test_mixed_dtypes_are_held_exactly(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny", embedding_tokens=True)
    tensors = _stored(path)
    mixed = {
        name: tensor.to([torch.float32, torch.bfloat16, torch.float16][index % 3])
        for index, (name, tensor) in enumerate(tensors.items())
    }
    save_file(mixed, str(path / "model.safetensors"), metadata={"format": "pt"})
    got = round_trip(path, {})
    _assert_same(got, {name: tensor.float() for name, tensor in mixed.items()})


def test_newer_prefixes_are_read(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny", embedding_tokens=True)
    tensors = _stored(path)
    renamed = {
        ("model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, str(path / "model.safetensors"), metadata={"format": "pt"})
    _assert_same(round_trip(path, {}), tensors)


def test_export_loads_in_transformers(tmp_path):
    """Config, tokenizer, processor and all weights, by the classes people use; sharded here (40 kB a file)."""
    from transformers import AutoModel, AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path = make_tiny_directory(tmp_path / "tiny", tied=False, dtype=torch.bfloat16)
    out = tmp_path / "deep" / "out"
    run_distributed(round_trip, 2, path, TP2, out)
    _assert_same(_stored(out), _expected(path))
    assert len(list(out.glob("*.safetensors"))) > 2
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    reference = _expected(path)
    assert torch.equal(model.lm_head.weight, reference["lm_head.weight"])
    assert torch.equal(model.model.visual.merger.mlp[2].weight, reference["visual.merger.mlp.2.weight"])
    _, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"lm_head.weight"}
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<gen_emb>") == len(
        AutoTokenizer.from_pretrained(path)
    )
    assert Qwen2VLImageProcessorPil.from_pretrained(out).size == Qwen2VLImageProcessorPil.from_pretrained(path).size
    assert HFDirectory.open(out).added_tokens is False


def test_export_replaces_only_its_own(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny")
    out = tmp_path / "out"
    round_trip(path, {}, out)
    (out / "stale").write_text("of the earlier export")
    round_trip(path, {}, out)
    assert not (out / "stale").exists() and (out / "config.json").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is no earlier export"):
        round_trip(path, {}, mine)
    assert (mine / "thesis.txt").read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(out)
    assert "is a symbolic link" in destination_problem(link)
    link.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "tiny"]  # nothing left behind


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny")
    tensors = _stored(path)
    tensors["surprise.weight"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    tensors["visual.merger.mlp.0.bias"] = torch.zeros(3)
    tensors["visual.blocks.0.norm1.bias"] = torch.zeros(32, dtype=torch.int64)
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        round_trip(path, {})
    for part in (
        "surprise.weight is not a tensor of this model",
        "model.norm.weight is missing",
        "visual.merger.mlp.0.bias has shape [3], expected [128]",
        "visual.blocks.0.norm1.bias has dtype I64",
    ):
        assert part in str(error.value)


def test_config_that_contradicts_the_weights(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny", old_format=True)
    raw = json.loads((path / "config.json").read_text())
    raw["intermediate_size"] = 112
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"mlp.down_proj.weight has shape \[64, 96\], expected \[64, 112\]"):
        round_trip(path, {})
