"""Embeddings out of hidden states: N rows of [T, H], final RMSNorm, L2 normalisation to fp32.

    pytest perf/bench_gather_hidden.py [--sizes cpu|gpu] [--benchmark-json FILE]

Work is what the rows that are read move; with backward also the gradient [T, H], zeros included, written once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Cost, Provider, Results
from suite import Case, Suite

EPS = 1e-6


@dataclass
class Inputs:
    hidden: torch.Tensor  # [T, H]
    index: torch.Tensor  # int64 [N]
    weight: torch.Tensor  # [H]
    upstream: torch.Tensor | None  # fp32 [N, H]; None for the forward alone


COMPILED = "cuda" if torch.cuda.is_available() else "auto"  # C++ on the CPU


def make_inputs(case: Case, place: torch.device) -> Inputs:
    tokens, width, rows = (case.shape[name] for name in ("T", "H", "N"))
    hidden = torch.randn(tokens, width, device=place).to(case.dtype)
    weight = (1 + 0.1 * torch.randn(width, device=place)).to(case.dtype)
    index = torch.randperm(tokens, device=place)[:rows]
    upstream = torch.randn(rows, width, device=place) if case.mode != "forward" else None
    return Inputs(hidden, index, weight, upstream)


def rms_norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers' Qwen2 has it: in fp32 (fp64 for fp64), rounded, times the weight."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * normed.to(rows.dtype)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)


def norm_everything(hidden, index, weight):
    """What a model does whose final norm does not know which rows are read."""
    return unit(rms_norm(hidden, weight).index_select(0, index))


def index_first(hidden, index, weight):
    return unit(rms_norm(hidden.index_select(0, index), weight))


def timed(function: Callable) -> Callable[[Inputs], Callable]:
    def make(inputs: Inputs) -> Callable[[], Results]:
        if inputs.upstream is None:

            def forward() -> Results:
                with torch.no_grad():
                    return {"rows": function(inputs.hidden, inputs.index, inputs.weight)}

            return forward
        hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()

        def both() -> Results:
            rows = function(hidden, inputs.index, weight)
            upstream = inputs.upstream.to(rows.dtype)
            gradients = torch.autograd.grad(rows, (hidden, weight), upstream)
            return {"rows": rows.detach(), "hidden gradient": gradients[0], "weight gradient": gradients[1]}

        return both

    return make


def compiled(function: Callable) -> Callable[[Inputs], Callable]:
    return lambda inputs: timed(torch.compile(function, dynamic=False))(inputs)


def umer1(impl: str) -> Callable[[Inputs], Callable]:
    def rows(hidden, index, weight):
        from umer1.ops.gather_hidden import gather_hidden

        return gather_hidden(hidden, index, norm_weight=weight, eps=EPS, l2_normalize=True, impl=impl)

    return timed(rows)


def no_extension(inputs: Inputs) -> str | None:
    from umer1.ops.extension import extension_obstacle

    return extension_obstacle(inputs.hidden.device)


def reference(inputs: Inputs) -> Results:
    """The rounding between norm and weight is a part of the model and not of the reference."""
    upstream = None if inputs.upstream is None else inputs.upstream.double()
    wide = Inputs(inputs.hidden.double(), inputs.index, inputs.weight.double(), upstream)
    return timed(index_first)(wide)()


def cost(case: Case) -> Cost:
    tokens, width, rows = (case.shape[name] for name in ("T", "H", "N"))
    item = case.dtype.itemsize
    moved = rows * width * (item + 4) + width * item
    if case.mode != "forward":  # rows and upstream read, the gradient written
        moved += rows * width * (item + 4) + tokens * width * item + 2 * width * item
    return Cost(flops=0.0, bytes=float(moved), dtype=case.dtype)


def sized(tokens: int, width: int, rows: int, dtype: torch.dtype, mode: str = "forward") -> Case:
    return Case(shape={"T": tokens, "H": width, "N": rows}, dtype=dtype, mode=mode)


BF16, BOTH = torch.bfloat16, "forward + backward"
SUITE = Suite(
    name="gather_hidden",
    cases={
        "tiny": [sized(40, 24, 7, torch.float32), sized(40, 24, 7, BF16, BOTH)],
        "cpu": [sized(4096, 1536, 64, BF16), sized(4096, 1536, 64, BF16, BOTH)],
        "gpu": [  # the target's first
            sized(32768, 3584, 512, BF16),
            sized(32768, 3584, 512, BF16, BOTH),
            sized(32768, 1536, 512, BF16),
            sized(8192, 1536, 32, BF16),
        ],
    },
    providers=[
        Provider(name="torch eager, norm everything", make=timed(norm_everything)),
        Provider(name="torch eager", make=timed(index_first)),
        Provider(name="torch.compile", make=compiled(index_first)),
        Provider(name="umer1 torch", make=umer1("torch"), ours=True),
        Provider(
            name="umer1 compiled",
            make=umer1("cuda" if torch.cuda.is_available() else "auto"),
            ours=True,
            fits=no_extension,
        ),
    ],
    inputs=make_inputs,
    reference=reference,
    cost=cost,
)


def test_gather_hidden(case, provider, bench, benchmark):
    bench(case, provider, benchmark)
