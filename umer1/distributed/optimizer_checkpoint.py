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
"""

import functools
import types
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_KEYS = ("param", "exp_avg", "exp_avg_sq")


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
    """fp32 CPU copies of the main weights and both moments of every buffer, padding included, on every rank.

    Stands for get_parameter_state_dp_zero: buffer number -> dtype -> key -> [buffer's padded size], so that
    `param_index_map` indexes it.  `empty_data`: zeros, to be filled by a load.
    """
    size, group = self.data_parallel_group.size(), self.data_parallel_group
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(self.gbuf_ranges):
        buffer = self.buffers[number]
        ((dtype, buckets),) = ranges.items()
        whole = {key: torch.zeros(buffer.numel, dtype=torch.float32) for key in _KEYS}
        for bucket, bucket_ranges in zip(buffer.buckets, buckets, strict=True):
            if empty_data:
                break
            length = bucket.grad_data.numel()
            for key, tensor in _own_shards(self, bucket_ranges, length // size).items():
                mine = tensor.to(bucket.grad_data.device)
                gathered = torch.empty(length, dtype=torch.float32, device=mine.device)
                dist.all_gather_into_tensor(gathered, mine, group=group)
                whole[key][bucket.offset : bucket.offset + length].copy_(gathered)
        state[number] = {dtype: whole}
    return state


def _own_shards(self, bucket_ranges: dict[str, Any], length: int) -> dict[str, torch.Tensor]:
    """This rank's part of one bucket, [length] for each key."""
    shards = {key: torch.zeros(length, dtype=torch.float32) for key in _KEYS}
    for parameter, ranges in bucket_ranges["param_map"].items():
        tensors = self._get_main_param_and_optimizer_states(parameter)
        place = slice(ranges["gbuf_local"].start, ranges["gbuf_local"].end)
        for key in _KEYS:
            shards[key][place].copy_(tensors[key].detach())
    return shards
