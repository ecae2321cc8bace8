"""What FP8 adds to and takes from a rank's memory, read from Transformer Engine 2.9's source; measured on no GPU.

All names are of transformer_engine/pytorch:

- A product's operands must be contiguous along the summed dimension (before compute capability 10, and blocks are
  scaled along it anywhere), so that a weight is there twice: as it is for the forward, transposed for the inputs'
  gradient (module/linear.py: `set_usage(rowwise=True, columnwise=...)`).  Megatron's layers say which micro-batch is
  the first of a step, and both copies are kept from step to step (module/base.py: `get_weight_workspace`).
- FP8 weights are these two copies and nothing in bf16 beside them (`get_weight_workspace` returns them as they are).
- An input is kept for backward in one copy (module/linear.py and layernorm_linear.py: `update_usage` drops the other):
  the norms' outputs and the product before fc2 instead of the same in bf16, and the attention's output beside the bf16
  one that the attention keeps itself.
- Scales: fp32 for 128 numbers in a row of inputs and 128 x 128 of weights (blockwise), 1 byte for 32 (mxfp8), one a
  tensor else.

What a product takes while it runs is counted as in bf16.
"""

import re

from umer1.models.fp8 import FP8Config
from umer1.plan.parameters import Parameter

_MATRIX = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)\.linear_\w+\.weight")
_OF_INPUTS = {"tensorwise": 1.0, "delayed": 1.0, "blockwise": 1 + 4 / 128, "mxfp8": 1 + 1 / 32}
_OF_WEIGHTS = _OF_INPUTS | {"blockwise": 1 + 4 / 128**2}


def multiplies_in_fp8(fp8: FP8Config, parameter: Parameter, num_layers: int) -> bool:
    """Whether a parameter is a matrix of an FP8 product."""
    found = _MATRIX.fullmatch(parameter.name) if fp8.fp8_format else None
    return found is not None and not fp8.keeps_in_bf16(int(found[1]), num_layers)


def weight_bytes(fp8: FP8Config, chunks: list[list[Parameter]], num_layers: int) -> int:
    """Of both copies of a rank's matrices and their scales, beyond its weights; FP8 weights are one of the copies."""
    if fp8.fp8_format is None:
        return 0
    parameters = (parameter for chunk in chunks for parameter in chunk)
    numbers = sum(each.numel for each in parameters if multiplies_in_fp8(fp8, each, num_layers))
    return int(numbers * (2 * _OF_WEIGHTS[fp8.fp8_recipe] - fp8.fp8_param_gather))


def saved_change(fp8: FP8Config, *, norms: float, attention: float, product: float, itemsize: int) -> int:
    """Bytes that an FP8 layer keeps for backward beyond a bf16 one's; in numbers: both norms' outputs, the attention's
    output, and fc2's input."""
    if fp8.fp8_format is None:
        return 0
    each = _OF_INPUTS[fp8.fp8_recipe]
    return int((each - itemsize) * (norms + product) + each * attention)
