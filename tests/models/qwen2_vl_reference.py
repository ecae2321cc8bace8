"""What the model tests share: tiny random transformers models, our copies of them, and batches of every input kind.

The weight copy is the tests' own: it shares no code with umer1.models.qwen2_vl.weights, so a fault in either shows.
"""

import torch
from transformers import Qwen2VLConfig as HFConfig
from transformers import Qwen2VLForConditionalGeneration

from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.positions import mrope_positions

IMAGE, VIDEO, START, END = 90, 91, 92, 93

# Each legal in its own way: tied or not, shared KV heads or not, other sections, odd vocabulary, other ViT.
CONFIGS = {
    "tied_gqa": dict(
        text=dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
        | dict(num_key_value_heads=2, rms_norm_eps=1e-6),
        rope=dict(type="mrope", mrope_section=[2, 3, 3]),
        vision=dict(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, patch_size=4, hidden_size=64),
        tie=True,
    ),
    "untied_mha": dict(
        text=dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=2)
        | dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=5000.0),
        rope=dict(type="mrope", mrope_section=[6, 4, 2]),
        vision=dict(depth=1, embed_dim=48, num_heads=4, mlp_ratio=4, patch_size=2, hidden_size=48, in_channels=3),
        tie=False,
    ),
}


def reference_model(name: str, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A transformers model with random weights, norms and biases included, in fp32."""
    spec = CONFIGS[name]
    torch.manual_seed(seed)
    config = HFConfig(
        **spec["text"],
        rope_scaling=dict(spec["rope"]),
        vision_config=dict(spec["vision"]),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=spec["tie"],
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    model = Qwen2VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and "weight" in key:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    model.tie_weights()
    return model


def our_config(name: str) -> Qwen2VLConfig:
    """The same configuration through config.json's nested form, as transformers writes it."""
    return Qwen2VLConfig.from_hf(reference_model(name).config.to_dict())


def sequences(config: Qwen2VLConfig, seed: int = 1) -> list[dict]:
    """Text, one image, two images, a video with text around, each {input_ids, position_ids, pixel_values, grid_thw}."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, IMAGE, (count,), generator=generator).tolist()

    def span(grid: tuple[int, int, int], token: int) -> list[int]:
        return [START] + [token] * (grid[0] * grid[1] * grid[2] // 4) + [END]

    kinds = [
        (text(9), []),
        (text(3) + span((1, 4, 6), IMAGE) + text(4), [(1, 4, 6)]),
        (span((1, 2, 2), IMAGE) + text(2) + span((1, 4, 2), IMAGE) + text(3), [(1, 2, 2), (1, 4, 2)]),
        (text(1) + span((2, 4, 6), VIDEO) + text(6), [(2, 4, 6)]),
        (text(14), []),
    ]
    made = []
    for ids, grids in kinds:
        ids, grid = torch.tensor(ids), torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
        patches = int(grid.prod(-1).sum()) if grids else 0
        pixels = torch.randn(patches, config.vision.patch_dim, generator=generator)
        positions = mrope_positions(ids, grid, config)
        made.append(dict(input_ids=ids, position_ids=positions, pixel_values=pixels, grid_thw=grid))
    return made


def pack(items: list[dict]) -> dict:
    """Arguments of Qwen2VL.forward for these sequences."""
    lengths = torch.tensor([item["input_ids"].numel() for item in items])
    return dict(
        input_ids=torch.cat([item["input_ids"] for item in items]),
        position_ids=torch.cat([item["position_ids"] for item in items], dim=1),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=int(lengths.max()),
        pixel_values=torch.cat([item["pixel_values"] for item in items]),
        grid_thw=torch.cat([item["grid_thw"] for item in items]),
    )


def reference_hidden(model: Qwen2VLForConditionalGeneration, items: list[dict]) -> torch.Tensor:
    """transformers' last_hidden_state [T, H], one sequence at a time, its own positions."""
    return torch.cat([_reference_one(model, item) for item in items])


def _reference_one(model, item: dict) -> torch.Tensor:
    ids = item["input_ids"][None]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    media = {}
    if item["grid_thw"].shape[0]:
        video = bool((ids == VIDEO).any())
        media = {
            "pixel_values_videos" if video else "pixel_values": item["pixel_values"],
            "video_grid_thw" if video else "image_grid_thw": item["grid_thw"],
            "mm_token_type_ids": kinds,
        }
    model.model.rope_deltas = None
    return model.model(input_ids=ids, use_cache=False, **media).last_hidden_state[0]


def hf_tensors(model: Qwen2VLForConditionalGeneration, *, grad: bool = False) -> dict[str, torch.Tensor]:
    """Weights (or their gradients) by transformers' names."""
    tensors = {key: (p.grad if grad else p.detach()) for key, p in model.named_parameters()}
    return {key: value for key, value in tensors.items() if value is not None}


def to_ours(
    hf: dict[str, torch.Tensor],
    config: Qwen2VLConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    whole_vision: bool = True,
) -> dict[str, torch.Tensor]:
    """Tensors under our full names (global layer numbers), this tensor-parallel rank's part of each.

    whole_vision: the ViT and the merger are whole on each of these ranks.
    """

    def column(x):
        return x.chunk(tp_size, 0)[tp_rank]

    def row(x):
        return x.chunk(tp_size, 1)[tp_rank]

    def vocabulary(x):
        rows = config.padded_vocab_size(tp_size) - x.shape[0]
        return column(torch.cat([x, x.new_zeros(rows, x.shape[1])]))

    def qkv(q, k, v, heads, groups):
        size = q.shape[0] // heads
        parts = [x.reshape(groups, -1, size, *x.shape[1:]) for x in (q, k, v)]
        return column(torch.cat(parts, dim=1).flatten(0, 2))

    out = {}
    text, tower = "model.language_model.", "model.visual."
    out["embedding.word_embeddings.weight"] = vocabulary(hf[text + "embed_tokens.weight"])
    out["decoder.final_layernorm.weight"] = hf[text + "norm.weight"]
    out["output_layer.weight"] = vocabulary(hf.get("lm_head.weight", hf[text + "embed_tokens.weight"]))
    for i in range(config.num_layers):
        a, b = f"{text}layers.{i}.", f"decoder.layers.{i}."
        out[b + "input_layernorm.weight"] = hf[a + "input_layernorm.weight"]
        out[b + "pre_mlp_layernorm.weight"] = hf[a + "post_attention_layernorm.weight"]
        for x in ("weight", "bias"):
            q, k, v = (hf[f"{a}self_attn.{n}_proj.{x}"] for n in "qkv")
            out[b + f"self_attention.linear_qkv.{x}"] = qkv(
                q, k, v, config.num_attention_heads, config.num_query_groups
            )
        out[b + "self_attention.linear_proj.weight"] = row(hf[a + "self_attn.o_proj.weight"])
        gate, up = hf[a + "mlp.gate_proj.weight"], hf[a + "mlp.up_proj.weight"]
        out[b + "mlp.linear_fc1.weight"] = torch.cat([column(gate), column(up)])
        out[b + "mlp.linear_fc2.weight"] = row(hf[a + "mlp.down_proj.weight"])
    if whole_vision:
        tp_rank, tp_size = 0, 1
    if tower + "patch_embed.proj.weight" in hf:
        out["vision.patch_embed.weight"] = hf[tower + "patch_embed.proj.weight"].flatten(1)
    for i in range(config.vision.depth if f"{tower}blocks.0.norm1.weight" in hf else 0):
        a, b = f"{tower}blocks.{i}.", f"vision.decoder.layers.{i}."
        for x in ("weight", "bias"):
            out[b + f"input_layernorm.{x}"] = hf[a + f"norm1.{x}"]
            out[b + f"pre_mlp_layernorm.{x}"] = hf[a + f"norm2.{x}"]
            parts = hf[a + f"attn.qkv.{x}"].chunk(3, 0)
            out[b + f"self_attention.linear_qkv.{x}"] = qkv(*parts, config.vision.num_heads, config.vision.num_heads)
            out[b + f"mlp.linear_fc1.{x}"] = column(hf[a + f"mlp.fc1.{x}"])
        for ours, theirs in (("self_attention.linear_proj", "attn.proj"), ("mlp.linear_fc2", "mlp.fc2")):
            out[b + f"{ours}.weight"] = row(hf[a + f"{theirs}.weight"])
            out[b + f"{ours}.bias"] = hf[a + f"{theirs}.bias"]
    for x in ("weight", "bias"):
        out[f"vision.merger.ln_q.{x}"] = hf[f"{tower}merger.ln_q.{x}"]
        out[f"vision.merger.linear_fc1.{x}"] = column(hf[f"{tower}merger.mlp.0.{x}"])
    out["vision.merger.linear_fc2.weight"] = row(hf[f"{tower}merger.mlp.2.weight"])
    out["vision.merger.linear_fc2.bias"] = hf[f"{tower}merger.mlp.2.bias"]
    return out


def full_name(model, name: str) -> str:
    """A parameter's name with its layer's number in the whole decoder."""
    if not name.startswith("decoder.layers."):
        return name
    head, number, rest = "decoder.layers.", *name.removeprefix("decoder.layers.").split(".", 1)
    return f"{head}{model.decoder.layers[int(number)].layer_number - 1}.{rest}"


@torch.no_grad()
def copy_weights(models: list, hf: dict[str, torch.Tensor], config: Qwen2VLConfig, **cut) -> None:
    """transformers' weights into our stages; every parameter must be found and fit.  cut: as `to_ours` has it."""
    tensors = to_ours(hf, config, **cut)
    for model in models:
        for name, parameter in model.named_parameters():
            source = tensors[full_name(model, name)]
            assert source.shape == parameter.shape, (name, source.shape, parameter.shape)
            parameter.copy_(source)
