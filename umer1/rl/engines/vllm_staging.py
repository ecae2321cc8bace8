"""Weights on their way to the engine, in pieces that fit a bounded buffer.

A piece is {"name", "dtype", "shape", "begin", "bytes", "offset"}: `bytes` of the named tensor's raw memory from byte
`begin` on lie at `offset` of the buffer.  Pieces of a tensor come in order and tensors one after the other.
"""

import mmap
import os
from collections.abc import Iterator
from typing import Any

import torch

from umer1 import device

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
STAGING_BYTES = 64 << 20
_ALIGNMENT = 64


class StagingBuffer:
    """The trainer's side: `view` uint8 [size] is written, and the engine reads it.

    shared: a local child maps it as well (memory without a file name, or the GPU's own memory); it goes away with its
    processes, however they end.  Otherwise `memory` is sent.
    """

    def __init__(self, size: int = STAGING_BYTES, *, shared: bool):
        self.size, self.shared, self.fd = size, shared, -1
        if not shared:
            self.memory: Any = bytearray(size)
        elif device.has_cuda():
            self.memory = None
            self.view = torch.empty(size, dtype=torch.uint8, device=device.device())
            return
        else:
            self.fd = os.memfd_create("umer1-weights")
            os.ftruncate(self.fd, size)
            self.memory = mmap.mmap(self.fd, size)
        self.view = torch.frombuffer(self.memory, dtype=torch.uint8)

    def described(self) -> dict[str, Any]:
        """How the child maps it, as JSON: StagingView's argument."""
        if self.fd >= 0:
            return {"path": f"/proc/{os.getpid()}/fd/{self.fd}", "size": self.size}
        # CUDA IPC: needs a GPU on both sides; has not run on one yet
        handle = self.view.untyped_storage()._share_cuda_()
        return {"cuda": [{"hex": item.hex()} if isinstance(item, bytes) else item for item in handle]}

    def close(self) -> None:
        self.view = self.memory = None  # the mapping ends with its last user
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def fill(tensors: Iterator[tuple[str, torch.Tensor]], buffer: torch.Tensor) -> Iterator[list[dict[str, Any]]]:
    """Copy tensors into `buffer` (uint8), as many as fit; yields the pieces each time it is full, and at the end.

    The buffer is written again only when the next item is asked for.
    """
    pieces: list[dict[str, Any]] = []
    used = 0
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        begin = 0
        while begin < raw.numel():
            used += -used % _ALIGNMENT
            room = buffer.numel() - used
            if room < min(raw.numel() - begin, _ALIGNMENT):
                yield pieces
                pieces, used = [], 0
                continue
            count = min(raw.numel() - begin, room)
            buffer[used : used + count].copy_(raw[begin : begin + count])
            pieces.append(dict(name=name, dtype=dtype, shape=list(tensor.shape), begin=begin, bytes=count, offset=used))
            begin, used = begin + count, used + count
    if pieces:
        yield pieces


class StagingView:
    """The engine's side of a StagingBuffer: `bytes` uint8 [size], as the trainer wrote it."""

    def __init__(self, described: dict[str, Any], device: torch.device):
        if "cuda" in described:
            handle = [bytes.fromhex(item["hex"]) if isinstance(item, dict) else item for item in described["cuda"]]
            handle[0] = device.index or 0  # the processes may count the same GPU differently
            storage = torch.UntypedStorage._new_shared_cuda(*handle)
            self.bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        else:
            with open(described["path"], "r+b") as file:  # torch takes no read-only memory
                self.bytes = torch.frombuffer(mmap.mmap(file.fileno(), described["size"]), dtype=torch.uint8)


class Assembler:
    """Puts whole tensors together from pieces, in memory of their own on `device`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}  # of every whole tensor so far
        self.name: str | None = None  # of the tensor of which a part is there
        self._tensor: torch.Tensor | None = None
        self._filled = 0

    def add(self, pieces: list[dict[str, Any]], source: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The tensors that became whole, in order.  Raises ValueError on pieces that do not fit together."""
        whole = []
        for piece in pieces:
            self._begin(piece)
            raw = self._tensor.reshape(-1).view(torch.uint8)
            begin, count, offset = piece["begin"], piece["bytes"], piece["offset"]
            if begin != self._filled or begin + count > raw.numel() or not 0 <= offset <= source.numel() - count:
                raise ValueError(f"a piece of {piece['name']} that does not fit: {piece}")
            raw[begin : begin + count].copy_(source[offset : offset + count])
            self._filled += count
            if self._filled == raw.numel():
                whole.append((self.name, self._tensor))
                self.kinds[self.name] = tuple(self._tensor.shape), self._tensor.dtype
                self.name = self._tensor = None
        return whole

    def _begin(self, piece: dict[str, Any]) -> None:
        if self.name is not None:
            if piece["name"] != self.name:
                raise ValueError(f"{piece['name']} began before {self.name} was whole")
            return
        if piece["dtype"] not in DTYPES or piece["name"] in self.kinds:
            raise ValueError(f"{piece['name']}: dtype {piece['dtype']!r} is not taken, or it came twice")
        self.name, self._filled = piece["name"], 0
        self._tensor = torch.empty(piece["shape"], dtype=DTYPES[piece["dtype"]], device=self.device)
