"""mteb's own evaluation over umer1's engine, on tasks that are drawn here: nothing is downloaded."""

import json
import secrets
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from umer1.data.mini_mmeb import MINI_BASE
from umer1.errors import ConfigError, UserError
from umer1.inference.encode import main as encode
from umer1.inference.generate import GenerationConfig

mteb = pytest.importorskip("mteb")

from datasets import Dataset  # noqa: E402  (comes with mteb)
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from umer1.sharing.mteb_encoder import MtebEncoder  # noqa: E402

SHORT = GenerationConfig(max_new_tokens=4)
INSTRUCTION = "Find the picture:"


def metadata(name: str, kind: str, score: str, **more) -> TaskMetadata:
    about = {"description": name, "reference": None, "dataset": {"path": "none", "revision": "none"}}
    about |= {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "category": "t2t", "modalities": ["text"]}
    return TaskMetadata(name=name, type=kind, main_score=score, **about | more)


class DrawnSTS(AbsTaskSTS):
    metadata = metadata("DrawnSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 1
    rows: dict[str, list]

    def load_data(self, **_):
        self.dataset = {"default": {"test": Dataset.from_dict(self.rows)}}
        self.data_loaded = True


class DrawnPictures(AbsTaskRetrieval):
    """Texts that ask for pictures."""

    metadata = metadata(
        "DrawnPictures",
        "Any2AnyRetrieval",
        "ndcg_at_10",
        category="t2i",
        modalities=["text", "image"],
        prompt={"query": INSTRUCTION},
    )
    queries: list[str]
    pictures: list[Image.Image]

    def load_data(self, **_):
        data = RetrievalSplitData(
            queries=Dataset.from_dict({"id": [f"q{n}" for n in range(len(self.queries))], "text": self.queries}),
            corpus=Dataset.from_dict({"id": [f"d{n}" for n in range(len(self.pictures))], "image": self.pictures}),
            relevant_docs={f"q{n}": {f"d{n}": 1} for n in range(len(self.queries))},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def draw_texts(rng, count: int) -> list[str]:
    words = ["red", "blue", "green", "circle", "square", "one", "two", "three", "and", "a"]
    return [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(count)]


def draw_pictures(rng, count: int) -> list[Image.Image]:
    sizes = rng.integers(20, 90, (count, 2))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def own_vectors(folder: Path, mode: str, inputs: list[dict]) -> np.ndarray:
    """What `umer1 encode` gives."""
    lines = [{"id": str(number), **item} for number, item in enumerate(inputs)]
    (folder / "inputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--model", str(MINI_BASE), "--input", str(folder / "inputs.jsonl"), "--data-root", str(folder)]
    encode([*flags, "--mode", mode, "--output", str(folder / "own.npz"), "--max-new-tokens", "4", "--fp32"])
    return np.load(folder / "own.npz")["embeddings"].astype(np.float64)


def ranks(values: np.ndarray) -> np.ndarray:
    """1-based, the mean over equal values."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_sts_scores_are_those_of_umer1s_vectors(mode, rng, tmp_path, monkeypatch):
    first, second, truth = draw_texts(rng, 20), draw_texts(rng, 20), rng.random(20)
    task = DrawnSTS()
    task.rows = {"sentence1": first, "sentence2": second, "score": truth.tolist()}
    with MtebEncoder(str(MINI_BASE), mode=mode, generation=SHORT, fp32=True) as model:
        assert isinstance(model, mteb.EncoderProtocol)
        given, encode_one = [], model.encode
        monkeypatch.setattr(model, "encode", lambda *a, **k: given.append(encode_one(*a, **k)) or given[-1])
        found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (scores,) = found.task_results[0].scores["test"]
    own = own_vectors(tmp_path, mode, [{"text": text} for text in first + second])
    assert np.abs(np.concatenate(given) - own).max() < 1e-5
    wanted = np.corrcoef(ranks((given[0].astype(np.float64) * given[1]).sum(1)), ranks(truth))[0, 1]
    assert scores["cosine_spearman"] == pytest.approx(wanted, abs=1e-6)
    assert scores["main_score"] == scores["cosine_spearman"]


def test_pictures_are_found_as_umer1s_vectors_find_them(rng, tmp_path, monkeypatch):
    monkeypatch.setattr("umer1.sharing.mteb_encoder._AT_ONCE", 5)
    task = DrawnPictures()
    task.queries, task.pictures = draw_texts(rng, 12), draw_pictures(rng, 12)
    cache = mteb.ResultCache(cache_path=tmp_path / "cache")
    with MtebEncoder(str(MINI_BASE), fp32=True) as model:
        found = mteb.evaluate(model, task, cache=cache, co2_tracker=False, encode_kwargs={"batch_size": 4})
        documents = [{"text": f"{INSTRUCTION} {text}"} for text in task.queries]
    for number, picture in enumerate(task.pictures):
        picture.save(tmp_path / f"{number}.png")
        documents.append({"text": "", "image": f"{number}.png"})
    own = own_vectors(tmp_path, "disc", documents)
    cosines = own[:12] @ own[12:].T
    places = 1 + (cosines > np.diag(cosines)[:, None]).sum(1)
    wanted = np.where(places <= 10, 1 / np.log2(1 + places), 0.0).mean()
    (scores,) = found.task_results[0].scores["test"]
    assert scores["ndcg_at_10"] == pytest.approx(wanted, abs=1e-4)
    assert list((tmp_path / "cache").rglob("*mode_disc*")), "the two modes must not share their results"


def test_instructions_and_a_split_of_nothing():
    with MtebEncoder(str(MINI_BASE), fp32=True, prompts={"STS": "Same meaning?"}) as model:
        pictures, texts = DrawnPictures.metadata, DrawnSTS.metadata
        assert model.instruction(pictures, PromptType.query) == INSTRUCTION
        assert model.instruction(pictures, PromptType.document) == ""
        assert model.instruction(texts, None) == "Same meaning?"
        plain = texts.model_copy(update={"type": "Retrieval", "prompt": "Look for"})
        assert model.instruction(plain, PromptType.query) == "Look for"
        assert model.instruction(plain, PromptType.document) == ""
        split = {"task_metadata": texts, "hf_split": "test", "hf_subset": "default"}
        assert model.encode(DataLoader([]), **split).shape == (0, model.mteb_model_meta.embed_dim)


def test_results_are_filed_under_every_setting_that_was_chosen():
    """mteb keeps results by these: two runs under other settings must not be taken for one."""
    chosen = {"fp32": True, "max_pixels": 3136, "blank_image_for_text": True}
    with MtebEncoder(str(MINI_BASE), **chosen) as model:
        assert model.mteb_model_meta.experiment_kwargs == {"mode": "disc", **chosen}
    prompts = {"query": "Look for"}
    with MtebEncoder(str(MINI_BASE), mode="gen", generation=SHORT, prompts=prompts, max_input_tokens=99) as model:
        wanted = {"mode": "gen", "max_input_tokens": 99, "max_new_tokens": 4, "prompts": json.dumps(prompts)}
        assert model.mteb_model_meta.experiment_kwargs == wanted
        assert "max_new_tokens" in model.mteb_model_meta.experiment_name


def test_what_cannot_be_embedded_ends_the_evaluation():
    task = DrawnSTS()
    task.rows = {"sentence1": ["a", "a " * 50, "b"], "sentence2": ["a", "b", "<|im_end|>"], "score": [0.0, 0.5, 1.0]}
    with MtebEncoder(str(MINI_BASE), fp32=True, max_input_tokens=60) as model:
        with pytest.raises(UserError, match="1 inputs cannot be embedded:\n  input 1: over_length"):
            mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    with pytest.raises(ConfigError) as error:
        MtebEncoder(str(MINI_BASE), mode="both", device="tpu", fp32=True, bf16=True)
    for said in ("mode='both' is not legal", "device='tpu'", "fp32 and bf16 are both set"):
        assert said in str(error.value)
