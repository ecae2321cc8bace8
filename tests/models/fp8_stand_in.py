"""A stand-in for Transformer Engine's delayed scaling: what it does to `fp8_meta`, on the CPU, by its documented order.

Not Transformer Engine: inputs are rounded to e4m3 and gradients of outputs to e5m2 and back, and products are made in
fp32.  What it has in common with it is what a module holds and which call makes it, when histories are written, when
scales move (backward's: once a step here), and what is put aside for recomputation.
"""

from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import torch

LARGEST = {"scaling_fwd": 448.0, "scaling_bwd": 57344.0}  # of e4m3 and e5m2
TENSORS = {"scaling_fwd": 3, "scaling_bwd": 2}  # input, weight and output; gradients of output and input


class StandInTransformerEngine:
    """Global state of the stand-in modules of one model."""

    def __init__(self, history_length: int, algorithm: str):
        self.history_length, self.algorithm = history_length, algorithm
        self.modules: list[torch.nn.Module] = []
        self.phase: str | None = None  # inside a checkpointed function: "first" or "again"
        self.blind = False  # for the reference: modules neither write histories nor put copies aside

    def install(self, linear: torch.nn.Module) -> None:
        """Turn one of megatron's linear layers into a stand-in."""
        linear.fp8_meta = {}
        linear.aside = deque()
        plain = linear.forward
        linear.init_fp8_meta_tensors = lambda recipe: self._make_state(linear)
        linear.forward = lambda x, *args, **kwargs: self._forward(linear, plain, x, *args, **kwargs)
        self.modules.append(linear)

    def _make_state(self, linear) -> None:
        for key, count in TENSORS.items():
            linear.fp8_meta[key] = SimpleNamespace(
                amax_history=torch.zeros(self.history_length, count), scale=torch.ones(count)
            )

    def _forward(self, linear, plain, x, *args, **kwargs):
        if "scaling_fwd" not in linear.fp8_meta:
            self._make_state(linear)
        state = linear.fp8_meta["scaling_fwd"]
        if self.phase == "again":
            updated = state.amax_history.clone(), state.scale.clone()
            history, scale = linear.aside.popleft()
            state.amax_history.copy_(history)
            state.scale.copy_(scale)
        elif self.phase == "first" and linear.training and not self.blind:
            linear.aside.append((state.amax_history.clone(), state.scale.clone()))
        if not self.blind:
            self._note(state, x)
        rounded = self._round(x.detach(), state.scale[0], "scaling_fwd", torch.float8_e4m3fn)
        result = plain(x + (rounded - x.detach()), *args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        if output.requires_grad:
            output.register_hook(lambda gradient: self._backward(linear.fp8_meta["scaling_bwd"], gradient))
        if self.phase == "again":
            state.amax_history.copy_(updated[0])
            state.scale.copy_(updated[1])
        return result

    def _backward(self, state: SimpleNamespace, gradient: torch.Tensor) -> torch.Tensor:
        self._note(state, gradient)
        return self._round(gradient, state.scale[0], "scaling_bwd", torch.float8_e5m2)

    @staticmethod
    def _note(state: SimpleNamespace, x: torch.Tensor) -> None:
        state.amax_history[0, 0].copy_(torch.maximum(state.amax_history[0, 0], x.detach().abs().max().float()))

    @staticmethod
    def _round(x: torch.Tensor, scale: torch.Tensor, key: str, dtype: torch.dtype) -> torch.Tensor:
        return (x * scale).clamp(-LARGEST[key], LARGEST[key]).to(dtype).float().div(scale).to(x.dtype)

    def autocast(self, block: torch.nn.Module) -> None:
        """Wrap a transformer block's forward as an autocast region; its end moves histories into scales."""
        plain = block.forward

        def forward(*args, **kwargs):
            result = plain(*args, **kwargs)
            if torch.is_grad_enabled():
                self._update("scaling_fwd")
            return result

        block.forward = forward

    def end_backward(self) -> None:
        """Move the histories of backward passes into scales."""
        self._update("scaling_bwd")

    def _update(self, key: str) -> None:
        for module in self.modules:
            self._update_state(module.fp8_meta[key], LARGEST[key])

    def _update_state(self, state: SimpleNamespace, most: float) -> None:
        largest = state.amax_history.amax(0) if self.algorithm == "max" else state.amax_history[0]
        state.scale.copy_(torch.where(largest > 0, most / largest, state.scale))
        state.amax_history.copy_(state.amax_history.roll(-1, 0))
        state.amax_history[0].zero_()

    def checkpoint(self, original):
        """`megatron.core.tensor_parallel.checkpoint` that tells the modules which of its two passes they are in."""

        def checkpoint(function, distribute, *args):
            calls = iter(("first", "again"))

            def counted(*inner):
                with self._in_phase(next(calls)):
                    return function(*inner)

            return original(counted, distribute, *args)

        return checkpoint

    @contextmanager
    def _in_phase(self, phase: str):
        self.phase = phase
        try:
            yield
        finally:
            self.phase = None

    def state(self) -> list[torch.Tensor]:
        """Histories and scales, one after the other."""
        states = [module.fp8_meta[key] for module in self.modules for key in TENSORS]
        return [tensor.clone() for state in states for tensor in (state.amax_history, state.scale)]
