"""AdamW's states and the fp32 main weights in host memory, updated there: 12 bytes a parameter less on the device.

megatron-core 0.16.1's own HybridDeviceOptimizer tells what to move by `Tensor.is_cuda` and fails where there is no GPU,
so that nothing could test it here.  This keeps DistributedOptimizer as it is but for where its main weights are:
gradients stay on the device, where their norm is taken and they are clipped, are copied to the host for the update, and
the updated weights are rounded into the model's as they always are.
"""

import types
from collections.abc import Iterator

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import param_is_not_shared

from umer1 import device


class HostAdamW(torch.optim.AdamW):
    """AdamW of parameters whose gradient is `decoupled_grad`, perhaps on another device (megatron's word for one that
    is kept apart from `grad`).  Groups count their steps as Transformer Engine's do, which megatron's checkpoints read
    where that is installed."""

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, fused=True, **options)
        self.grads: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> its gradient's copy beside it

    @torch.no_grad()
    def step(self, closure=None):
        """torch's step, from copies of the gradients beside the parameters (in page-locked memory where a GPU is)."""
        for parameter in self._parameters():
            source = getattr(parameter, "decoupled_grad", None)
            if source is not None:
                if parameter not in self.grads:
                    self.grads[parameter] = device.pinned(torch.empty_like(parameter))
                parameter.grad = self.grads[parameter].copy_(source, non_blocking=True)
        device.synchronize()
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's own; a group's count of steps is the one of its parameters, too."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"] if "step" in group else ():
                if self.state.get(parameter):
                    self.state[parameter]["step"] = torch.tensor(float(group["step"]))

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])


def move_to_host(optimizer: DistributedOptimizer) -> None:
    """Move main weights to the host and let HostAdamW update them there; before the first step, and once."""
    inner = optimizer.optimizer
    if inner is None:  # this rank updates nothing
        return
    for group in optimizer.shard_fp32_from_float16_groups:
        for main in group:
            main.data = device.pinned(main.data.cpu())
    optimizer.optimizer = HostAdamW(inner.param_groups)
    optimizer._copy_model_grads_to_main_grads = types.MethodType(_point_at_gradients, optimizer)
    optimizer.get_main_grads_for_grad_norm = types.MethodType(_gradients_for_norm, optimizer)


def gradients_apart(optimizer: object) -> bool:
    """Whether gradients are in `decoupled_grad`."""
    return isinstance(getattr(optimizer, "optimizer", None), HostAdamW)


def _point_at_gradients(self) -> None:
    """In place of _copy_model_grads_to_main_grads: views of the gradient buffer, nothing is copied yet."""
    pairs = ((self.model_float16_groups, self.shard_fp32_from_float16_groups),)
    pairs += ((self.model_fp32_groups, self.shard_fp32_groups),)
    for model_groups, main_groups in pairs:
        for models, mains in zip(model_groups, main_groups, strict=True):
            for model, main in zip(models, mains, strict=True):
                place = self._get_model_param_range_map(model)["param"]
                main.decoupled_grad = model.main_grad.view(-1)[place.start : place.end]


def _gradients_for_norm(self) -> list[torch.Tensor]:
    """In place of get_main_grads_for_grad_norm: each gradient once, whatever ranks hold a copy of the parameter."""
    group = getattr(self, "tp_group", None)
    return [
        parameter.decoupled_grad
        for parameter in self.get_parameters()
        if getattr(parameter, "decoupled_grad", None) is not None
        and param_is_not_shared(parameter)
        and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter, group)
    ]
