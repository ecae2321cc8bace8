"""Cross-entropy of supervised rows: [R, H] through the head [V, H], forward and backward, mean over the rows.

    pytest perf/bench_linear_cross_entropy.py [--sizes cpu|gpu] [--benchmark-json FILE]

Work is counted as 3 matrix products of 2 R H V, whoever makes more.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Cost, Provider, Results
from suite import Case, Suite

REFERENCE_BYTES = 1 << 30  # logits of one chunk of the reference


@dataclass
class Inputs:
    hidden: torch.Tensor  # [R, H]
    weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # int64 [R]


def make_inputs(case: Case, place: torch.device) -> Inputs:
    rows, width, vocab = (case.shape[name] for name in ("R", "H", "V"))
    weight = torch.randn(vocab, width, device=place).mul_(2 * width**-0.5).to(case.dtype)
    labels = torch.randint(vocab, (rows,), device=place)
    # Rows lean towards their label: losses as of a model that has learnt something.
    hidden = (torch.randn(rows, width, device=place) + 2 * weight[labels].float()).to(case.dtype)
    return Inputs(hidden, weight, labels)


def whole_logits(hidden, weight, labels):
    """Logits in the inputs' dtype, the softmax in it too."""
    return F.cross_entropy(hidden @ weight.T, labels)


def fp32_logits(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def megatron(hidden, weight, labels):
    """megatron-core's vocab-parallel cross-entropy on whole fp32 logits."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = (hidden @ weight.T).float()
    return vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)).mean()


def liger(hidden, weight, labels):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut_cross_entropy(impl: str) -> Callable:
    """Apple's: "cce" leaves out what is small in the gradients, "cce_exact" nothing and sums in fp32."""

    def loss(hidden, weight, labels):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, impl=impl)

    return loss


def ours(impl: str) -> Callable:
    def loss(hidden, weight, labels):
        from umer1.ops.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, impl=impl)[0]

    return loss


def ours_logprobs(hidden, weight, labels):
    """The form of GRPO, which does not know the rows' gradients before: one product more."""
    from umer1.ops.linear_cross_entropy import linear_logprobs

    return -linear_logprobs(hidden, weight, labels)[0].mean()


def with_gradients(loss: Callable) -> Callable[[Inputs], Callable]:
    def make(inputs: Inputs) -> Callable[[], Results]:
        hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()

        def call() -> Results:
            value = loss(hidden, weight, inputs.labels)
            gradients = torch.autograd.grad(value, (hidden, weight))
            return {"loss": value.detach(), "hidden gradient": gradients[0], "weight gradient": gradients[1]}

        return call

    return make


def megatron_groups() -> AbstractContextManager:
    """The process groups that megatron asks for."""
    from umer1.distributed.parallel import ParallelConfig, init_distributed

    return init_distributed(ParallelConfig())


def compiled(loss: Callable) -> Callable[[Inputs], Callable]:
    return lambda inputs: with_gradients(torch.compile(loss, dynamic=False))(inputs)


def rounds_logits(inputs: Inputs) -> str | None:
    return "the same as torch eager for fp32 inputs" if inputs.hidden.dtype == torch.float32 else None


def worth_compiling(inputs: Inputs) -> str | None:
    """Compiling takes longer than most of the measurements."""
    wanted = inputs.hidden.device.type == "cpu" or inputs.hidden.shape == (8192, 1536)
    return None if wanted else "left out at this size"


def reference(inputs: Inputs) -> Results:
    """The rows in chunks: fp64 logits of all of them would not fit."""
    rows, vocab = len(inputs.hidden), len(inputs.weight)
    chunk = max(1, REFERENCE_BYTES // (8 * vocab))
    weight = inputs.weight.double()
    hidden_gradient, weight_gradient = torch.empty_like(inputs.hidden, dtype=torch.float64), torch.zeros_like(weight)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, rows, chunk):
        part, labels = inputs.hidden[start : start + chunk].double(), inputs.labels[start : start + chunk]
        logits = part @ weight.T
        logprobs = logits.log_softmax(1)
        loss -= logprobs.gather(1, labels[:, None]).sum() / rows
        gradient = logprobs.exp_().scatter_add_(1, labels[:, None], -torch.ones_like(part[:, :1])) / rows
        hidden_gradient[start : start + chunk] = gradient @ weight
        weight_gradient.addmm_(gradient.T, part)
    return {"loss": loss, "hidden gradient": hidden_gradient, "weight gradient": weight_gradient}


def cost(case: Case) -> Cost:
    rows, width, vocab = (case.shape[name] for name in ("R", "H", "V"))
    return Cost(
        flops=3 * 2.0 * rows * width * vocab,
        bytes=2.0 * (rows + vocab) * width * case.dtype.itemsize,
        dtype=case.dtype,
    )


def sized(rows: int, width: int, vocab: int, dtype: torch.dtype, **options) -> Case:
    return Case(shape={"R": rows, "H": width, "V": vocab}, dtype=dtype, **options)


BF16, FP32 = torch.bfloat16, torch.float32
SUITE = Suite(
    name="linear_cross_entropy",
    cases={
        "tiny": [sized(9, 16, 50, FP32), sized(9, 16, 50, BF16)],
        "cpu": [sized(256, 256, 32768, FP32), sized(1024, 256, 32768, FP32)],
        "gpu": [sized(8192, 1536, 151936, BF16), sized(1024, 1536, 151936, BF16), sized(8192, 3584, 152064, BF16)],
    },
    providers=[
        Provider(name="torch eager", make=with_gradients(whole_logits)),
        Provider(name="torch eager, fp32 logits", make=with_gradients(fp32_logits), fits=rounds_logits),
        Provider(name="torch.compile, fp32 logits", make=compiled(fp32_logits), fits=worth_compiling),
        Provider(
            name="megatron-core, whole logits",
            make=with_gradients(megatron),
            package="megatron",
            within=megatron_groups,
        ),
        Provider(name="Liger fused linear CE", make=with_gradients(liger), package="liger_kernel", needs_cuda=True),
        *(
            Provider(
                name=name, make=with_gradients(cut_cross_entropy(impl)), package="cut_cross_entropy", needs_cuda=True
            )
            for name, impl in (("CCE", "cce"), ("CCE, exact", "cce_exact"))
        ),
        Provider(name="umer1", make=with_gradients(ours("auto")), ours=True),
        Provider(name="umer1, torch", make=with_gradients(ours("torch")), ours=True, needs_cuda=True),
        Provider(name="umer1, log-probs", make=with_gradients(ours_logprobs), ours=True),
    ],
    inputs=make_inputs,
    reference=reference,
    cost=cost,
)


def test_linear_cross_entropy(case, provider, bench, benchmark):
    bench(case, provider, benchmark)
