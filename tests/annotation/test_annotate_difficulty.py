"""RL pairs by difficulty: ranks against transformers' states, and what `umer1 annotate --model` keeps of them."""

import json
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from annotation_world import dataset, flags, read_lines
from data_tools import write_records
from inference_cases import reference_model, reference_states
from teacher_server import Teacher

from umer1.annotation.annotate import main
from umer1.annotation.difficulty import Difficulty, RankRule, own_ranks
from umer1.annotation.samples import Sample
from umer1.data.media import MediaRoot
from umer1.data.mini_mmeb import MINI_BASE, make_mini_mmeb
from umer1.data.schema import Side
from umer1.errors import ConfigError
from umer1.evaluation.tasks import read_benchmark
from umer1.inference.engine import Engine, EngineConfig, load_engine, make_processor, open_directory

TASKS = {"mini-look": "image", "mini-vid": "video"}
ENGINE = EngineConfig(model=str(MINI_BASE), fp32=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data root, pairs of two data sets): some positives stand in several pairs, one pair twice."""
    root = make_mini_mmeb(tmp_path_factory.mktemp("mini") / "data", num_train_pairs=4, num_eval_queries=10)
    samples = []
    for task in read_benchmark(root / "eval").tasks:
        if task.name not in TASKS:
            continue
        for number, (query, label) in enumerate(zip(task.queries, task.labels, strict=True)):
            sides = [side_of(item) for item in (query, task.candidates[label if number % 4 else task.labels[0]])]
            samples.append(Sample(f"{task.name}:{number}", task.name, TASKS[task.name], *sides))
        samples.append(samples[-1])
    return root, samples


def side_of(item) -> Side:
    return Side(item.text, item.images, (item.video,) if item.video else ())


def expected_ranks(root, samples) -> list[tuple[int, int, int]]:
    """(lowest rank, highest rank, pool) of each pair in fp64; the two differ where scores are all but equal."""
    model, processor = reference_model(MINI_BASE), make_processor(ENGINE, open_directory(ENGINE))

    @torch.no_grad()
    def vector(side: Side) -> np.ndarray:
        prompt = processor.encode_prompt(side.text, side.images, list(side.videos), MediaRoot(root))
        state = reference_states(model, prompt)[prompt.disc_index].double().numpy()
        return state / np.linalg.norm(state)

    found = []
    for sample in samples:
        pool = {other.positive: vector(other.positive) for other in samples if other.dataset == sample.dataset}
        query = vector(sample.query)
        own = query @ pool.pop(sample.positive)
        others = [query @ target for target in pool.values()]
        low, high = (1 + sum(score > own + edge for score in others) for edge in (1e-5, -1e-5))
        found.append((low, high, len(pool) + 1))
    return found


def test_ranks_are_those_of_transformers(world, monkeypatch):
    root, samples = world
    models, alive = [], []

    def load(*arguments) -> Engine:
        engine = load_engine(*arguments)
        models.append(weakref.ref(engine.model))
        return engine

    monkeypatch.setattr("umer1.annotation.difficulty.load_engine", load)
    monkeypatch.setattr("umer1.device.release_memory", lambda: alive.extend(model() is not None for model in models))
    found = Difficulty(ENGINE, RankRule(2, 0.5), MediaRoot(root)).ranks(samples)
    assert alive == [False], "a served teacher may need the model's memory"
    expected = expected_ranks(root, samples)
    for (rank, pool), (low, high, size) in zip(found, expected, strict=True):
        assert low <= rank <= high and pool == size
    assert len({rank for rank, _ in found}) > 2


def test_own_ranks_over_blocks(monkeypatch):
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    monkeypatch.setattr("umer1.annotation.difficulty._BLOCK", 3)
    queries, targets = rng.integers(-3, 4, (8, 4)).astype(np.float32), rng.integers(-3, 4, (6, 4)).astype(np.float32)
    own = rng.integers(0, 6, 8)
    plain = [1 + sum(q @ t > q @ targets[o] for t in targets) for q, o in zip(queries, own, strict=True)]
    assert own_ranks(queries, targets, own).tolist() == plain, seed


def test_rule():
    rule = RankRule(2, 0.5)
    verdicts = [rule.verdict(rank, 8) for rank in range(1, 9)]
    assert verdicts == ["trivial"] + ["kept"] * 3 + ["hopeless"] * 4
    assert RankRule(1, 1.0).verdict(1, 1) == RankRule(1, 1.0).verdict(8, 8) == "kept"
    assert rule.verdict(1, 1) == "trivial"


def test_command_keeps_what_is_neither_trivial_nor_hopeless(world, tmp_path):
    root, samples = world
    rows = [
        {
            "qry": side.text,
            "qry_image_path": list(side.images),
            "pos_text": pos.text,
            "pos_image_path": list(pos.images),
        }
        for sample in samples
        if sample.modality == "image"
        for side, pos in [(sample.query, sample.positive)]
    ]
    (root / "broken.png").write_bytes((root / rows[0]["qry_image_path"][0]).read_bytes()[:60])
    rows.append(rows[1] | {"qry_image_path": "broken.png"})
    inputs = [{"layout": "mmeb", "path": str(write_records(tmp_path / "look.jsonl", rows, lines=True))}]
    known = expected_ranks(root, [sample for sample in samples if sample.modality == "image"])
    rule = RankRule(2, 0.6)
    expected = [{rule.verdict(rank, pool) for rank in (low, high)} for low, high, pool in known[:-1]]
    options = ["--model", str(MINI_BASE), "--fp32", "--rl-pairs", "20", "--rl-max-rank-share", "0.6"]
    with Teacher() as teacher:
        command = flags(root, inputs, teacher.url, "--output", str(tmp_path / "out"), *options)
        main(command)
        asked = set(teacher.asked)
    sft, filtered, manifest = dataset(tmp_path)
    rl = read_lines(tmp_path / "out" / "dataset" / "rl.jsonl")
    counts = manifest["difficulty"]["pairs"]["image"]
    sure = Counter(next(iter(verdicts)) for verdicts in expected if len(verdicts) == 1)
    assert sure["kept"] and sure["trivial"] and all(counts.get(name, 0) >= n for name, n in sure.items())
    assert counts["kept"] == len(rl) and counts["not_embedded"] == 1 and sum(counts.values()) == len(expected) + 1
    assert len(manifest["difficulty"]["model_sha256"]) == 64 and manifest["rl_modalities"] == {"image": len(rl)}
    verdict_of = {(row["qry"], str(row["qry_image_path"])): v for row, v in zip(rows, expected, strict=False)}
    for record in rl:
        images = record["qry_image"] if isinstance(record["qry_image"], list) else [record["qry_image"]]
        assert "kept" in verdict_of[record["qry_text"], str(images)]
    assert len(sft) + len(filtered) + sum(
        row["rl"] + row["repeats_rl"] for row in manifest["datasets"].values()
    ) == len(rows)
    assert asked and json.dumps(manifest)


def test_a_model_without_rl_pairs_is_refused(tmp_path):
    inputs = [{"layout": "mmeb", "path": str(write_records(tmp_path / "a.jsonl", [{"qry": "a"}], lines=True))}]
    more = ["--model", str(MINI_BASE), "--rl-max-rank-share", "0", "--rl-min-rank", "0", "--rl-oversampling", "0"]
    with pytest.raises(ConfigError) as caught:
        main(flags(tmp_path, inputs, "http://localhost:1/v1", *more))
    for text in ("--rl-pairs says how many", "rl_max_rank_share=0", "rl_min_rank=0", "rl_oversampling=0"):
        assert text in str(caught.value)
