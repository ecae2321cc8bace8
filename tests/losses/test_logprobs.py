"""Chosen log-probs against log_softmax on the whole vocabulary; what is kept in memory; tensor parallelism."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_qwen2_vl import make_tiny_directory
from torch.utils._python_dispatch import TorchDispatchMode

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.logprobs import chosen_logprobs
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import load_hf
from umer1.testing import assert_close, run_distributed

ROWS, HIDDEN, VOCABULARY = 11, 16, 37


def make_rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, labels, torch.randn(ROWS, generator=generator, dtype=dtype)


def plain(hidden, weight, labels, temperature):
    """(log-probs, entropy) by torch."""
    whole = (hidden @ weight.T / temperature).log_softmax(-1)
    return whole.gather(1, labels[:, None]).squeeze(1), -(whole.exp() * whole).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 1024])
def test_equals_log_softmax(temperature, chunk_rows):
    hidden, weight, labels, scale = make_rows()
    want_rows, want_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want, want_entropy = plain(want_rows, want_weight, labels, temperature)
    (want * scale).sum().backward()
    rows, own_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    got, entropy = chosen_logprobs(
        rows, labels, lambda part: part @ own_weight.T, temperature=temperature, chunk_rows=chunk_rows
    )
    assert not entropy.requires_grad and got.dtype == torch.float64
    (got * scale).sum().backward()
    assert_close("log-probs", got, want, rtol=1e-12)
    assert_close("entropy", entropy, want_entropy, rtol=1e-12)
    assert_close("rows", rows.grad, want_rows.grad, rtol=1e-12)
    assert_close("weight", own_weight.grad, want_weight.grad, rtol=1e-12)
    with torch.no_grad():
        again, none = chosen_logprobs(
            hidden, labels, lambda part: part @ weight.T, temperature=temperature, chunk_rows=chunk_rows, entropy=False
        )
    assert none is None and torch.equal(again, got)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_vocabulary_is_not_there(dtype, temperature):
    """Columns of the lowest finite number: divided by a temperature below 1 they are -inf, and entropy stays finite."""
    hidden, weight, labels, _ = make_rows(dtype)
    rows = hidden.clone().requires_grad_()

    def logits(part):
        return torch.cat([part @ weight.T, torch.full((len(part), 5), torch.finfo(dtype).min, dtype=dtype)], 1)

    got, entropy = chosen_logprobs(rows, labels, logits, temperature=temperature, chunk_rows=4)
    got.sum().backward()
    real = (hidden @ weight.T).float() / temperature
    assert got.dtype == entropy.dtype == torch.float32
    assert_close("log-probs", got, real.log_softmax(-1).gather(1, labels[:, None]).squeeze(1), rtol=1e-5)
    assert_close("entropy", entropy, torch.distributions.Categorical(logits=real).entropy(), rtol=1e-5)
    assert torch.isfinite(rows.grad).all()


def test_no_rows_give_the_weights_a_gradient_of_zero():
    hidden, weight, labels, _ = make_rows()
    weight.requires_grad_()
    got, entropy = chosen_logprobs(hidden[:0], labels[:0], lambda part: part @ weight.T, temperature=1.0)
    assert got.shape == entropy.shape == (0,)
    got.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def test_temperature_zero_is_refused():
    hidden, weight, labels, _ = make_rows()
    with pytest.raises(ValueError, match="temperature=0"):
        chosen_logprobs(hidden, labels, lambda part: part @ weight.T, temperature=0.0)


class Alive(TorchDispatchMode):
    """The most elements of tensors with a vocabulary's width that were alive at once."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCABULARY:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.storages:
                    self.storages[storage.data_ptr()] = tensor.numel()
                    weakref.finalize(storage, self.storages.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.storages.values()))
        return result


def most_alive(rows: int, chunk_rows: int | None) -> int:
    """Forward and backward of so many rows; chunk_rows None: plain log_softmax."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(rows, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(HIDDEN, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    gc.collect()
    with Alive() as alive:
        if chunk_rows is None:
            logprobs = (hidden @ weight).log_softmax(-1).gather(1, labels[:, None])
        else:
            logprobs, _ = chosen_logprobs(
                hidden, labels, lambda part: part @ weight, temperature=1.0, chunk_rows=chunk_rows
            )
        assert chunk_rows is None or not alive.storages, "forward keeps logits"
        logprobs.sum().backward()
    return alive.most


def test_logits_of_one_chunk_at_a_time():
    one_chunk = most_alive(8, 8)
    assert 8 * VOCABULARY <= one_chunk <= 8 * VOCABULARY * 5
    assert most_alive(800, 8) == one_chunk
    assert most_alive(800, None) >= 800 * VOCABULARY  # what the measure says of the plain way


def compare_head(paths: list[Path], tp: int) -> bool:
    """The model's own head, its vocabulary cut over `tp` ranks and padded: values and gradients on every rank."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    for path in paths:
        directory = HFDirectory.open(path)
        with init_distributed(parallel) as state:
            model = build_model(directory.config, parallel, state, params_dtype=torch.float32)[0]
            load_hf([model], directory, state)
            tied = directory.config.tie_word_embeddings
            head = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
            assert model.real_local_vocab < model.local_vocab or tp == 1 or state.tp_rank == 0
            shards = [torch.empty_like(head) for _ in range(tp)]
            dist.all_gather(shards, head.detach(), group=state.groups.tp)
            whole = torch.cat(shards)[: directory.config.vocab_size].double().requires_grad_()
            generator = torch.Generator().manual_seed(6)
            rows = torch.randn(ROWS, whole.shape[1], generator=generator)
            labels = torch.randint(0, len(whole), (ROWS,), generator=generator)
            labels[:2] = torch.tensor([0, len(whole) - 1])
            want_rows = rows.double().requires_grad_()
            want, want_entropy = plain(want_rows, whole, labels, 0.8)
            scale = torch.randn(ROWS, generator=generator)
            (want * scale).sum().backward()
            own_rows = rows.clone().requires_grad_()
            got, entropy = chosen_logprobs(
                own_rows, labels, model.logits, temperature=0.8, chunk_rows=4, group=state.groups.tp
            )
            (got * scale).sum().backward()
            assert_close("log-probs", got, want, rtol=1e-6)
            assert_close("entropy", entropy, want_entropy, rtol=1e-6)
            assert_close("rows", own_rows.grad, want_rows.grad, rtol=1e-5)
            start = model.local_vocab * state.tp_rank
            real = model.real_local_vocab
            assert_close("head", head.grad[:real], whole.grad[start : start + real], rtol=1e-5)
            head.grad = None
            none, _ = chosen_logprobs(own_rows[:0], labels[:0], model.logits, temperature=0.8, group=state.groups.tp)
            none.sum().backward()
            assert head.grad is not None and head.grad.abs().sum() == 0
    return True


def test_the_models_head_at_tensor_parallel_sizes(tmp_path):
    paths = [
        make_tiny_directory(tmp_path / "tied", vocab_rows=421),
        make_tiny_directory(tmp_path / "untied", vocab_rows=423, tied=False),
    ]
    for tp in (1, 2):
        assert run_distributed(compare_head, tp, paths, tp) == [True] * tp
