"""A stand-in for Transformer Engine's FP8 weights (Float8Tensor) on the CPU, for megatron's real DistributedOptimizer.

Not Transformer Engine: bytes are made by torch's float8_e4m3fn with one scale for a weight, and products are made in
bf16 of what the bytes stand for.  What it has in common with it: a weight says that it is bf16; its bytes lie in the
buffer that megatron gathers; forward reads them, and backward a transposed copy that is made anew after a gather; the
optimizer's fp32 weights are rounded to bf16 first, their largest value is taken over the data-parallel ranks, and each
rank casts its part; with delayed scaling the scale is the module's and the largest value goes into its history; a
weight keeps the values that it was initialised with until the optimizer has taken them.
"""

from types import SimpleNamespace

import umer1.megatron_import  # noqa: F401

import torch
import torch.distributed as dist
from fp8_stand_in import StandInTransformerEngine
from megatron.core import fp8_utils
from megatron.core.distributed import param_and_grad_buffer
from torch.utils._pytree import tree_map

from umer1.models.qwen2_vl.weights import unwrap
from umer1.training import build

LARGEST = 448.0  # of e4m3
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
WEIGHT = 1  # its place among the tensors of a module's scaling_fwd
aten = torch.ops.aten


class StandInFP8Tensor(torch.Tensor):
    """A matrix of bytes, seen as bf16."""

    @staticmethod
    def __new__(cls, data, transpose, scale_inv, delayed):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)

    def __init__(self, data, transpose, scale_inv, delayed):
        self._data, self._transpose, self._scale_inv, self.delayed = data, transpose, scale_inv, delayed

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is aten.detach.default:
            weight = args[0]
            return cls(weight._data, weight._transpose, weight._scale_inv, weight.delayed)
        if function is aten.copy_.default and isinstance(args[0], cls):
            args[0].quantize_(args[1])
            return args[0]
        # backward's product with the weight as it lies there: what the hardware reads for it is the transposed copy
        backward = function is aten.mm.default
        plain = tree_map(lambda each: each.plain(backward) if isinstance(each, cls) else each, (args, kwargs or {}))
        return function(*plain[0], **plain[1])

    def plain(self, backward=False):
        data = self._transpose.t() if backward else self._data
        return (data.view(torch.float8_e4m3fn).float() * self._scale_inv).bfloat16()

    def dequantize(self):
        return self.plain()

    def quantize_(self, values):
        values = values.bfloat16().float()
        largest = values.abs().max()
        self._data.copy_(_bytes(values, self.scale(largest)))
        self.make_transpose()

    def scale(self, largest):
        """Of a cast of values with this largest one; also the note of both."""
        if self.delayed is None:
            scale = LARGEST / largest if largest > 0 else torch.tensor(1.0)
        else:
            scale, seen = self.delayed.scale[WEIGHT], self.delayed.amax_history[0, WEIGHT]
            seen.copy_(torch.maximum(seen, largest))
        self._scale_inv.copy_(1 / scale)
        return scale

    def make_transpose(self):
        self._transpose.copy_(self._data.t())


def _bytes(values, scale):
    return (values * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def _cast_master_weights(weights, mains, starts, group, fsdp=None):
    """Transpose copies stay as they are, for `_post_all_gather_processing`."""
    mains = [None if main is None else main.bfloat16().float() for main in mains]
    largest = torch.tensor([0.0 if main is None else float(main.abs().max()) for main in mains])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    for weight, main, start, most in zip(weights, mains, starts, largest, strict=True):
        scale = weight.scale(most)
        if main is not None:
            weight._data.view(-1)[start : start + main.numel()].copy_(_bytes(main, scale))


def _post_all_gather_processing(weights):
    for weight in weights:
        weight.make_transpose()


def _replace_raw_data(weight, data):
    data.copy_(weight._data)
    weight._data = data


def _gather(output, mine, **options):
    """megatron gathers FP8 and bf16 weights in one call, for which gloo turns bytes into numbers of the other type."""
    if output.dtype == torch.uint8:
        output, mine = output.view(torch.bfloat16), mine.view(torch.bfloat16)
    return dist.all_gather_into_tensor(output, mine, **options)


def in_fp8(linear) -> None:
    """Give one of megatron's linear layers an FP8 weight, as a model made inside `fp8_model_init` has it."""
    old = linear.weight
    delayed = linear.fp8_meta["scaling_fwd"] if hasattr(linear, "fp8_meta") else None
    data = torch.zeros(old.shape, dtype=torch.uint8)
    weight = torch.nn.Parameter(StandInFP8Tensor(data, data.t().contiguous(), torch.ones(1), delayed))
    for name, value in vars(old).items():
        setattr(weight, name, value)
    kept = [old.detach().clone()]
    weight.get_high_precision_init_val = lambda: kept[0] if kept else None
    weight.clear_high_precision_init_val = kept.clear
    linear.weight = weight


def install(monkeypatch) -> SimpleNamespace:
    """Give megatron stand-ins for what it imports from Transformer Engine, and models with fp8_param FP8 weights.

    Returned: `engine`, of the model built last with delayed scaling, else None.
    """
    found = SimpleNamespace(engine=None)
    plain = build.build_model

    def build_model(*args, fp8, **options):
        models = plain(*args, fp8=fp8, **options)
        found.engine = None
        if fp8.fp8_param_gather:
            if fp8.fp8_recipe == "delayed":
                found.engine = StandInTransformerEngine(fp8.fp8_amax_history_len, fp8.fp8_amax_compute_algo)
            for decoder in (unwrap(model).decoder for model in models):
                for name, module in decoder.named_modules():
                    if name.rsplit(".", 1)[-1] in LINEARS:
                        if found.engine:
                            found.engine.install(module)
                            module.init_fp8_meta_tensors(None)
                        in_fp8(module)
                if found.engine:
                    found.engine.autocast(decoder)
        return models

    monkeypatch.setattr(build, "build_model", build_model)
    for name, value in {
        "HAVE_TE_FP8_TENSOR_CLASS": True,
        "FP8_TENSOR_CLASS": StandInFP8Tensor,
        "is_te_min_version": lambda *args, **options: True,
        "te_post_all_gather_processing": _post_all_gather_processing,
        "_modify_underlying_storage_impl": _replace_raw_data,
        "_quantize_param_shard_impl": _cast_master_weights,
    }.items():
        monkeypatch.setattr(fp8_utils, name, value)
    monkeypatch.setattr(param_and_grad_buffer, "dist_all_gather_func", _gather)
    return found
