"""What a device offers by its data sheet, and what is assumed of it: no number here was measured by umer1."""

from dataclasses import dataclass

from umer1.errors import UserError
from umer1.training.flops import PEAK_BF16

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device of the cluster."""

    name: str
    memory_bytes: int | None = None
    """Memory of the device; None: the host's, which nothing is checked against."""
    bf16_flops: float | None = None
    """Dense bf16 FLOP/s of the data sheet; None: no speed is estimated."""
    bandwidth: float | None = None
    """Bytes/s of the memory, data sheet."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None: no GPU."""
    reserve_bytes: int = 0
    """Assumed: what the allocator does not count, i.e. CUDA context, NCCL's buffers, cuBLAS workspaces."""
    fragmentation: float = 0.0
    """Assumed: what a caching allocator holds beyond its peak, as a share of it."""

    @property
    def gpu(self) -> bool:
        return self.memory_bytes is not None

    @property
    def usable_bytes(self) -> int | None:
        """What the tensors of a run may take at their peak; None: not limited."""
        if self.memory_bytes is None:
            return None
        return int((self.memory_bytes - self.reserve_bytes) / (1 + self.fragmentation))


def _gpu(name: str, memory_gib: int, bandwidth: float, capability: tuple[int, int]) -> Hardware:
    """`name` begins with the one that `PEAK_BF16` has; what is assumed is the same for all."""
    return Hardware(
        name=name,
        memory_bytes=memory_gib * GIB,
        bf16_flops=PEAK_BF16[name.split()[0]],
        bandwidth=bandwidth,
        capability=capability,
        reserve_bytes=3 * GIB,
        fragmentation=0.06,
    )


HARDWARE = {
    "h100": _gpu("H100 SXM", 79, 3.35e12, (9, 0)),
    "h200": _gpu("H200 SXM", 139, 4.8e12, (9, 0)),
    "b200": _gpu("B200 SXM", 178, 8e12, (10, 0)),
    "a100": _gpu("A100 SXM 80 GB", 79, 2.0e12, (8, 0)),
    "cpu": Hardware(name="CPU"),
}


def find_hardware(name: str) -> Hardware:
    """By its short name.  Raises UserError with the legal ones."""
    if name.lower() not in HARDWARE:
        raise UserError(f"--hardware {name!r} is not known; use {', '.join(HARDWARE)}")
    return HARDWARE[name.lower()]
