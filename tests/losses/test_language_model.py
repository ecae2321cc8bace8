"""Sums of cross-entropy by side over vocab-parallel logits against torch's on the whole vocabulary."""

import torch
from megatron.core import parallel_state

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.language_model import cross_entropy_sums
from umer1.testing import assert_close, run_distributed


def compare(tp: int) -> bool:
    with init_distributed(ParallelConfig(tensor_model_parallel_size=tp), seed=1):
        generator = torch.Generator().manual_seed(5)
        logits = torch.randn(11, 12, generator=generator, dtype=torch.float32) * 4
        labels = torch.randint(0, 12, (11,), generator=generator)
        sides = torch.randint(0, 2, (11,), generator=generator)
        whole = logits.clone().double().requires_grad_()
        losses = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
        want = torch.stack([losses[sides == 0].sum(), losses[sides == 1].sum()])
        (want * torch.tensor([1.0, 3.0])).sum().backward()
        rank = parallel_state.get_tensor_model_parallel_rank()
        shard = logits.chunk(tp, 1)[rank].clone().requires_grad_()
        got = cross_entropy_sums(shard, labels, sides)
        (got * torch.tensor([1.0, 3.0])).sum().backward()
        assert_close("sums", got, want, rtol=1e-6)
        assert_close("gradient", shard.grad, whole.grad.chunk(tp, 1)[rank], rtol=1e-5)
        none = cross_entropy_sums(shard[:0], labels[:0], sides[:0])
        assert none.tolist() == [0.0, 0.0] and none.requires_grad
    return True


def test_vocab_parallel_sums():
    assert all(run_distributed(compare, 1, 1)) and all(run_distributed(compare, 2, 2))
