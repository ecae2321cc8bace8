"""Models with random weights and data made on the fly, so that a training step can be timed without any file."""

from pathlib import Path

import torch

from umer1.data.processor import IGNORE
from umer1.data.schema import EncodedPair, Prompt, PromptPair, Sequence
from umer1.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig
from umer1.models.qwen2_vl.directory import HFDirectory, SpecialTokens
from umer1.plan.shapes import SHAPES

# Qwen2-VL-2B-Instruct as published, and one for a CPU that only shows that the program runs.
MODELS = {
    "Qwen2-VL-2B": SHAPES["qwen2-vl-2b"],
    "small": Qwen2VLConfig(
        vision=VisionConfig(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=64),
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=512,
        rms_norm_eps=1e-6,
        mrope_section=(2, 3, 3),
        tie_word_embeddings=True,
        image_token_id=509,
        video_token_id=510,
        vision_start_token_id=508,
        vision_end_token_id=511,
    ),
}


def directory_of(config: Qwen2VLConfig) -> HFDirectory:
    """What the trainers ask of a model directory, of one that has no files.

    Special tokens beside the pictures' own take the last free ids.
    """
    taken = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    free = (token for token in range(config.vocab_size - 1, 0, -1) if token not in taken)
    disc_emb, gen_emb, im_start, im_end = (next(free) for _ in range(4))
    special = SpecialTokens(
        disc_emb=disc_emb,
        gen_emb=gen_emb,
        image_pad=config.image_token_id,
        video_pad=config.video_token_id,
        vision_start=config.vision_start_token_id,
        vision_end=config.vision_end_token_id,
        im_start=im_start,
        im_end=im_end,
    )
    return HFDirectory(Path("random"), config, RightForm(), special, {}, config.vocab_size, {})


class RightForm:
    """A tokenizer whose every response has the form that the format reward asks for."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "<think></think><answer></answer><gen_emb>"


@torch.no_grad()
def fill_randomly(models: list[torch.nn.Module]) -> None:
    """Weights as for the start of a training: norms 1, biases 0, all else normal with 0.02."""
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def random_sequence(
    directory: HFDirectory, *, text: int, response: int, grid: tuple[int, int], generator: torch.Generator
) -> Sequence:
    """A prompt of one picture of `grid` patches and `text` tokens, then `response` tokens that are supervised.

    response 0: a prompt alone.  Positions rise by one a token: what is timed does not depend on them.
    """
    config, special = directory.config, directory.special
    merge = config.vision.spatial_merge_size
    patches, pads = grid[0] * grid[1], grid[0] * grid[1] // merge**2
    words = torch.randint(1, config.vocab_size // 2, (text + response,), generator=generator)
    picture = [special.vision_start, *[special.image_pad] * pads, special.vision_end]
    head = torch.cat([torch.tensor(picture), words[: text - 1], torch.tensor([special.disc_emb])])
    ids = torch.cat([head, words[text:]])
    gen_index = -1
    if response:
        gen_index = len(ids) - 2
        ids[-2], ids[-1] = special.gen_emb, special.im_end
    labels = torch.full_like(ids, IGNORE)
    labels[len(head) - 1 : -1] = ids[len(head) :]
    return Sequence(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(len(ids)).expand(3, -1).clone(),
        pixel_values=torch.randn(patches, config.vision.patch_dim, generator=generator),
        grid_thw=torch.tensor([[1, *grid]]),
        disc_index=len(head) - 1,
        gen_index=gen_index,
        prompt_length=len(head),
        target_id=int(torch.randint(2**31, (1,), generator=generator)),
    )


def random_pairs(directory: HFDirectory, count: int, seed: int, **sizes) -> list[EncodedPair]:
    """SFT pairs; sizes as in `random_sequence`."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> Sequence:
        return random_sequence(directory, generator=generator, **sizes)

    return [EncodedPair(side(), side(), dataset="random", index=number) for number in range(count)]


def random_prompts(directory: HFDirectory, count: int, seed: int, **sizes) -> list[PromptPair]:
    """RL pairs in slots of one global batch."""
    pairs = random_pairs(directory, count, seed, response=0, **sizes)
    return [
        PromptPair(Prompt(pair.query), Prompt(pair.positive), "random", number, number)
        for number, pair in enumerate(pairs)
    ]
