"""Packed attention against one SDPA call a sequence in fp64, and rotation and norms against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm, apply_rotary_pos_emb_vision

from umer1.models.attention import Rotate, SDPAPlan
from umer1.models.backend import _RMSNorm
from umer1.testing import assert_close

# Equal lengths, one bucket, several buckets, an empty segment, single tokens.
LENGTHS = [[4, 4, 4], [7, 6, 5], [1, 30, 2, 17, 9, 3], [5, 0, 3], [1, 1], [12]]


def bounds(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_and_gradients(lengths, causal):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, 2, 2)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    got = SDPAPlan(bounds(lengths), causal=causal).attend(*leaves, None)
    parts = []
    for q, k, v in zip(*(leaf.split(lengths) for leaf in leaves), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        scores = q @ k.transpose(1, 2) / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    want = torch.cat(parts)
    assert_close("output", got, want, rtol=1e-12)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), leaves) for out in (got, want)]
    for name, ours, theirs in zip("qkv", *gradients, strict=True):
        assert_close(f"d_{name}", ours, theirs, rtol=1e-12, atol=1e-14)


def test_few_calls_and_little_padding():
    plan = SDPAPlan(bounds([100, 99, 61, 59, 36, 35, 1]), causal=True)
    assert plan.shapes == [(3, 100), (2, 59), (1, 35), (1, 1)]


def test_wrong_bounds_are_an_error():
    with pytest.raises(ValueError, match="bounds 6 tokens, but there are 7"):
        SDPAPlan(bounds([4, 2]), causal=True).attend(*(torch.zeros(7, 1, 4) for _ in range(3)), None)


def test_rotation_equals_transformers_and_its_gradient_turns_back():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator, requires_grad=True)
    angles = torch.randn(5, 4, generator=generator) * 3
    both = torch.cat([angles, angles], -1)
    got = Rotate.apply(x, both.cos()[:, None], angles.sin()[:, None])
    want, _ = apply_rotary_pos_emb_vision(x, x, both.cos(), both.sin())
    assert_close("rotated", got, want, rtol=1e-6)
    weight = torch.randn(got.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (got, want))
    assert_close("d_x", ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 16, generator=generator).to(dtype).requires_grad_()
    norm = Qwen2VLRMSNorm(16, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3, generator=generator)
    weight = norm.weight.detach().clone().requires_grad_()
    got, want = _RMSNorm.apply(x, weight, 1e-5), norm(x)
    assert torch.equal(got, want)
    upstream = torch.randn(want.shape, generator=generator).to(dtype)
    ours = torch.autograd.grad(got, (x, weight), upstream)
    theirs = torch.autograd.grad(want, (x, norm.weight), upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, a, b in zip(("d_x", "d_weight"), ours, theirs, strict=True):
        assert_close(name, a, b, rtol=tolerance)
