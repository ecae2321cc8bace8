"""What other packages make of an exported directory: sentence-transformers, vLLM, and the reader of its card."""

import json
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from inference_cases import INPUTS, write_inputs
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from umer1.data.media import MediaRoot
from umer1.data.mini_mmeb import MINI_BASE
from umer1.data.prompts import SUFFIX, chat_text, user_text, vision_block
from umer1.inference.encode import main as encode
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.engines.vllm_process import engine_environment
from umer1.sharing.chat_template import CHAT_TEMPLATE
from umer1.sharing.share import main


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
    return load_sentence_model(shared)


def needed(name: str):
    """It comes with umer1[share]; transformers loads no processor of Qwen2-VL without torchvision."""
    pytest.importorskip("torchvision")
    return pytest.importorskip(name)


def load_sentence_model(folder: Path):
    """fp32, as `own_vectors` are."""
    package = needed("sentence_transformers")
    settings = {"model_kwargs": {"dtype": torch.float32}, "local_files_only": True}
    return package.SentenceTransformer(str(folder), device="cpu", **settings)


def own_vectors(model: Path, inputs: Path, output: Path) -> np.ndarray:
    """float64 [N, H]: what `umer1 encode` gives; media lie beside `inputs`."""
    flags = ["--model", str(model), "--input", str(inputs), "--data-root", str(inputs.parent), "--fp32"]
    encode([*flags, "--output", str(output)])
    return np.load(output)["embeddings"].astype(np.float64)


def assert_same_direction(found: np.ndarray, wanted: np.ndarray, about) -> None:
    found = found.astype(np.float64)
    cosine = float(found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted))
    assert cosine >= 0.99999, (about, cosine)


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
    own = own_vectors(shared, inputs, tmp_path / "own.npz")
    together = sentence_model.encode([as_input(item, folder) for item in INPUTS])
    for item, wanted, found in zip(INPUTS, own, together, strict=True):
        (alone,) = sentence_model.encode([as_input(item, folder)])
        assert_same_direction(alone, wanted, item["id"])
        assert_same_direction(found, wanted, f"{item['id']} among others")
        assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-5)


def test_it_resizes_as_umer1_does_where_the_model_leaves_a_videos_bounds_to_umer1(tmp_path):
    """Hub directories of Qwen2-VL have no video_preprocessor_config.json."""
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    model = tmp_path / "model"
    shutil.copytree(MINI_BASE, model)
    (model / "video_preprocessor_config.json").unlink()
    main(["--model", str(model), "--output", str(tmp_path / "out")])
    items = []
    for width, height in rng.integers(20, 400, (3, 2)):
        frames = [f"{len(items)}-{number}.png" for number in range(5)]
        for name in frames:
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        items.append({"id": f"video {width} x {height}", "text": "What happens?", "video": frames})
        items.append({"id": f"picture {width} x {height}", "text": "What is it?", "image": frames[0]})
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    own = own_vectors(tmp_path / "out", tmp_path / "inputs.jsonl", tmp_path / "own.npz")
    sentence_model = load_sentence_model(tmp_path / "out")
    for item, wanted in zip(items, own, strict=True):
        assert_same_direction(sentence_model.encode([as_input(item, tmp_path)])[0], wanted, (seed, item["id"]))


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
    address = "data:image/png;base64,AAAA"  # as a bare string sentence-transformers would open it
    ids = sentence_model.preprocess([{"text": address}])["input_ids"][0].tolist()
    assert HFDirectory.open(shared).tokenizer.decode(ids).endswith(f"{address}\n<disc_emb>")


def test_the_cards_examples_run(shared, media, capsys, monkeypatch):
    needed("sentence_transformers")
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


def test_the_cards_lines_lay_a_picture_as_umer1_does(shared, tmp_path):
    """EXIF rotation, and transparency on white."""
    card = (shared / "README.md").read_text()
    lines = re.findall(r"^    (picture = .*)$", card, re.MULTILINE)
    pixels = np.random.default_rng(3).integers(0, 256, (30, 50, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    names = {"PIL": PIL, "path": tmp_path / "a.png"}
    exec("\n".join(lines), names)
    wanted = MediaRoot(tmp_path).open_image("a.png")
    assert names["picture"].size == wanted.size == (30, 50)
    assert np.abs(np.asarray(names["picture"], int) - np.asarray(wanted, int)).max() <= 1


def test_an_export_without_a_template_gets_the_methods_chat_form(shared, tmp_path):
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": user_text("which?")}]
    messages = [{"role": "user", "content": content}]
    block = vision_block(1) + vision_block(1, video=True)
    wanted = chat_text(block + user_text("which?"))
    render = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE).render
    assert render(messages=messages, add_generation_prompt=True) == wanted
    source = tmp_path / "source"
    shutil.copytree(shared, source)
    for name in ("chat_template.jinja", "chat_template.json"):
        (source / name).unlink(missing_ok=True)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    main(["--model", str(source), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    (source / "chat_template.jinja").write_text("{{ 'mine' }}")
    main(["--model", str(source), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'mine' }}"
