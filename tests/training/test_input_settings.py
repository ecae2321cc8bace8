"""What shaped a model's inputs goes with its weights: exports, checkpoints, and every command that reads them."""

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from programs import SFT, run_in_forks
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints.source import open_model
from umer1.data.input_settings import InputSettings
from umer1.data.loader import DataConfig
from umer1.data.media import MediaRoot
from umer1.data.prompts import user_text
from umer1.data.schema import Side
from umer1.errors import UserError
from umer1.inference.encode import main as encode
from umer1.inference.engine import EngineConfig
from umer1.inference.engine import make_processor as of_engine
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.training.batches import make_processor as of_training

SHAPE = "--max-pixels 1568 --min-pixels 900 --video-max-pixels 2000 --video-min-pixels 800 --num-frames 4".split()
SHAPE.append("--blank-image-for-text")
WANTED = dict(image_min_pixels=900, image_max_pixels=1568, video_min_pixels=800, video_max_pixels=2000)
WANTED |= dict(num_frames=4, blank_image_for_text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(flags of the run, folder): one step of SFT, exported."""
    folder = tmp_path_factory.mktemp("shape")
    data = write_pairs(folder / "data")
    flags = ["--hf-model", str(make_tiny_directory(folder / "start", layers=1)), "--data-path", str(data), "--fp32"]
    flags += ["--save", str(folder / "run"), *"--global-batch-size 8 --micro-batch-size 8 --lr 1e-3".split()]
    ended = run_in_forks(SFT, [*flags, *SHAPE, "--train-iters", "1", "--export-hf", str(folder / "hf")])
    assert ended.returncode == 0, ended.stderr
    return flags, folder


def settings_of(path, **flags) -> dict:
    """What the commands take from `path`."""
    processor = of_engine(EngineConfig(model=str(path), **flags), open_model(path))
    found = InputSettings.of(processor.image_config, processor.blank_image_for_text)
    return {name: getattr(found, name) for name in WANTED}


def test_files_of_an_export_and_of_a_checkpoint(trained):
    _, folder = trained
    for path in (folder / "hf", folder / "run" / "iter_0000001" / "hf"):
        assert WANTED.items() <= json.loads((path / "umer1_inputs.json").read_text()).items()
        image, video = (json.loads((path / f"{n}preprocessor_config.json").read_text()) for n in ("", "video_"))
        assert (image["min_pixels"], image["max_pixels"]) == (900, 1568)
        assert image["size"] == {"shortest_edge": 900, "longest_edge": 1568}
        assert video["size"] == {"shortest_edge": 800, "longest_edge": 2000}
    modules = json.loads((folder / "hf" / "sentence_bert_config.json").read_text())["processing_kwargs"]
    assert "1568" in json.dumps(modules["image"]) and "2000" in json.dumps(modules["video"])


def test_unset_means_as_it_was_trained(trained):
    _, folder = trained
    for path in (folder / "hf", folder / "run"):
        assert settings_of(path) == WANTED
        assert settings_of(path, max_pixels=4000, num_frames=2, blank_image_for_text=False) == WANTED | dict(
            image_max_pixels=4000, num_frames=2, blank_image_for_text=False
        )
        data = DataConfig()
        of_training(data, open_model(path), None)
        assert (data.num_frames, data.blank_image_for_text) == (4, True)
    assert settings_of(folder / "start")["num_frames"] == 8
    assert settings_of(folder / "start")["blank_image_for_text"] is False


def test_encode_without_flags_sees_what_the_trainer_saw(trained, tmp_path):
    _, folder = trained
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "text": "no picture here"}) + "\n")
    flags = ["--model", str(folder / "hf"), "--input", str(tmp_path / "in.jsonl"), "--fp32"]
    found = {}
    for name, more in (("unset", []), ("same", SHAPE), ("other", ["--no-blank-image-for-text"])):
        encode([*flags, "--output", str(tmp_path / f"{name}.npz"), *more])
        found[name] = np.load(tmp_path / f"{name}.npz")["embeddings"][0]
    assert found["unset"] @ found["same"] >= 0.99999 > found["unset"] @ found["other"]
    start = HFDirectory.open(folder / "start")
    trainer = of_training(DataConfig(max_pixels=1568, min_pixels=900, blank_image_for_text=True), start, None)
    ours = of_engine(EngineConfig(model=str(folder / "hf")), HFDirectory.open(folder / "hf"))
    media = MediaRoot(tmp_path)
    one, two = (processor.encode_side(Side(user_text("no picture here")), media) for processor in (trainer, ours))
    np.testing.assert_array_equal(one.input_ids, two.input_ids)


def test_a_text_in_sentence_transformers_by_the_cards_words(trained, tmp_path):
    """It adds no white picture of its own; the card says how to."""
    pytest.importorskip("torchvision")
    package = pytest.importorskip("sentence_transformers")
    _, folder = trained
    (call,) = re.findall(r"`(model\.encode\(\[\{.*?28.*?\}\]\))`", (folder / "hf" / "README.md").read_text())
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "text": "two squares"}) + "\n")
    flags = ["--model", str(folder / "hf"), "--input", str(tmp_path / "in.jsonl"), "--fp32"]
    encode([*flags, "--output", str(tmp_path / "out.npz")])
    settings = {"model_kwargs": {"dtype": torch.float32}, "local_files_only": True}
    model = package.SentenceTransformer(str(folder / "hf"), device="cpu", **settings)
    (found,) = eval(call, {"model": model, "PIL": PIL, "text": "two squares"})
    assert float(found @ np.load(tmp_path / "out.npz")["embeddings"][0]) >= 0.99999


def test_a_resume_under_other_settings_is_refused(trained):
    flags, folder = trained
    more = ["--train-iters", "2", "--num-frames", "4", "--blank-image-for-text"]
    ended = run_in_forks(SFT, [*flags, *SHAPE, *more, "--max-pixels", "3136"])
    assert ended.returncode and "Traceback" not in ended.stderr
    assert "image_max_pixels is 1568 there and 3136 here" in ended.stderr
    ended = run_in_forks(SFT, [*flags, *SHAPE, *more])
    assert ended.returncode == 0, ended.stderr
    assert "resumed at iteration 1" in ended.stdout


def test_a_broken_file_is_one_message(trained, tmp_path):
    _, folder = trained
    directory = HFDirectory.open(folder / "hf")
    directory.assets["umer1_inputs.json"] = json.dumps(WANTED | {"num_frames": "4", "image_max_pixels": 0})
    with pytest.raises(UserError, match="image_max_pixels=0 must be a whole number of 1 or above; num_frames='4'"):
        of_engine(EngineConfig(model="x"), directory)


def test_weights_come_from_one_place(trained):
    """SFT as GRPO: it trained --load's weights and named --hf-model."""
    flags, folder = trained
    ended = run_in_forks(SFT, [*flags[:-8], "--save", str(folder / "next"), "--load", str(folder / "run")])
    assert ended.returncode and "Traceback" not in ended.stderr
    assert f"hf_model={folder / 'start'} and load={folder / 'run'} both say where the weights come from" in ended.stderr
