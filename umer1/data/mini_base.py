"""Make the tiny Qwen2-VL that mini-MMEB starts from: `python -m umer1.data.mini_base --output DIR`.

It plays the part of the pretrained Qwen2-VL: it can list what the cells of a picture show, in any order, and can count.
It knows nothing of the tasks, of the reasoning format, or of the two embedding tokens.  Plain transformers and torch's
Muon, one process; learning to see is what needs Muon (AdamW alone leaves the digits at chance for minutes).
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from umer1.data.mini_draw import BLANK_TILE, TILE_PIXELS, draw
from umer1.data.mini_tasks import (
    HOP_TASKS,
    LEFT,
    NUM_ANSWERS,
    NUMBERS,
    Board,
    card,
    digit_word,
    key_word,
    sample_board,
    sample_mosaic,
)
from umer1.data.mini_tokenizer import BLANK, COUNT_DOWN, LIST_CELLS, SPECIAL_TOKENS, build_tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
KINDS = (*HOP_TASKS, "card", "mosaic", "count")


@dataclass(kw_only=True, slots=True)
class BaseSettings:
    """Size and training of the tiny base; the defaults made the committed one."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    ffn_size: int = 320
    vision_size: int = 64
    init_std: float = 0.08  # 0.02 learns far more slowly at this size
    batch: int = 48
    lr: float = 3e-3  # AdamW's; Muon takes three times this
    minutes: float = 8.0
    seed: int = 0


def model_config(settings: BaseSettings, tokenizer) -> Qwen2VLConfig:
    """Head size 32 (the smallest that inference engines take), tied embeddings, spare rows for the embedding tokens."""
    half = settings.hidden_size // settings.heads // 2
    side = half * 3 // 8
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    rows = math.ceil((tokenizer.get_vocab_size() + 2) / 32) * 32
    return Qwen2VLConfig(
        text_config=dict(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            intermediate_size=settings.ffn_size,
            vocab_size=rows,
            max_position_embeddings=2048,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[half - 2 * side, side, side]),
            initializer_range=settings.init_std,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(
            depth=1,
            embed_dim=settings.vision_size,
            num_heads=4,
            hidden_size=settings.hidden_size,
            mlp_ratio=2,
            patch_size=TILE_PIXELS,
            spatial_merge_size=2,
            temporal_patch_size=2,
            in_channels=3,
            initializer_range=settings.init_std,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=settings.init_std,
    )


def board_patches(boards: list[Board], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw boards of one kind: (patches [N, 3 * 2 * 8 * 8], grid [boards, 3]) as Qwen2-VL's image processor does."""
    pixels = np.stack([np.stack([draw(frame, board.columns, rng) for frame in board.frames]) for board in boards])
    values = (pixels.astype(np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    if values.shape[1] == 1:
        values = np.repeat(values, 2, axis=1)
    count, frames, height, width, _ = values.shape
    grid = (frames // 2, height // TILE_PIXELS, width // TILE_PIXELS)
    split = values.reshape(count, grid[0], 2, grid[1] // 2, 2, TILE_PIXELS, grid[2] // 2, 2, TILE_PIXELS, 3)
    patches = split.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(-1, 3 * 2 * TILE_PIXELS**2)
    return torch.from_numpy(np.ascontiguousarray(patches)), torch.tensor([grid] * count)


def sample_caption(rng: np.random.Generator, kind: str) -> tuple[Board, str]:
    """A picture and the list of its cells: hop boards in random order, `key pointer digit` or `key digit pointer`."""
    if kind == "mosaic":
        board = sample_mosaic(rng)
        board.frames[0][rng.random(len(board.frames[0])) < rng.choice([0.0, 0.5])] = BLANK_TILE
        cells = board.frames[0][:, 0]
        return board, "".join(BLANK if cell == BLANK_TILE else key_word("look", int(cell)) for cell in cells)
    if kind == "card":
        task = str(rng.choice(["img", "doc"]))
        answer = int(rng.integers(NUM_ANSWERS))
        return card(rng, task, answer), key_word(task, answer // 8) + digit_word(answer % 8)
    board = sample_board(rng, kind)
    words = []
    for cell in rng.permutation(len(board.keys)):
        shown = [key_word(kind, board.keys[board.following[cell]]), digit_word(board.digits[cell])]
        words += [key_word(kind, board.keys[cell]), *(shown if rng.random() < 0.5 else shown[::-1])]
    return board, "".join(words)


def count_batch(rng: np.random.Generator, count: int, tokenizer, config: Qwen2VLConfig) -> dict:
    """Like `caption_batch`, without pictures: number words count down; shorter replies are padded at their end."""
    pad = config.text_config.pad_token_id
    numbers = rng.integers(1, len(NUMBERS), count)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    rows = []
    for number in map(int, numbers):
        prompt = f"{head}{COUNT_DOWN} {NUMBERS[number]}<|im_end|>\n<|im_start|>assistant\n"
        reply = "".join(f" {NUMBERS[n]}{LEFT}" for n in reversed(range(number)))
        rows.append(tokenizer.encode(f"{prompt}{reply}<|im_end|>").ids)
        prompt_length = len(tokenizer.encode(prompt).ids)
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    positions = torch.arange(length).expand(3, count, length)
    return dict(ids=ids, positions=positions, patches=None, prompt_length=prompt_length)


def caption_batch(rng: np.random.Generator, kind: str, count: int, tokenizer, config: Qwen2VLConfig) -> dict:
    """Token ids [B, L], M-RoPE positions [3, B, L], patches and grid; captions of one kind all have one length."""
    if kind == "count":
        return count_batch(rng, count, tokenizer, config)
    boards, captions = zip(*(sample_caption(rng, kind) for _ in range(count)), strict=True)
    patches, grid = board_patches(list(boards), rng)
    frames, rows, columns = (int(n) for n in grid[0])
    tokens = frames * rows * columns // 4
    pad = "<|video_pad|>" if boards[0].is_video else "<|image_pad|>"
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    tail = f"<|vision_end|>{LIST_CELLS}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer.encode(head).ids
    prompt = before + [tokenizer.token_to_id(pad)] * tokens + tokenizer.encode(tail).ids
    replies = [tokenizer.encode(caption + "<|im_end|>").ids for caption in captions]
    ids = torch.tensor([prompt + reply for reply in replies])
    start, length = len(before), ids.shape[1]
    axes = torch.meshgrid(*(torch.arange(n) for n in (frames, rows // 2, columns // 2)), indexing="ij")
    vision = torch.stack([axis.flatten() for axis in axes]) + start
    after = torch.arange(length - start - tokens) + int(vision.max()) + 1
    positions = torch.cat([torch.arange(start).expand(3, -1), vision, after.expand(3, -1)], dim=1)
    vision_id = config.video_token_id if boards[0].is_video else config.image_token_id
    return dict(
        ids=ids, positions=positions[:, None].expand(3, count, length), patches=patches, grid=grid,
        vision_id=vision_id, prompt_length=len(prompt),
    )  # fmt: skip


def caption_logits(model: Qwen2VLForConditionalGeneration, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [B, R, V], labels [B, R]) of the caption tokens; padding is labelled with the padding token."""
    embeds = model.model.get_input_embeddings()(batch["ids"])
    if batch["patches"] is not None:
        seen = model.model.visual(batch["patches"], grid_thw=batch["grid"]).pooler_output
        embeds = embeds.masked_scatter((batch["ids"] == batch["vision_id"])[..., None], seen)
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    start = batch["prompt_length"]
    return model.lm_head(hidden[:, start - 1 : -1]), batch["ids"][:, start:]


def reading_accuracy(kind: str, logits: torch.Tensor, labels: torch.Tensor, padding: int) -> float:
    """Share of right tokens among those that the picture decides: of a listed cell the third, elsewhere all."""
    read = slice(2, -1, 3) if kind in HOP_TASKS else slice(0, -1)
    hits = (logits.argmax(-1) == labels)[:, read]
    return hits[labels[:, read] != padding].float().mean().item()


def train_base(settings: BaseSettings) -> tuple[Qwen2VLForConditionalGeneration, object]:
    """Train on captions for the given minutes of process time; prints accuracy on pointers and digits."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng([settings.seed, 500])
    tokenizer = build_tokenizer()
    config = model_config(settings, tokenizer)
    model = Qwen2VLForConditionalGeneration(config)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.text_config.vocab_size} rows", flush=True
    )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=3 * settings.lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, step, right = time.process_time(), 0, {}
    while (share := (time.process_time() - started) / (60 * settings.minutes)) < 1:
        factor = min(1.0, (step + 1) / 30) * max(0.02, 0.5 * (1 + math.cos(math.pi * share)))
        kind = KINDS[step % len(KINDS)]
        logits, labels = caption_logits(model, caption_batch(rng, kind, settings.batch, tokenizer, config))
        padding = config.text_config.pad_token_id
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=padding)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        right.setdefault(kind, []).append(reading_accuracy(kind, logits, labels, padding))
        if step % 200 == 0:
            scores = " ".join(f"{name} {np.mean(values[-20:]):.3f}" for name, values in right.items())
            print(f"step {step} {100 * share:.0f}% loss {loss.item():.3f} read: {scores}", flush=True)
    return model, tokenizer


def save_base(model: Qwen2VLForConditionalGeneration, tokenizer, output: Path) -> None:
    """A Hugging Face directory: weights in bf16, tokenizer, image and video settings that leave the pictures' size."""
    output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)
    path = output / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    settings = dict(
        image_mean=CLIP_MEAN, image_std=CLIP_STD, do_convert_rgb=True, do_normalize=True, do_rescale=True,
        do_resize=True, rescale_factor=1 / 255, resample=3, patch_size=TILE_PIXELS, temporal_patch_size=2,
        merge_size=2, min_pixels=256, max_pixels=65536,
    )  # fmt: skip
    image = settings | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    video = settings | {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor"}
    for name, value in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (output / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    for name, kind in BaseSettings.__annotations__.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=getattr(BaseSettings(), name))
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    model, tokenizer = train_base(BaseSettings(**arguments))
    save_base(model, tokenizer, output)


if __name__ == "__main__":
    main()
