"""The tiny base: a Hugging Face directory that transformers and umer1 open, and that can see but was taught no task."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umer1.data import prompts
from umer1.data.mini_base import (
    KINDS,
    BaseSettings,
    board_patches,
    caption_batch,
    caption_logits,
    reading_accuracy,
    save_base,
    train_base,
)
from umer1.data.mini_draw import draw
from umer1.data.mini_mmeb import MINI_BASE
from umer1.data.mini_tasks import sample_board
from umer1.data.mini_tokenizer import build_tokenizer
from umer1.models.qwen2_vl.directory import HFDirectory


@pytest.fixture(scope="module")
def model():
    return Qwen2VLForConditionalGeneration.from_pretrained(MINI_BASE, dtype=torch.float32).eval()


def test_the_committed_directory_is_small():
    assert sum(path.stat().st_size for path in MINI_BASE.iterdir()) < 3_000_000


def test_transformers_opens_the_tokenizer_as_it_was_built():
    opened = AutoTokenizer.from_pretrained(MINI_BASE)
    text = prompts.chat_text(prompts.vision_block(3) + "Arrows to follow in this picture: two. Start at red", "a b")
    assert opened(text, add_special_tokens=False)["input_ids"] == build_tokenizer().encode(text).ids
    assert opened.decode(opened(text)["input_ids"]) == text
    assert opened.eos_token == "<|im_end|>" and opened.pad_token == "<|endoftext|>"


def test_umer1_opens_it_and_adds_the_embedding_tokens_in_spare_rows():
    directory = HFDirectory.open(MINI_BASE)
    assert directory.added_tokens
    assert directory.special.disc_emb == directory.special.gen_emb + 1 < directory.config.vocab_size
    assert directory.config.head_dim == 32


def test_pictures_are_not_resized_and_patches_are_transformers_own():
    processor = Qwen2VLImageProcessorPil.from_pretrained(MINI_BASE)
    board = sample_board(np.random.default_rng(0), "img")
    patches, grid = board_patches([board], np.random.default_rng(1))
    picture = draw(board.frames[0], board.columns, np.random.default_rng(1))
    theirs = processor(images=[Image.fromarray(picture)], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == grid.tolist() == [[1, 6, 6]]
    torch.testing.assert_close(theirs["pixel_values"], patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_sees(model, kind):
    """It reads what the picture decides (and counts down): what SFT need not learn."""
    batch = caption_batch(np.random.default_rng(7), kind, 32, build_tokenizer(), model.config)
    with torch.no_grad():
        logits, labels = caption_logits(model, batch)
    right = reading_accuracy(kind, logits, labels, model.config.text_config.pad_token_id)
    assert right > 0.97, f"{kind}: {right:.3f} is read"


def test_the_script_makes_a_directory_that_opens(tmp_path):
    settings = BaseSettings(minutes=0.02, batch=4, layers=1)
    save_base(*train_base(settings), tmp_path / "base")
    assert HFDirectory.open(tmp_path / "base").config.num_layers == 1
    again = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert sum(parameter.numel() for parameter in again.parameters()) > 100_000
