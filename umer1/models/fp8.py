"""FP8 arithmetic of the decoder's linear layers: its settings, what they ask of the machine, what megatron is told.

Transformer Engine multiplies; the ViT, the merger, embeddings, heads and losses stay in bf16 or fp32.  See
docs/fp8.md for what has been run and what has not.
"""

from dataclasses import dataclass
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.utils import get_te_version, is_te_min_version

from umer1 import device
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.rules import bound_problems

# The CUDA compute capability that each recipe's kernels begin with, the one that has them no more, and the CUDA that
# they need (transformer_engine.pytorch.quantization: check_..._support; 2.9 and later).
CAPABILITIES = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_CAPABILITIES_END = {"mxfp8": (12, 0)}
_CUDA = {"blockwise": (12, 9)}
# The Transformer Engine that megatron-core 0.16.1 takes each recipe from (megatron.core.fp8_utils.get_fp8_recipe;
# delayed is older, but since 2.0 a module's histories can be made before its first pass), and the one that its
# distributed optimizer casts fp32 to FP8 weights with.
VERSIONS = {"tensorwise": "2.2.0", "delayed": "2.0.0", "blockwise": "2.3.0", "mxfp8": "2.1.0"}
PARAM_GATHER_VERSION = "2.2.0"
FORMATS = ("hybrid", "e4m3")
AMAX_ALGORITHMS = ("most_recent", "max")


@dataclass(kw_only=True, slots=True)
class FP8Config:
    """FP8 products in the decoder's linear layers"""

    fp8_format: str | None = None
    """hybrid (e4m3, gradients of outputs in e5m2) or e4m3; unset: no FP8."""
    fp8_recipe: str = "tensorwise"
    """tensorwise: one scale a tensor (Ada, Hopper); delayed: the same, from earlier steps' largest values; blockwise
    (Hopper) and mxfp8 (Blackwell): one a block."""
    fp8_amax_history_len: int = 1
    """How many passes delayed scaling remembers the largest value of."""
    fp8_amax_compute_algo: str = "most_recent"
    """Which of them delayed scaling takes: most_recent or max."""
    fp8_param_gather: bool = False
    """Keep the decoder's matrices in FP8 alone, cast from the distributed optimizer's fp32 weights and gathered so; for
    SFT."""
    first_last_layers_bf16: bool = False
    """Keep layers at both ends of the decoder in bf16."""
    num_layers_at_start_in_bf16: int = 1
    """How many at the start, with first_last_layers_bf16."""
    num_layers_at_end_in_bf16: int = 1
    """How many at the end, with first_last_layers_bf16."""

    def violations(self) -> list[str]:
        """Every broken rule that needs no machine."""
        found = []
        if self.fp8_format is None:
            return [
                f"{name} means nothing without fp8_format"
                for name in ("first_last_layers_bf16", "fp8_param_gather")
                if getattr(self, name)
            ]
        if self.fp8_format not in FORMATS:
            found.append(f"fp8_format={self.fp8_format!r} is not legal; use {' or '.join(FORMATS)}")
        if self.fp8_recipe not in CAPABILITIES:
            found.append(f"fp8_recipe={self.fp8_recipe!r} is not legal; use {', '.join(CAPABILITIES)}")
        if self.fp8_amax_compute_algo not in AMAX_ALGORITHMS:
            legal = " or ".join(AMAX_ALGORITHMS)
            found.append(f"fp8_amax_compute_algo={self.fp8_amax_compute_algo!r} is not legal; use {legal}")
        if self.fp8_amax_history_len < 1:
            found.append(f"fp8_amax_history_len={self.fp8_amax_history_len} must be 1 or above")
        if self.fp8_recipe == "delayed" and self.first_last_layers_bf16:
            found.append("fp8_recipe=delayed updates all layers' scales together; leave first_last_layers_bf16 unset")
        if self.fp8_recipe == "mxfp8" and self.fp8_param_gather:
            found.append("fp8_param_gather does not go with fp8_recipe=mxfp8; use delayed, tensorwise or blockwise")
        counts_passes = self.fp8_amax_compute_algo == "max" and self.fp8_amax_history_len > 1
        if self.fp8_recipe == "delayed" and self.fp8_param_gather and counts_passes:
            # A weight's largest value enters the history once a step, and every micro-batch moves the history on.
            found.append(
                "fp8_param_gather with fp8_recipe=delayed needs fp8_amax_compute_algo=most_recent (or "
                "fp8_amax_history_len=1): data-parallel ranks with different numbers of micro-batches remember "
                "different steps, would cast their parts of a weight with different scales, and each would read all "
                "parts with its own"
            )
        found += bound_problems(self, 0, "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        return found

    def machine_violations(self) -> list[str]:
        """What this process's machine lacks; all of it at once."""
        if self.fp8_format is None:
            return []
        if not device.has_cuda():
            return ["fp8_format needs a CUDA device; this process has none"]
        found = []
        if not device.has_te():
            found.append(f"fp8_format needs the package transformer_engine: {device.te_obstacle()}")
        elif not is_te_min_version(self._least_version()):
            found.append(
                f"fp8_recipe={self.fp8_recipe}{' with fp8_param_gather' if self.fp8_param_gather else ''} needs "
                f"transformer_engine {self._least_version()} or above; installed is {get_te_version()}"
            )
        cuda, built = _CUDA.get(self.fp8_recipe), torch.version.cuda
        if cuda and built and tuple(map(int, built.split(".")[:2])) < cuda:
            found.append(f"fp8_recipe={self.fp8_recipe} needs CUDA {cuda[0]}.{cuda[1]} or above; torch has {built}")
        return found + self.device_violations("this device", torch.cuda.get_device_capability())

    def device_violations(self, name: str, capability: tuple[int, int]) -> list[str]:
        """What a GPU of this CUDA compute capability lacks."""
        least, end = CAPABILITIES.get(self.fp8_recipe), _CAPABILITIES_END.get(self.fp8_recipe, (99, 0))
        if self.fp8_format is None or least is None or least <= capability < end:
            return []
        below = f" and below {end[0]}.{end[1]}" if self.fp8_recipe in _CAPABILITIES_END else ""
        return [
            f"fp8_recipe={self.fp8_recipe} needs compute capability {least[0]}.{least[1]}{below}; {name} has "
            f"{capability[0]}.{capability[1]}"
        ]

    def _least_version(self) -> str:
        versions = [VERSIONS.get(self.fp8_recipe, VERSIONS["delayed"])]  # `violations` tells a recipe that is none
        versions += [PARAM_GATHER_VERSION] if self.fp8_param_gather else []
        return max(versions, key=lambda version: [int(part) for part in version.split(".")])

    def model_violations(self, model: Qwen2VLConfig, tensor_ranks: int, stages: int) -> list[str]:
        """Broken rules between FP8 and the decoder's shape on its tensor-parallel ranks and pipeline stages."""
        if self.fp8_format is None or self.fp8_recipe not in CAPABILITIES:
            return []
        multiple = get_fp8_align_size(Fp8Recipe(self.fp8_recipe))
        heads = model.num_attention_heads + 2 * model.num_query_groups
        widths = {
            "hidden_size": model.hidden_size,
            "the FFN": model.ffn_hidden_size // tensor_ranks,
            "the attention's heads": model.num_attention_heads * model.head_dim // tensor_ranks,
            "query, key and value": heads * model.head_dim // tensor_ranks,
        }
        found = [
            f"fp8_recipe={self.fp8_recipe} multiplies matrices whose sides are multiples of {multiple}; {name} has "
            f"{width} on each of tensor_model_parallel_size={tensor_ranks} ranks"
            for name, width in widths.items()
            if width % multiple
        ]
        most = model.num_layers // stages  # megatron's limit
        return found + [
            f"{name}={getattr(self, name)} must be at most {most}, the layers of one pipeline stage"
            for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
            if self.first_last_layers_bf16 and getattr(self, name) > most
        ]

    def keeps_in_bf16(self, layer: int, num_layers: int) -> bool:
        """Whether layer `layer` of the whole decoder stays in bf16 beside FP8 ones."""
        ends = self.num_layers_at_start_in_bf16, num_layers - self.num_layers_at_end_in_bf16
        return self.first_last_layers_bf16 and not ends[0] <= layer < ends[1]

    def token_multiple(self, sequence_parallel_ranks: int) -> int:
        """What a micro-batch's token count must be a multiple of, on ranks that each hold an equal part of it."""
        if self.fp8_format is None:
            return sequence_parallel_ranks
        return get_fp8_align_size(Fp8Recipe(self.fp8_recipe)) * sequence_parallel_ranks

    def transformer_settings(self) -> dict[str, Any]:
        """Arguments of megatron's TransformerConfig; none without FP8."""
        if self.fp8_format is None:
            return {}
        return dict(
            fp8=self.fp8_format,
            fp8_recipe=self.fp8_recipe,
            fp8_param=self.fp8_param_gather,
            fp8_amax_history_len=self.fp8_amax_history_len,
            fp8_amax_compute_algo=self.fp8_amax_compute_algo,
            # Data-parallel ranks may have different numbers of micro-batches, so largest values cannot be reduced over
            # them at each: ranks would wait for each other for ever.  Tensor-parallel ranks share their micro-batches.
            tp_only_amax_red=True,
            first_last_layers_bf16=self.first_last_layers_bf16,
            num_layers_at_start_in_bf16=self.num_layers_at_start_in_bf16,
            num_layers_at_end_in_bf16=self.num_layers_at_end_in_bf16,
        )


def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a weight; of one in FP8 also the unrounded values that the optimizer's fp32 weights start from.

    Transformer Engine keeps those of a weight's initialisation, here zeros, until the optimizer has taken them.
    """
    parameter.copy_(value.to(parameter.dtype))  # as the optimizer casts to FP8: from the nominal type
    unrounded = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if unrounded is not None:
        unrounded.copy_(value)
