"""A number that two holders of the same tensor agree on, whatever device and memory layout each has it in."""

import torch

# Values hashed at once: bounds the int64 working copies (8 bytes a value, a few of them) for large tables.
_CHUNK = 1 << 22
# splitmix64's constants, as signed numbers; int64 arithmetic is modulo 2**64.
_STEP, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def checksum(tensor: torch.Tensor) -> float:
    """A whole number of at most 53 bits (exact as a float and in JSON) from the values and their row-major positions.

    Every value is taken in fp64, so that equal values in another dtype give the same number; its bits are hashed
    together with its position and the hashes added as integers: unlike a sum of floats, the result does not depend on
    the order of adding, which differs between devices.  One changed bit or two swapped values change it.  0.0 and
    -0.0 count as equal.  Of an empty tensor it is 0.
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK):
        values = flat[begin : begin + _CHUNK].to(torch.float64) + 0.0  # -0.0 + 0.0 is 0.0
        places = torch.arange(begin + 1, begin + 1 + values.numel(), dtype=torch.int64, device=flat.device)
        mixed = values.view(torch.int64).bitwise_xor_(places.mul_(_STEP))
        # splitmix64's finaliser: each bit of the value and of the position reaches every bit.
        mixed = mixed.bitwise_xor_(mixed >> 30).mul_(_MIX_1)
        mixed = mixed.bitwise_xor_(mixed >> 27).mul_(_MIX_2)
        total += mixed.bitwise_xor_(mixed >> 31).sum()
    return float(int(total) >> 11)
