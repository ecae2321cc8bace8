"""Checkpoints of megatron 0.16.1's optimizers, made exact: four faults of DistributedOptimizer are mended here.

megatron/core/optimizer/distrib_optimizer.py; the first three only where neither Transformer Engine nor Apex is
installed, so that the optimizer is torch.optim.AdamW, whose step is a tensor in each parameter's state:

1. `state_dict` (line 641) asserts that every parameter has a state, which AdamW makes at its first step;
2. `_set_main_param_and_optimizer_states` (line 938) copies every entry of the state, "step" too, out of tensors from
   which its callers have just left "step" out: KeyError;
3. `load_state_dict` (line 821) gives ONE step tensor to all parameters, so that AdamW, which adds 1 in place for each
   parameter, counts one step per parameter: the first step after a resume is right and the following are not;
4. `get_parameter_state_dp_zero` (line 977) lays buckets one after the other without the padding at their ends, and its
   caller (line 1482) cuts parameters out at offsets that count the padding.  With more than one bucket (tied embeddings
   over pipeline stages, overlap_grad_reduce) and a bucket that is no multiple of the padding unit, all that follows is
   saved shifted or as zeros.

FP8 weights have a buffer of their own beside the other weights'.  Files get none of them, but their main weights,
rounded to the type that an FP8 weight stands for.
"""

import functools
import types
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from umer1 import device as devices
from umer1.distributed.fp8_weights import distributed_parts, is_fp8

_KEYS = ("param", "exp_avg", "exp_avg_sq")
_ROUNDED = "rounded"  # main weights of FP8 weights, in these weights' nominal type
_GATHERED = 1 << 26  # elements of all ranks in one gather of a save: 256 MiB on the device


def mend(optimizer: Any) -> None:
    """Make `optimizer` (from get_megatron_optimizer) save and load exactly.  Idempotent."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if hasattr(part, "umer1_mended"):
            continue
        part.umer1_mended = True
        distributed = isinstance(part, DistributedOptimizer)
        if isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            part.load_state_dict = types.MethodType(_load_state_dict(type(part).load_state_dict), part)
            if distributed:
                set_states = type(part)._set_main_param_and_optimizer_states
                part.state_dict = types.MethodType(_state_dict(type(part).state_dict), part)
                part._set_main_param_and_optimizer_states = types.MethodType(_set_states(set_states), part)
        if distributed:
            part.get_parameter_state_dp_zero = types.MethodType(_whole_buffers, part)


def _state_dict(original):
    @functools.wraps(original)
    def state_dict(self):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return original(self)

    return state_dict


def _set_states(original):
    @functools.wraps(original)
    def set_states(self, model_param, tensors):
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        return original(self, model_param, {"step": state["step"], **tensors})

    return set_states


def _load_state_dict(original):
    @functools.wraps(original)
    def load_state_dict(self, state_dict):
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()

    return load_state_dict


def _whole_buffers(self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False):
    """Main weights and both moments of every buffer, padding included, fp32, on every rank.

    Stands for get_parameter_state_dp_zero: buffer number -> dtype -> key -> [buffer's padded size], so that
    `param_index_map` indexes it.  `empty_data`: zeros in host memory, to be filled by a load.  For a save only shapes
    ("meta" tensors): no rank needs all of it, and `gather_states` brings what a rank writes.
    """
    place = "cpu" if empty_data else "meta"
    whole = [
        {key: torch.zeros(buffer.numel, dtype=torch.float32, device=place) for key in _KEYS} for buffer in self.buffers
    ]
    if not empty_data:
        self.umer1_outlines = [keys | outline for keys, outline in zip(whole, _rounded_outlines(self), strict=True)]
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(self.gbuf_ranges):
        (dtype,) = ranges
        state[number] = {dtype: whole[number]}
    return state


def _rounded_outlines(part: DistributedOptimizer) -> list[dict[str, torch.Tensor]]:
    """For each buffer what stands for its main weights, rounded; nothing for a buffer that is not of FP8 weights."""
    return [
        {_ROUNDED: torch.empty(buffer.numel, dtype=buffer.params[0].dtype, device="meta")}
        if is_fp8(buffer.params[0])
        else {}
        for buffer in part.buffers
    ]


def rounded_shapes(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """FP8 weight -> its shape in its nominal type, for `gather_states` to fill with the main weight, rounded.

    Of a distributed optimizer between `sharded_state_dict` for a save and `gather_states`.
    """
    found = {}
    for part in distributed_parts(optimizer):
        for buffer, outlines in zip(part.buffers, part.umer1_outlines, strict=True):
            if _ROUNDED in outlines:
                for parameter, (start, end, _) in buffer.param_index_map.items():
                    found[parameter] = outlines[_ROUNDED][start:end].view(parameter.shape)
    return found


def rounded_main_weights(optimizer: Any, *, wanted: bool) -> dict[torch.nn.Parameter, torch.Tensor]:
    """FP8 weight -> its main weight rounded to its nominal type, whole, in host memory; collective over DP.

    On ranks that do not want them, and of a run without FP8 weights: nothing.
    """
    for part in distributed_parts(optimizer):
        part.umer1_outlines = _rounded_outlines(part)
    shapes = rounded_shapes(optimizer) if wanted else {}
    found = {parameter: torch.empty(shape.shape, dtype=shape.dtype) for parameter, shape in shapes.items()}
    gather_states(optimizer, [(shape, found[parameter]) for parameter, shape in shapes.items()])
    devices.synchronize()
    return found


def gather_states(optimizer: Any, wanted: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Bring the data of an optimizer's sharded state dict, of which a save has only shapes; collective over DP.

    wanted: (tensor of the state dict or of `rounded_shapes` on "meta", contiguous tensor of as many elements that takes
    its data), those that this rank writes.  Copies may still be on their way to page-locked memory on return.
    """
    targets: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for outline, target in wanted:
        assert outline.is_contiguous(), outline.stride()
        place = targets.setdefault(outline.untyped_storage()._cdata, [])
        place.append((outline.storage_offset(), target.view(-1)))
    for part in distributed_parts(optimizer):
        for buffer, ranges, outlines in zip(part.buffers, part.gbuf_ranges, part.umer1_outlines, strict=True):
            (buckets,) = ranges.values()
            of_keys: dict[str, list[tuple[int, torch.Tensor]]] = {}
            for name, outline in outlines.items():
                key = "param" if name == _ROUNDED else name
                of_keys.setdefault(key, []).extend(targets.pop(outline.untyped_storage()._cdata, []))
            for bucket, bucket_ranges in zip(buffer.buckets, buckets, strict=True):
                for key, places in of_keys.items():
                    _gather_bucket(part, bucket, bucket_ranges, key, places)
        del part.umer1_outlines
    assert not targets, "shapes of another optimizer"


def _gather_bucket(part, bucket, bucket_ranges: dict[str, Any], key: str, targets: list[tuple[int, torch.Tensor]]):
    """Give every target that lies in the bucket its data, by gathers of at most _GATHERED elements.

    targets: (first element in the buffer, [elements]).  A rank owns a consecutive share of the bucket.
    """
    group, size = part.data_parallel_group, part.data_parallel_group.size()
    total = bucket.grad_data.numel()
    share = total // size
    mine = _own_share(part, bucket_ranges, key, share, bucket.grad_data.device)
    here = [(start - bucket.offset, target) for start, target in targets if 0 <= start - bucket.offset < total]
    piece = min(share, max(1, _GATHERED // size))
    gathered = torch.empty(size * piece if size > 1 else 0, dtype=torch.float32, device=mine.device)
    for first in range(0, share, piece):
        length = min(piece, share - first)
        of_ranks = mine[first : first + length]
        if size > 1:
            of_ranks = gathered[: size * length]
            dist.all_gather_into_tensor(of_ranks, mine[first : first + length], group=group)
        for start, target in here:
            end = start + target.numel()
            for owner in range(start // share, (end - 1) // share + 1):
                begin = owner * share + first
                low, high = max(start, begin), min(end, begin + length)
                if low < high:
                    source = of_ranks[owner * length + low - begin : owner * length + high - begin]
                    target[low - start : high - start].copy_(source, non_blocking=True)


def _own_share(part, bucket_ranges: dict[str, Any], key: str, length: int, device: torch.device) -> torch.Tensor:
    """This rank's share of a bucket, fp32 [length]; zeros where no parameter is."""
    share = torch.zeros(length, dtype=torch.float32, device=device)
    for parameter, ranges in bucket_ranges["param_map"].items():
        place = slice(ranges["gbuf_local"].start, ranges["gbuf_local"].end)
        share[place].copy_(part._get_main_param_and_optimizer_states(parameter)[key].detach())
    return share
