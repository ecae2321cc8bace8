"""docs/method.md, 4 in plain transformers and torch, with nothing of umer1 in it: the truth of the SFT tests.

One process, one sequence at a time, no padding, no packing, torch's AdamW.  Also writes the small data files that the
tests train on.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SUFFIX = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output the "
    "thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. Finally, "
    "use the <gen_emb> tag to represent the entire input."
)
WORDS = "red blue green square circle three two one under over left right page total seven".split()


def write_pairs(root: Path, count: int = 8, *, seed: int = 0, negatives: bool = False) -> Path:
    """`root/train.json` and its pictures: text only, one image, two images and a video of four frames, by turns."""
    rng = np.random.default_rng(seed)
    (root / "media").mkdir(parents=True, exist_ok=True)

    def picture(width: int, height: int) -> str:
        name = f"media/{len(list((root / 'media').iterdir()))}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
        return name

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))

    def side(kind: int) -> dict:
        media, markers = {}, ""
        if kind == 1:
            media, markers = {"image": picture(56, 84)}, "<image>"
        elif kind == 2:
            media, markers = {"image": [picture(84, 56), picture(28, 112)]}, "<image><image>"
        elif kind == 3:
            media, markers = {"video": [picture(56, 56) for _ in range(4)]}, "<video>"
        human = f"{markers}{words(2, 6)}\n<disc_emb>\n{SUFFIX}"
        answer = f"<think>{words(2, 9)}</think><answer>{words(1, 3)}<gen_emb>"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        return {**media, "conversations": turns}

    records = []
    for index in range(count):
        record = {"dataset_name": "toy", "qry": side(index % 4), "pos": side((index + 1) % 4)}
        if negatives:
            record["neg"] = [side((index + n) % 4) for n in range(index % 3)]
        records.append(record)
    path = root / "train.json"
    path.write_text(json.dumps(records))
    return path


class Reference:
    """A transformers model with the embedding tokens added as docs/method.md, 1 says."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32):
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(directory)
        ids = self.tokenizer.get_vocab()
        if "<gen_emb>" not in ids:
            self.tokenizer.add_tokens(["<gen_emb>", "<disc_emb>"])
            table = self.model.get_input_embeddings().weight.data  # a head of its own keeps its rows
            table[self.id("<gen_emb>")] = table[ids["<|object_ref_end|>"]]
            table[self.id("<disc_emb>")] = table[ids["<|object_ref_start|>"]]

    def id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def pixels(self, root: Path, paths: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.images([Image.open(root / path).convert("RGB") for path in paths], return_tensors="pt")
        return found["pixel_values"], found["image_grid_thw"]

    def video(self, root: Path, frames: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames two by two: the image processor's patches of a still picture, its second half from the next frame."""
        size = self.images.patch_size
        frames = frames + frames[-1:] * (len(frames) % 2)
        pixels, grids = self.pixels(root, frames)
        pixels = pixels.view(len(frames), -1, 3, 2, size * size)
        pairs = torch.stack([pixels[0::2, :, :, 0], pixels[1::2, :, :, 1]], dim=3)
        grid = torch.tensor([[len(frames) // 2, *grids[0, 1:].tolist()]])
        return pairs.reshape(-1, 3 * 2 * size * size), grid

    def prompt(self, root: Path, human: str, images: list[str], video: list[str]) -> tuple[list[int], dict]:
        """Token ids of the prompt with all vision pads, and pixels and grids by the model's argument names."""
        inputs: dict[str, torch.Tensor] = {}
        if images:
            inputs["pixel_values"], inputs["image_grid_thw"] = self.pixels(root, images)
            for grid in inputs["image_grid_thw"]:
                pads = "<|image_pad|>" * (int(grid.prod()) // 4)
                human = human.replace("<image>", f"<|vision_start|>{pads}<|vision_end|>", 1)
        if video:
            inputs["pixel_values_videos"], inputs["video_grid_thw"] = self.video(root, video)
            pads = "<|video_pad|>" * (int(inputs["video_grid_thw"].prod()) // 4)
            human = human.replace("<video>", f"<|vision_start|>{pads}<|vision_end|>", 1)
        prompt = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{human}<|im_end|>\n<|im_start|>assistant\n"
        )
        dtype = self.model.dtype
        inputs = {key: value.to(dtype) if "pixel" in key else value for key, value in inputs.items()}
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"], inputs

    def kinds(self, row: torch.Tensor) -> torch.Tensor:
        """What a token stands for: 0 text, 1 image, 2 video."""
        return (row == self.id("<|image_pad|>")).int() + 2 * (row == self.id("<|video_pad|>")).int()

    def forward(self, root: Path, human: str, answer: str | None, images: list[str], video: list[str]) -> dict:
        """last_hidden_state [L, H] after the final norm, logits [L, V], token ids, and the prompt's length."""
        ids, inputs = self.prompt(root, human, images, video)
        length = len(ids)
        if answer is not None:
            ids = ids + self.tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        row = torch.tensor([ids])
        kinds = self.kinds(row)
        hidden = self.model.model(
            input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=kinds, use_cache=False, **inputs
        ).last_hidden_state[0]
        return {"hidden": hidden, "logits": self.model.lm_head(hidden), "ids": ids, "prompt": length}

    def side(self, root: Path, side: dict) -> dict:
        """Embeddings of one SFT side and its cross-entropy, as a sum and a count."""
        images = [side["image"]] if isinstance(side.get("image"), str) else side.get("image", [])
        human, answer = (turn["value"] for turn in side["conversations"])
        out = self.forward(root, human, answer, images, side.get("video", []))
        ids, length = out["ids"], out["prompt"]
        disc = max(i for i in range(length) if ids[i] == self.id("<disc_emb>"))
        gen = max(i for i in range(length, len(ids)) if ids[i] == self.id("<gen_emb>"))
        embedding = {name: F.normalize(out["hidden"][row], dim=0) for name, row in (("disc", disc), ("gen", gen))}
        target = torch.tensor(ids[length:])
        ce = F.cross_entropy(out["logits"][length - 1 : -1], target, reduction="sum")
        return {**embedding, "ce": ce, "count": len(target)}


def loss(reference: Reference, root: Path, records: list[dict], *, temperature: float = 0.02) -> torch.Tensor:
    """L_disc + L_gen + CE(query) + CE(positive) of the whole batch."""
    query = [reference.side(root, record["qry"]) for record in records]
    positive = [reference.side(root, record["pos"]) for record in records]
    negative = [reference.side(root, side) for record in records for side in record.get("neg", [])]
    total = torch.zeros((), dtype=reference.model.dtype)
    labels = torch.arange(len(records))
    for kind in ("disc", "gen"):
        q, p = (torch.stack([side[kind] for side in sides]) for sides in (query, positive))
        columns = torch.cat([p, *([torch.stack([side[kind] for side in negative])] if negative else [])])
        total = total + F.cross_entropy(q @ columns.T / temperature, labels) / 2
        total = total + F.cross_entropy(p @ q.T / temperature, labels) / 2
    for sides in (query, positive):
        total = total + sum(side["ce"] for side in sides) / sum(side["count"] for side in sides)
    return total


def train(
    directory: Path,
    data: Path,
    *,
    steps: int,
    lr: float,
    clip: float,
    train_vision: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Weights after `steps` AdamW steps on all pairs of the file at once; names as transformers has them.

    In fp64: the gradient of a key's bias nearly cancels, and in fp32 the reference's own error passes 1e-4 there on
    some processors.
    """
    reference = Reference(directory, dtype)
    records = json.loads(data.read_text())
    for name, parameter in reference.model.named_parameters():
        frozen = ".visual." in name and ".merger." not in name and not train_vision
        parameter.requires_grad_(not frozen)
    trained = [parameter for parameter in reference.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(reference, data.parent, records).backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return {name: value.detach().clone() for name, value in reference.model.state_dict().items()}
