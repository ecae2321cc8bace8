"""The checksum sees values and places, and nothing else."""

import pytest
import torch

from umer1.rl import checksum as module
from umer1.rl.checksum import checksum


def _plain(values: list[float]) -> float:
    """The same in Python's own integers."""
    import struct

    def signed(x):
        x %= 1 << 64
        return x - (1 << 64) if x >> 63 else x

    total = 0
    for place, value in enumerate(values, 1):
        bits = struct.unpack("<q", struct.pack("<d", value))[0]
        x = bits ^ signed(place * 0x9E3779B97F4A7C15)
        x = signed((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9)
        x = signed((x ^ (x >> 27)) * 0x94D049BB133111EB)
        total = signed(total + (x ^ (x >> 31)))
    return float(total >> 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_python_integers(dtype):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(tensor) == _plain(tensor.double().flatten().tolist())
    assert abs(checksum(tensor)) < 2**53


def test_layout_dtype_and_chunks_do_not_matter(monkeypatch):
    tensor = torch.randn(64, 48).bfloat16()
    expected = checksum(tensor)
    assert checksum(tensor.float()) == expected
    assert checksum(tensor.t().contiguous().t()) == expected
    assert checksum(torch.cat([tensor, tensor], dim=1)[:, :48]) == expected
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert checksum(tensor) == expected


def test_one_bit_and_one_swap_show():
    tensor = torch.randn(1000)
    flipped = tensor.clone()
    flipped.view(torch.int32)[517] ^= 1
    swapped = tensor.clone()
    swapped[[3, 800]] = tensor[[800, 3]]
    numbers = {checksum(x) for x in (tensor, flipped, swapped, tensor.flip(0), tensor[:-1], torch.zeros(1000))}
    assert len(numbers) == 6
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4)) and checksum(torch.empty(0)) == 0
    assert checksum(torch.tensor([0.0])) == checksum(torch.tensor([-0.0]))
