"""Let megatron-core 0.16.1 run where there is no GPU: CPU tensors, gloo groups.

Megatron asks torch.cuda for "the current device" wherever it makes a buffer.  `enable()` gives every megatron.core
module its own view of `torch`, in which that device is the CPU and streams and events do nothing; torch itself and all
other libraries keep the real one.  The sites that need it:

- tensor_parallel/random.py seeds and the RNG tracker (routed to the CPU generator);
- tensor_parallel/mappings.py and layers.py: buffers of gathers and scatters;
- pipeline_parallel/p2p_communication.py: receive buffers, and schedules.py: token counts;
- distributed/param_and_grad_buffer.py and finalize_model_grads.py: gradient buffers, streams;
- optimizer/*: the grad-norm tensors, and comparisons of `Tensor.type()` with "torch.cuda.FloatTensor";
- models/common/language_module.py: `weight.data.cuda()`.

With CUDA present nothing is touched.
"""

import contextlib
import functools
import logging
import sys
import types

import torch

from umer1 import device as devices

CPU = torch.device("cpu")


class _View(types.ModuleType):
    """A module that answers with its own attributes first and with the real module's after."""

    def __init__(self, real: types.ModuleType, **own):
        super().__init__(real.__name__)
        self.__dict__.update(own, _real=real)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_real"], name)


class _Inert:
    """Stands in for a CUDA stream or event: every method does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def _nothing(*args, **kwargs) -> None:
    return None


def _on_cpu(factory):
    """A tensor factory that reads device="cuda..." as the CPU and pins no memory."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _get_rng_state(*args, **kwargs) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args, **kwargs) -> None:
    torch.set_rng_state(state)


def _torch_view() -> _View:
    cuda = _View(
        torch.cuda,
        current_device=lambda: CPU,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        Stream=_Inert,
        Event=_Inert,
        current_stream=_Inert,
        default_stream=_Inert,
        stream=lambda *args: contextlib.nullcontext(),
        nvtx=_View(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing),
    )
    names = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
    return _View(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in names})


def _with_cuda_type_names(function):
    """Within `function`, Tensor.type() says "torch.cuda.FloatTensor", the string megatron's optimizers compare."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        real = torch.Tensor.type
        torch.Tensor.type = lambda tensor, *a, **k: (
            real(tensor, *a, **k) if a or k else real(tensor).replace("torch.", "torch.cuda.")
        )
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = real

    call.umer1_cpu = True
    return call


_VIEW: _View | None = None


def enable() -> None:
    """Idempotent; to be called before anything of megatron is built.  Does nothing where CUDA is."""
    global _VIEW
    if devices.has_cuda():
        return
    # Every module that is used must be loaded before it can be given its view.
    import megatron.core.dist_checkpointing.strategies.fully_parallel
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.distributed.finalize_model_grads
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer as optimizers
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.transformer_block  # noqa: F401
    from megatron.core.optimizer import distrib_optimizer, optimizer

    _VIEW = _VIEW or _torch_view()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _VIEW
    rng._get_cuda_rng_state, rng._set_cuda_rng_state = _get_rng_state, _set_rng_state
    logging.getLogger(rng.__name__).setLevel(logging.ERROR)
    logging.getLogger(optimizers.__name__).setLevel(logging.ERROR)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    for owner, attribute in (
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        (distrib_optimizer.DistributedOptimizer, "__init__"),
        (optimizer, "clip_grad_by_total_norm_fp32"),
    ):
        function = getattr(owner, attribute)
        if not hasattr(function, "umer1_cpu"):
            setattr(owner, attribute, _with_cuda_type_names(function))
