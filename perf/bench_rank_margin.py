"""Ranking x margin rewards of both sides of a comparison set: P pairs with G rollouts on either side.

    pytest perf/bench_rank_margin.py [--sizes cpu|gpu] [--benchmark-json FILE]

Embeddings are L2-normalised and of the model's width; rollouts of one pair have a part in common, so that rankings are
neither all 0 nor all 1.  Work is counted as one matrix product of 2 (P G)^2 D, which serves both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Cost, Provider, Results
from suite import Case, Suite

TARGET = (256, 8, 1536)  # [P, G, D] that a speed is asked for at, on a GPU


@dataclass
class Inputs:
    query: torch.Tensor  # [P * G, D] in group order
    target: torch.Tensor  # [P * G, D]
    group: int  # G


def make_inputs(case: Case, place: torch.device) -> Inputs:
    pairs, group, width = (case.shape[name] for name in ("P", "G", "D"))
    topic = torch.randn(pairs, 1, width, device=place)

    def side() -> torch.Tensor:
        rows = torch.randn(pairs, group, width, device=place) + 0.25 * topic
        return F.normalize(rows.flatten(0, 1), dim=1).to(case.dtype)

    return Inputs(side(), side(), group)


def one_side(similarity: torch.Tensor, group: int) -> torch.Tensor:
    """ranking * margin [R] of the rows of [R, R], ties in index order; docs/method.md, 5 as one would write it."""
    count = len(similarity)
    groups = torch.arange(count, device=similarity.device) // group
    own = groups[:, None] == groups
    top = similarity.sort(dim=1, descending=True, stable=True).indices[:, :group]
    ranking = own.gather(1, top).sum(1) / group
    inside = torch.where(own, similarity, 0).sum(1)
    outside = similarity.sum(1) - inside
    return ranking * (inside / group - outside / max(count - group, 1))


def both_sides(query: torch.Tensor, target: torch.Tensor, group: int) -> Results:
    similarity = query @ target.T
    return {"query reward": one_side(similarity, group), "target reward": one_side(similarity.T, group)}


def plain(inputs: Inputs) -> Callable[[], Results]:
    return lambda: both_sides(inputs.query, inputs.target, inputs.group)


def compiled(inputs: Inputs) -> Callable[[], Results]:
    function = torch.compile(both_sides, dynamic=False)
    return lambda: function(inputs.query, inputs.target, inputs.group)


def worth_compiling(inputs: Inputs) -> str | None:
    """On a GPU compiling takes longer than the measurements: at the target's size alone."""
    wanted = inputs.query.device.type == "cpu" or len(inputs.query) == TARGET[0] * TARGET[1]
    return None if wanted else "left out at this size"


def umer1(impl: str) -> Callable[[Inputs], Callable]:
    def make(inputs: Inputs) -> Callable[[], Results]:
        from umer1.ops.rank_margin_reward import rank_margin_rewards

        def call() -> Results:
            query, target = rank_margin_rewards(inputs.query, inputs.target, inputs.group, impl=impl)
            return {"query reward": query[0], "target reward": target[0]}

        return call

    return make


def reference(inputs: Inputs) -> Results:
    return both_sides(inputs.query.double(), inputs.target.double(), inputs.group)


def cost(case: Case) -> Cost:
    rows, width = case.shape["P"] * case.shape["G"], case.shape["D"]
    return Cost(
        flops=2.0 * rows * rows * width, bytes=2.0 * rows * width * case.dtype.itemsize + 8.0 * rows, dtype=case.dtype
    )


def sized(pairs: int, group: int, width: int) -> Case:
    return Case(shape={"P": pairs, "G": group, "D": width}, dtype=torch.float32, mode="both sides")


SUITE = Suite(
    name="rank_margin",
    cases={
        "tiny": [sized(5, 4, 16)],
        "cpu": [sized(16, 8, 1536), sized(128, 8, 1536)],
        "gpu": [sized(*TARGET), sized(16, 8, 1536), sized(128, 8, 1536), sized(1024, 8, 1536)],
    },
    providers=[
        Provider(name="torch eager", make=plain),
        Provider(name="torch.compile", make=compiled, fits=worth_compiling),
        Provider(name="umer1 torch", make=umer1("torch"), ours=True),
        Provider(name="umer1 triton", make=umer1("triton"), ours=True, needs_cuda=True),
    ],
    inputs=make_inputs,
    reference=reference,
    cost=cost,
)


def test_rank_margin(case, provider, bench, benchmark):
    bench(case, provider, benchmark)
