"""HFDirectory: what is accepted, what is refused and with which words, and what is written beside an export."""

import json
import struct
import sys

import pytest
from tiny_qwen2_vl import make_tiny_directory, save_tokenizer, tiny_tokenizer

from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory, save_assets


def _edit(path, **changes):
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps(raw))


@pytest.fixture
def tiny(tmp_path):
    return make_tiny_directory(tmp_path / "tiny")


def test_opens_and_adds_the_two_tokens_in_order(tiny):
    directory = HFDirectory.open(tiny)
    special, tokenizer = directory.special, directory.tokenizer
    assert directory.added_tokens
    assert special.disc_emb == special.gen_emb + 1
    assert tokenizer.encode("a <gen_emb>\n<disc_emb>", add_special_tokens=False).ids.count(special.gen_emb) == 1
    assert directory.initial_rows == {
        special.gen_emb: tokenizer.token_to_id("<|object_ref_end|>"),
        special.disc_emb: tokenizer.token_to_id("<|object_ref_start|>"),
    }
    # plain tokens: decoding without special tokens keeps them
    ids = [special.im_end, special.gen_emb]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<gen_emb>"
    assert directory.config.vocab_size == directory.file_vocab_size
    assert directory.image_settings["patch_size"] == 14
    assert directory.tensors["model.norm.weight"].shape == (64,)


def test_both_tokens_present_are_left_alone(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny", embedding_tokens=True)
    before = tiny_tokenizer(embedding_tokens=True)
    directory = HFDirectory.open(path)
    assert not directory.added_tokens
    assert directory.tokenizer.get_vocab() == before.get_vocab()


def test_vocabulary_grows_only_without_spare_rows(tmp_path, caplog):
    path = make_tiny_directory(tmp_path / "tiny", vocab_rows=0, old_format=True)
    directory = HFDirectory.open(path)
    assert directory.config.vocab_size == directory.file_vocab_size + 2
    assert "grows from 414 to 416" in caplog.text
    assert json.loads(directory.assets["config.json"])["vocab_size"] == 416


def test_saved_assets_reopen_in_umer1_and_transformers(tiny, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    directory = HFDirectory.open(tiny)
    save_assets(directory, tmp_path / "out", dtype="bfloat16")
    again = HFDirectory.open(tmp_path / "out", weights=False)
    assert again.special == directory.special and not again.added_tokens
    assert again.config == directory.config and again.image_settings == directory.image_settings
    reference = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Represent <|im_start|>this <gen_emb> and <disc_emb><|im_end|>"
    assert reference(text)["input_ids"] == directory.tokenizer.encode(text, add_special_tokens=False).ids
    assert reference.decode([directory.special.gen_emb], skip_special_tokens=True) == "<gen_emb>"
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype) == "torch.bfloat16"
    listed = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert listed[str(directory.special.gen_emb)]["special"] is False


def test_sharded_and_single_files_give_the_same_tensors(tmp_path):
    one = HFDirectory.open(make_tiny_directory(tmp_path / "one"))
    many = HFDirectory.open(make_tiny_directory(tmp_path / "many", max_shard_size="40KB"))
    assert {n: (e.dtype, e.shape) for n, e in one.tensors.items()} == {
        n: (e.dtype, e.shape) for n, e in many.tensors.items()
    }
    assert len({entry.file for entry in many.tensors.values()}) > 3


def test_code_named_by_the_directory_is_neither_run_nor_copied(tiny, tmp_path):
    (tiny / "evil.py").write_text("raise SystemExit('executed')\n")
    _edit(tiny / "config.json", auto_map={"AutoConfig": "evil.Config"})
    _edit(tiny / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]})
    directory = HFDirectory.open(tiny)
    save_assets(directory, tmp_path / "out")
    assert "evil" not in sys.modules
    assert "auto_map" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*config.json"))


def _remove(name):
    return lambda path: (path / name).unlink()


def _write(name, text):
    return lambda path: (path / name).write_text(text)


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _index(target):
    return lambda path: (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": target}})
    )


def _pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _no_object_ref(path):
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer, path)
    text = (path / "tokenizer.json").read_text().replace("<|object_ref_end|>", "<|other|>")
    (path / "tokenizer.json").write_text(text)


BAD_DIRECTORIES = {
    "no config": (_remove("config.json"), "has no config.json"),
    "no tokenizer": (_remove("tokenizer.json"), "has no tokenizer.json"),
    "no weights": (_remove("model.safetensors"), "has no model.safetensors"),
    "only pickles": (_pickled, "can execute code and is not read"),
    "config is no JSON": (_write("config.json", "{"), "is not valid JSON"),
    "config is a list": (_write("config.json", "[]"), "must hold a JSON object"),
    "tokenizer is no tokenizer": (_write("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    "other model": (lambda p: _edit(p / "config.json", model_type="llama"), "model_type 'llama'"),
    "quantised": (lambda p: _edit(p / "config.json", quantization_config={"bits": 4}), "quantised"),
    "image token of another model": (lambda p: _edit(p / "config.json", image_token_id=7), "image_token_id=7"),
    "truncated weights": (_truncate, "reaches beyond the end of the file"),
    "header length beyond file": (
        lambda p: (p / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40)),
        "not a whole safetensors file",
    ),
    "bytes behind the weights": (
        lambda p: (p / "model.safetensors").open("ab").write(b"more"),
        "4 bytes behind the last tensor",
    ),
    "generation_config.json is no JSON": (_write("generation_config.json", "{"), "generation_config.json is not valid"),
    "tokenizer_config.json is a list": (_write("tokenizer_config.json", "[]"), "tokenizer_config.json must hold"),
    "index leads out": (_index("../secret.safetensors"), "'../secret.safetensors'"),
    "index absolute": (_index("/etc/passwd"), "'/etc/passwd'"),
    "index names a missing file": (_index("model-00009.safetensors"), "is missing"),
    "no row to start from": (_no_object_ref, "has neither <gen_emb> nor"),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_refusals_say_what_is_wrong(tiny, case):
    spoil, message = BAD_DIRECTORIES[case]
    spoil(tiny)
    with pytest.raises(UserError) as error:
        HFDirectory.open(tiny)
    assert message in str(error.value)


def test_not_a_directory(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        HFDirectory.open(tmp_path / "nowhere")


def test_tokenizer_larger_than_the_table(tmp_path):
    path = make_tiny_directory(tmp_path / "tiny", old_format=True)
    _edit(path / "config.json", vocab_size=200)
    with pytest.raises(UserError, match="do not belong together"):
        HFDirectory.open(path)


def test_parts_of_processor_config_come_first(tmp_path):
    """As transformers 5.17 looks for them, kind by kind."""
    path = make_tiny_directory(tmp_path / "model", layers=1)
    plain = HFDirectory.open(path).image_settings
    part = plain | {"max_pixels": 3136, "size": {"shortest_edge": 784, "longest_edge": 3136}}
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "X", "image_processor": part}))
    (path / "video_preprocessor_config.json").write_text(json.dumps({"max_pixels": 5000}))
    found = HFDirectory.open(path)
    assert found.image_settings == part and found.video_settings == {"max_pixels": 5000}
    (path / "processor_config.json").write_text(json.dumps({"video_processor": {"max_pixels": 6000}}))
    found = HFDirectory.open(path)
    assert found.image_settings == plain and found.video_settings == {"max_pixels": 6000}
