"""A tiny random Qwen2-VL directory, written by transformers itself: the common ground of most tests."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Text whose merges are learnt, so that prompts are short in tokens.
_CORPUS = [
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output the "
    "thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. Finally, use "
    "the <gen_emb> tag to represent the entire input.",
    "<think>There are two red squares and one blue circle.</think><answer>a red square",
] * 3

_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, embedding_tokens: bool = False) -> Tokenizer:
    """A byte-level BPE of about 400 tokens with Qwen2-VL's special tokens, and `<gen_emb>`, `<disc_emb>` if asked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    if embedding_tokens:
        tokenizer.add_tokens(
            [AddedToken(text, special=False, normalized=False) for text in ("<gen_emb>", "<disc_emb>")]
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as the Hub's Qwen2-VL directories have them."""
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _flat_config(config: dict) -> dict:
    """The form of config.json that the Hub's Qwen2-VL models have: text fields at the top, `rope_scaling`."""
    flat = {key: value for key, value in config.items() if key not in ("text_config", "dtype")}
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters")
    text.pop("layer_types", None)
    flat.update({key: value for key, value in text.items() if key != "model_type"})
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["torch_dtype"] = config["dtype"]
    vision = {key: value for key, value in config["vision_config"].items() if key not in ("rope_parameters", "dtype")}
    vision["model_type"] = "qwen2_vl"
    flat["vision_config"] = vision
    return flat


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Every tensor gets values of its own, so that no swapped, missed or transposed tensor can go unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "ln_q" in name:
            noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif parameter.dim() == 1:
            noise = 0.1 * noise
        else:
            noise = noise / parameter[0].numel() ** 0.5
        parameter.copy_(noise)


def make_tiny_directory(
    path: str | Path,
    *,
    tied: bool = True,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    mrope_section: tuple[int, int, int] | None = None,
    vocab_rows: int | None = None,
    vision_depth: int = 2,
    vision_dim: int = 32,
    vision_heads: int = 2,
    patch_size: int = 14,
    old_format: bool = False,
    embedding_tokens: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Write a random Qwen2-VL (`hidden / heads` per head; `mrope_section` sums to half of that) and return `path`.

    `vocab_rows=None` leaves four spare rows beyond the tokenizer, 0 leaves none; `old_format` writes the Hub's flat
    config.json; `embedding_tokens` puts `<gen_emb>` and `<disc_emb>` into the tokenizer.
    """
    # transformers takes seconds to import: only where a directory is made
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(embedding_tokens=embedding_tokens)
    rows = tokenizer.get_vocab_size() + (4 if vocab_rows is None else 0) if not vocab_rows else vocab_rows
    half = hidden // heads // 2
    section = list(mrope_section or (half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8))
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "im_end", "endoftext")}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": ffn,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "tie_word_embeddings": tied,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
        },
        vision_config={
            "depth": vision_depth,
            "embed_dim": vision_dim,
            "num_heads": vision_heads,
            "mlp_ratio": 2,
            "hidden_size": hidden,
            "patch_size": patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=tied,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    if old_format:
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(_flat_config(raw), indent=2))
    save_tokenizer(tokenizer, path)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16, patch_size=patch_size).save_pretrained(path)
    return path
