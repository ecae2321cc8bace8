"""What the inference tests share: inputs of every kind on disk, and what transformers makes of them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from umer1.data.images import ImageConfig
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.data.schema import Sequence
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.training.policy_batches import teacher_forced

INPUTS = [
    {"id": "text", "text": "one red square and one blue circle"},
    {"id": "image", "text": "What is there?", "image": "a.png"},
    {"id": "images", "text": "Which of the three?", "image": ["a.png", "b.png", "c.png"]},
    {"id": "video", "text": "What happens?", "video": ["f0.png", "f1.png", "f2.png", "f3.png", "f4.png"]},
    {"id": "picture", "image": "b.png", "text": ""},
    {"id": "long", "text": "a red square, " * 20},
]


def write_inputs(root: Path) -> Path:
    """Pictures in `root` and the input file that names them."""
    rng = np.random.default_rng(0)
    sizes = {"a.png": (60, 40), "b.png": (30, 90), "c.png": (56, 56)} | {f"f{i}.png": (48, 64) for i in range(5)}
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
    path = root / "inputs.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in INPUTS))
    return path


def prompts(directory: Path, root: Path) -> dict[str, Sequence]:
    """Every input's whole prompt."""
    opened = HFDirectory.open(directory)
    config = ImageConfig.of_directory(opened)
    processor = Processor(opened.tokenizer, opened.special, opened.config, config)
    found = {}
    for item in INPUTS:
        images = item.get("image", [])
        images = [images] if isinstance(images, str) else images
        videos = [item["video"]] if "video" in item else []
        found[item["id"]] = processor.encode_prompt(item["text"], images, videos, MediaRoot(root))
    return found


def tokenizer(directory: Path) -> Tokenizer:
    return HFDirectory.open(directory).tokenizer


def reference_model(directory: Path) -> torch.nn.Module:
    """transformers' model of the directory in fp32; added embedding tokens start as docs/method.md, 1 says."""
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    ids = tokenizer(directory).token_to_id
    as_stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    table = model.get_input_embeddings().weight.data
    for token, source in (("<gen_emb>", "<|object_ref_end|>"), ("<disc_emb>", "<|object_ref_start|>")):
        if as_stored.token_to_id(token) is None:
            table[ids(token)] = table[ids(source)]
    return model


def vision_arguments(prompt: Sequence, video_token: int) -> dict[str, torch.Tensor]:
    """The media of one prompt in the form of transformers' arguments."""
    if not len(prompt.grid_thw):
        return {}
    if (prompt.input_ids == video_token).any():
        return {"pixel_values_videos": prompt.pixel_values, "video_grid_thw": prompt.grid_thw}
    return {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw}


def reference_inputs(model: torch.nn.Module, prompt: Sequence, response: list[int]) -> dict[str, torch.Tensor]:
    """transformers' arguments for prompt and response.

    The positions are ours: transformers 5 places text after a long video elsewhere than the releases that the weights
    were trained with (tests/models/test_mrope_positions.py holds ours against that rule).
    """
    ids, positions = teacher_forced(prompt, response)
    extra = vision_arguments(prompt, model.config.video_token_id)
    if extra:
        kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
        extra["mm_token_type_ids"] = kinds[None]
    return dict(
        input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[:, None], **extra
    )


@torch.no_grad()
def reference_states(model: torch.nn.Module, prompt: Sequence, response: list[int] = ()) -> torch.Tensor:
    """transformers' last_hidden_state [L, H] of prompt and response."""
    return model.model(**reference_inputs(model, prompt, list(response))).last_hidden_state[0]


def cosine(a: np.ndarray, b: torch.Tensor) -> float:
    a, b = torch.from_numpy(a).double(), b.double()
    return float(a @ b / a.norm() / b.norm())
