"""A stand-in for Transformer Engine's delayed scaling: what it does to `fp8_meta`, on the CPU, by its documented order.

Not Transformer Engine: values are rounded to e4m3 and back, and products are made in fp32.  What it has in common with
it is when histories are written, when scales move, and what is put aside for recomputation.
"""

from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import torch

LARGEST = 448.0  # of e4m3


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
        linear.forward = lambda x, *args, **kwargs: self._forward(linear, plain, x, *args, **kwargs)
        self.modules.append(linear)

    def _forward(self, linear, plain, x, *args, **kwargs):
        if "scaling_fwd" not in linear.fp8_meta:
            linear.fp8_meta["scaling_fwd"] = SimpleNamespace(
                amax_history=torch.zeros(self.history_length, 1), scale=torch.ones(1)
            )
        state = linear.fp8_meta["scaling_fwd"]
        if self.phase == "again":
            updated = state.amax_history.clone(), state.scale.clone()
            history, scale = linear.aside.popleft()
            state.amax_history.copy_(history)
            state.scale.copy_(scale)
        elif self.phase == "first" and linear.training and not self.blind:
            linear.aside.append((state.amax_history.clone(), state.scale.clone()))
        if not self.blind:
            state.amax_history[0].copy_(torch.maximum(state.amax_history[0], x.detach().abs().max()))
        rounded = (x.detach() * state.scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / state.scale
        result = plain(x + (rounded - x.detach()), *args, **kwargs)
        if self.phase == "again":
            state.amax_history.copy_(updated[0])
            state.scale.copy_(updated[1])
        return result

    def autocast(self, block: torch.nn.Module) -> None:
        """Wrap a transformer block's forward as an autocast region; its end moves histories into scales."""
        plain = block.forward

        def forward(*args, **kwargs):
            result = plain(*args, **kwargs)
            if torch.is_grad_enabled():
                for module in self.modules:
                    self._update(module.fp8_meta["scaling_fwd"])
            return result

        block.forward = forward

    def _update(self, state: SimpleNamespace) -> None:
        largest = state.amax_history.amax(0) if self.algorithm == "max" else state.amax_history[0]
        state.scale.copy_(torch.where(largest > 0, LARGEST / largest, state.scale))
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
        states = [module.fp8_meta["scaling_fwd"] for module in self.modules]
        return [tensor.clone() for state in states for tensor in (state.amax_history, state.scale)]
