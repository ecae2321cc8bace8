"""Sums of cross-entropy by side through the model's head against torch's on the whole vocabulary."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.language_model import cross_entropy_sums
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import load_hf
from umer1.ops.linear_cross_entropy import linear_logprobs
from umer1.testing import assert_close, run_distributed

ROWS = 11
SIDE_WEIGHTS = torch.tensor([1.0, 3.0])


def check_cross_entropy(model, head, whole, real: slice, generator) -> None:
    """Values, gradients on this rank, and a micro-batch without supervised rows."""
    rows = torch.randn(ROWS, whole.shape[1], generator=generator)
    labels = torch.randint(0, len(whole), (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, len(whole) - 1])
    sides = torch.randint(0, 2, (ROWS,), generator=generator)
    want_rows, want_head = rows.double().requires_grad_(), whole.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(want_rows @ want_head.T, labels, reduction="none")
    want = torch.stack([losses[sides == 0].sum(), losses[sides == 1].sum()])
    (want * SIDE_WEIGHTS).sum().backward()
    own = rows.clone().requires_grad_()
    total, sums = model.through_head(cross_entropy_sums, own, labels, sides, SIDE_WEIGHTS)
    total.backward()
    assert not sums.requires_grad
    assert_close("sums", sums, want, rtol=1e-6)
    assert_close("total", total, (want * SIDE_WEIGHTS).sum(), rtol=1e-6)
    assert_close("rows", own.grad, want_rows.grad, rtol=1e-5)
    assert_close("head", head.grad[: real.stop - real.start], want_head.grad[real], rtol=1e-5)
    assert head.grad[real.stop - real.start :].abs().sum() == 0
    head.grad = None
    none, sums = model.through_head(cross_entropy_sums, own[:0], labels[:0], sides[:0], SIDE_WEIGHTS)
    none.backward()
    assert sums.tolist() == [0.0, 0.0] and head.grad is not None and head.grad.abs().sum() == 0
    head.grad = None


def check_logprobs(model, head, whole, real: slice, generator) -> None:
    rows = torch.randn(ROWS, whole.shape[1], generator=generator)
    labels = torch.randint(0, len(whole), (ROWS,), generator=generator)
    scale = torch.randn(ROWS, generator=generator)
    want_rows, want_head = rows.double().requires_grad_(), whole.clone().requires_grad_()
    want = (want_rows @ want_head.T / 0.8).log_softmax(1)
    (want.gather(1, labels[:, None]).squeeze(1) * scale).sum().backward()
    own = rows.clone().requires_grad_()
    got, entropy = model.through_head(linear_logprobs, own, labels, temperature=0.8, entropy=True)
    (got * scale).sum().backward()
    assert_close("log-probs", got, want.gather(1, labels[:, None]).squeeze(1), rtol=1e-6)
    assert_close("entropy", entropy, -(want.exp() * want).sum(1), rtol=1e-6)
    assert_close("rows", own.grad, want_rows.grad, rtol=1e-5)
    assert_close("head", head.grad[: real.stop - real.start], want_head.grad[real], rtol=1e-5)
    head.grad = None


def compare(paths: list[Path], tp: int) -> bool:
    """The model's own head, tied or not, its vocabulary cut over `tp` ranks and padded."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    for path in paths:
        directory = HFDirectory.open(path)
        with init_distributed(parallel) as state:
            model = build_model(directory.config, parallel, state, params_dtype=torch.float32)[0]
            load_hf([model], directory, state)
            tied = directory.config.tie_word_embeddings
            head = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
            shards = [torch.empty_like(head) for _ in range(tp)]
            dist.all_gather(shards, head.detach(), group=state.groups.tp)
            whole = torch.cat(shards)[: directory.config.vocab_size].double()
            start = model.local_vocab * state.tp_rank
            real = slice(start, start + model.real_local_vocab)
            generator = torch.Generator().manual_seed(6)
            check_cross_entropy(model, head, whole, real, generator)
            check_logprobs(model, head, whole, real, generator)
    return True


@pytest.mark.parametrize("tp", [1, 2])
def test_the_models_head(tp, tmp_path):
    paths = [
        make_tiny_directory(tmp_path / "tied", vocab_rows=421),
        make_tiny_directory(tmp_path / "untied", vocab_rows=423, tied=False),
    ]
    assert run_distributed(compare, tp, paths, tp) == [True] * tp


def test_the_heads_hooks_run(tmp_path):
    """megatron's overlapped gather waits for updated weights in a forward hook of the module that owns them."""
    directory = HFDirectory.open(make_tiny_directory(tmp_path / "untied", tied=False))
    parallel = ParallelConfig()
    with init_distributed(parallel) as state:
        model = build_model(directory.config, parallel, state, params_dtype=torch.float32)[0]
        called = []
        model.output_layer.register_forward_pre_hook(lambda module, _: called.append(module))
        rows, labels = torch.zeros(2, directory.config.hidden_size), torch.zeros(2, dtype=torch.int64)
        model.through_head(linear_logprobs, rows, labels)
        assert called == [model.output_layer]
