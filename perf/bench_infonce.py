"""Symmetric InfoNCE of B queries against B keys, forward and backward.

    pytest perf/bench_infonce.py [--sizes cpu|gpu] [--benchmark-json FILE]

Inputs are L2-normalised with a part in common, so that negatives are hard (cosines of about 0.65 and 0.48), and the
temperature is 0.02, the paper's.  Work is counted as 4 matrix products of 2 B N D, whoever makes more or fewer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Cost, Provider, Results
from suite import Case, Suite

TEMPERATURE = 0.02
COMPILE_AT_MOST = 1024  # rows, without a GPU
COMPILED_ON_GPU = ((1024, 1536), (16384, 1536))  # [B, D]
INFCL_WIDTH = 256  # columns of one of Inf-CL's heads


@dataclass
class Inputs:
    query: torch.Tensor  # [B, D]
    key: torch.Tensor  # [B, D]

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.query.detach().requires_grad_(), self.key.detach().requires_grad_()


def make_inputs(case: Case, place: torch.device) -> Inputs:
    rows, width = case.shape["B"], case.shape["D"]
    common = torch.randn(1, width, device=place)
    base = torch.randn(rows, width, device=place)
    query = F.normalize(base + common, dim=1)
    key = F.normalize(torch.randn(rows, width, device=place) + 0.35 * base + common, dim=1)
    return Inputs(query.to(case.dtype), key.to(case.dtype))


def both_directions(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Everything in the inputs' dtype."""
    return both_directions(query @ key.T / TEMPERATURE)


def fp32_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The product is rounded to the inputs' dtype, all else is fp32."""
    return both_directions((query @ key.T).float() / TEMPERATURE)


def fp32_product(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """All in fp32, the product too."""
    return both_directions(query.float() @ key.float().T / TEMPERATURE)


def with_gradients(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Inputs], Callable]:
    def make(inputs: Inputs) -> Callable[[], Results]:
        query, key = inputs.leaves()

        def call() -> Results:
            value = loss(query, key)
            gradients = torch.autograd.grad(value, (query, key))
            return {"loss": value.detach(), "query gradient": gradients[0], "key gradient": gradients[1]}

        return call

    return make


def compiled(loss: Callable) -> Callable[[Inputs], Callable]:
    return lambda inputs: with_gradients(torch.compile(loss, dynamic=False))(inputs)


def rounds_logits(inputs: Inputs) -> str | None:
    return "the same as torch eager for fp32 inputs" if inputs.query.dtype == torch.float32 else None


def worth_compiling(inputs: Inputs) -> str | None:
    """Compiling takes longer than most of the measurements."""
    if inputs.query.device.type == "cpu":
        return "left out at this size without a GPU" if len(inputs.query) > COMPILE_AT_MOST else None
    return None if tuple(inputs.query.shape) in COMPILED_ON_GPU else "left out at this size"


def either(*rules: Callable[[Inputs], str | None]) -> Callable[[Inputs], str | None]:
    return lambda inputs: next((reason for rule in rules if (reason := rule(inputs))), None)


def inf_cl(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Inf-CL's kernels (arXiv 2410.17243), which turn bf16 inputs into fp32 themselves; one call a direction."""
    from inf_cl import cal_flash_loss

    scale, width = 1 / TEMPERATURE, min(INFCL_WIDTH, query.shape[1])
    forward = cal_flash_loss(query, key, scale=scale, head_dim=width)
    return (forward.mean() + cal_flash_loss(key, query, scale=scale, head_dim=width).mean()) / 2


def inf_cl_takes(inputs: Inputs) -> str | None:
    rows, width = inputs.query.shape
    if width % min(INFCL_WIDTH, width):
        return f"{width} columns are no multiple of {INFCL_WIDTH}"
    return "left out at this size: minutes" if rows > 65536 else None


def cut_cross_entropy(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Apple's linear cross-entropy, keys as the classifier's weight; one call a direction."""
    from cut_cross_entropy import linear_cross_entropy

    labels = torch.arange(len(query), device=query.device)
    forward = linear_cross_entropy(query / TEMPERATURE, key, labels)
    return (forward + linear_cross_entropy(key / TEMPERATURE, query, labels)) / 2


def liger(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, keys as the classifier's weight; one call a direction."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    labels, loss = torch.arange(len(query), device=query.device), LigerFusedLinearCrossEntropyLoss()
    return (loss(key, query / TEMPERATURE, labels) + loss(query, key / TEMPERATURE, labels)) / 2


def umer1(impl: str) -> Callable[[Inputs], Callable]:
    def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        from umer1.ops.infonce import infonce

        return infonce(query, key, temperature=TEMPERATURE, impl=impl)

    return with_gradients(loss)


def reference(inputs: Inputs) -> Results:
    wide = Inputs(inputs.query.double(), inputs.key.double())
    return with_gradients(plain)(wide)()


def cost(case: Case) -> Cost:
    rows, width = case.shape["B"], case.shape["D"]
    return Cost(flops=4 * 2.0 * rows * rows * width, bytes=4.0 * rows * width * case.dtype.itemsize, dtype=case.dtype)


def sized(rows: int, width: int, dtype: torch.dtype, **options) -> Case:
    return Case(shape={"B": rows, "D": width}, dtype=dtype, **options)


BF16, FP32 = torch.bfloat16, torch.float32
SUITE = Suite(
    name="infonce",
    cases={
        "tiny": [sized(24, 32, FP32), sized(17, 32, BF16)],
        "cpu": [
            sized(256, 1536, FP32),
            sized(1024, 1536, FP32),
            sized(1024, 1536, BF16),
            sized(8192, 1536, FP32, reference=False),
        ],
        "gpu": [  # the targets' first: the last may find no time
            sized(16384, 1536, BF16),
            sized(1024, 1536, BF16),
            sized(262144, 1536, BF16, reference=False, least_rounds=1),
            sized(256, 1536, BF16),
            sized(4096, 1536, BF16),
            sized(16384, 3584, BF16, reference=False),
        ],
    },
    providers=[
        Provider(name="torch eager", make=with_gradients(plain)),
        Provider(name="torch eager, fp32 logits", make=with_gradients(fp32_logits), fits=rounds_logits),
        Provider(name="torch eager, fp32 product", make=with_gradients(fp32_product), fits=rounds_logits),
        Provider(name="torch.compile", make=compiled(plain), fits=worth_compiling),
        Provider(
            name="torch.compile, fp32 logits", make=compiled(fp32_logits), fits=either(rounds_logits, worth_compiling)
        ),
        Provider(name="Inf-CL", make=with_gradients(inf_cl), package="inf_cl", needs_cuda=True, fits=inf_cl_takes),
        Provider(
            name="CCE, two calls", make=with_gradients(cut_cross_entropy), package="cut_cross_entropy", needs_cuda=True
        ),
        Provider(
            name="Liger linear CE, two calls", make=with_gradients(liger), package="liger_kernel", needs_cuda=True
        ),
        Provider(name="umer1 torch", make=umer1("torch"), ours=True),
        Provider(name="umer1 triton", make=umer1("triton"), ours=True, needs_cuda=True),
    ],
    inputs=make_inputs,
    reference=reference,
    cost=cost,
)


def test_infonce(case, provider, bench, benchmark):
    bench(case, provider, benchmark)
