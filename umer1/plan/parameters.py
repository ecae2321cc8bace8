"""What each rank holds of the model: every tensor of the weight table with the size of this rank's part of it."""

import re
from dataclasses import dataclass
from math import prod

from umer1.distributed.parallel import ParallelConfig
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.weight_table import hf_shapes, rows
from umer1.plan.layout import stage_layers


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor on one rank."""

    name: str
    numel: int
    trained: bool
    shared: bool = False
    """The embedding or its copy in the head of another stage: megatron gives it a bucket of its own."""


# The order in which megatron's local modules hold them, which decides how the gradient buffer is cut over ranks.
_PARTS = ("vision.patch_embed", "vision.decoder.layers", "vision.merger", "embedding", "decoder.layers")
_PARTS += ("decoder.final_layernorm", "output_layer")
_INSIDE = ("input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv", "pre_mlp_layernorm")
_INSIDE += ("ln_q", "mlp.linear_fc1", "mlp.linear_fc2", "linear_fc1", "linear_fc2")


def _position(name: str) -> tuple[int, int, int]:
    part = next(number for number, prefix in enumerate(_PARTS) if name.startswith(prefix))
    layer, inside = re.fullmatch(r"\.?(\d*)\.?(.*?)\.?(?:weight|bias)", name.removeprefix(_PARTS[part])).groups()
    return part, int(layer or 0), _INSIDE.index(inside) if inside in _INSIDE else 0


def stage_parameters(
    config: Qwen2VLConfig, parallel: ParallelConfig, stage: int, train_vision: bool
) -> list[list[Parameter]]:
    """Parameters of a tensor-parallel rank of pipeline stage `stage`, one list for each of its virtual stages.

    All tensor-parallel ranks hold equally many.  In the order of the modules' named_parameters().
    """
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shapes, padded = hf_shapes(config), config.padded_vocab_size(tp)
    own_layers = stage_layers(parallel, config.num_layers, stage)
    tied, chunks = config.tie_word_embeddings, []
    for number, layers in enumerate(own_layers):
        first = stage == 0 and number == 0
        last = stage == stages - 1 and number == len(own_layers) - 1
        found = []
        for row in rows(config):
            layer = re.match(r"decoder\.layers\.(\d+)\.", row.name)
            head = row.name == "output_layer.weight"
            if layer:
                here = int(layer[1]) in layers
            elif row.name.startswith("decoder.final"):
                here = last
            elif head:
                here = last and not (first and tied)  # a head on the embedding's stage uses its weight
            else:
                here = first
            if not here:
                continue
            if row.layout.vocabulary:
                numel = padded * config.hidden_size // tp
            else:
                cut = parallel.vision_tensor_parallel_size if row.name.startswith("vision.") else tp
                numel = sum(prod(shapes[name]) for name in row.hf) // (1 if row.layout.axis is None else cut)
            frozen = row.name.startswith(("vision.patch_embed", "vision.decoder")) and not train_vision
            shared = tied and stages > 1 and row.layout.vocabulary
            found.append(Parameter(row.name, numel, not frozen, shared))
        chunks.append(sorted(found, key=lambda parameter: _position(parameter.name)))
    return chunks
