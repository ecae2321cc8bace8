"""The step benchmarks on the small shape, and that the 2B shape is Qwen2-VL-2B's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
from synthetic import MODELS, directory_of, random_sequence

from umer1.data.packing import pack
from umer1.data.schema import EncodedPair

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("stage", "tokens"), [("sft", 4 * 2 * 46), ("grpo", None)])
def test_a_step_is_timed(stage, tokens, tmp_path):
    command = [sys.executable, f"perf/step_{stage}.py", "--model", "small", "--steps", "1", "--results", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    row = record["rows"][0]
    assert record["suite"] == f"step_{stage}" and row["skipped"] == 0
    assert row["seconds"] > 0 and row["flops"] > 0
    assert tokens is None or row["tokens"] == tokens


def test_the_large_shape():
    """1.54 B parameters in the decoder with its tied embedding, 0.66 B in the ViT with its merger."""
    config = MODELS["Qwen2-VL-2B"]
    assert config.violations() == []
    hidden, head = config.hidden_size, config.head_dim
    key_value = 2 * config.num_query_groups * head
    layer = hidden * (2 * hidden + key_value) + hidden + key_value + 3 * hidden * config.ffn_hidden_size + 2 * hidden
    decoder = config.num_layers * layer + hidden + config.vocab_size * hidden
    assert decoder == pytest.approx(1.544e9, rel=1e-3)
    vision = config.vision
    width, merged = vision.embed_dim, vision.merged_dim
    block = width * width * (4 + 2 * vision.mlp_ratio)
    vit = vision.depth * block + merged * (merged + hidden) + vision.patch_dim * width
    assert vit == pytest.approx(0.665e9, rel=5e-3)


def test_synthetic_pairs_are_what_training_reads():
    import torch

    directory = directory_of(MODELS["small"])
    special = directory.special
    generator = torch.Generator().manual_seed(3)
    side = random_sequence(directory, text=16, response=24, grid=(4, 4), generator=generator)
    assert len(side) == 4 + 2 + 16 + 24
    assert int((side.input_ids == special.image_pad).sum()) == 4  # 16 patches, merged by 2 x 2
    assert side.input_ids[side.disc_index] == special.disc_emb and side.input_ids[side.gen_index] == special.gen_emb
    supervised = (side.labels >= 0).nonzero().flatten()
    assert torch.equal(side.labels[supervised], side.input_ids[supervised + 1])
    assert len(supervised) == 24 and supervised[0] == side.disc_index
    batch = pack([EncodedPair(side, side)], 16)
    assert batch.num_pairs == 1 and len(batch.input_ids) % 16 == 0 and batch.num_real_tokens == 2 * len(side)
