"""The frames of a micro-batch's pictures divided over tensor-parallel ranks, which see them through whole ViTs.

A picture is one frame, a video t of them: attention stays inside a frame, and so do the windows that the merger joins.
Every rank knows all grids and divides them alike, so nothing has to be agreed on.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F

from umer1.models.qwen2_vl.config import VisionConfig


def frame_cost(patches: int, vision: VisionConfig) -> float:
    """FLOPs of a ViT block on a frame, up to a constant: 2 d (4 d + 2 f) n of the products and 4 d n^2 of attention."""
    return patches * (2 * vision.embed_dim + vision.ffn_hidden_size + patches)


def divide(costs: list[float], ranks: int) -> list[int]:
    """Each item's rank: the dearest first, each to the rank that has least so far (ties: the first item and rank)."""
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owners[item] = min(range(ranks), key=loads.__getitem__)
        loads[owners[item]] += costs[item]
    return owners


@dataclass(frozen=True, slots=True)
class Frames:
    """F frames in order and the rank that sees each; on the CPU, the same on all `ranks` ranks."""

    grids: torch.Tensor
    """int64 [F, 2]: height and width in patches."""
    owners: torch.Tensor
    """int64 [F]"""
    rank: int
    """This one."""
    ranks: int
    """1: nothing is divided."""

    @classmethod
    def of(cls, grid_thw: torch.Tensor, vision: VisionConfig, rank: int, ranks: int) -> Self:
        """Of pictures [V, 3], divided by cost."""
        grids = [(height, width) for times, height, width in grid_thw.tolist() for _ in range(times)]
        owners = divide([frame_cost(height * width, vision) for height, width in grids], ranks)
        grids, owners = torch.tensor(grids, dtype=torch.int64).reshape(-1, 2), torch.tensor(owners, dtype=torch.int64)
        return cls(grids, owners, rank, ranks)

    @property
    def sizes(self) -> torch.Tensor:
        """int64 [F]: patches of each."""
        return self.grids.prod(-1)

    @property
    def patches(self) -> list[int]:
        """Of each rank's share."""
        return self._shares(self.sizes).tolist()

    def grids_of(self, rank: int) -> torch.Tensor:
        """int64 [frames of a rank, 3], one step of time each."""
        return F.pad(self.grids[self.owners == rank], (1, 0), value=1)

    def patches_of(self, rank: int) -> torch.Tensor:
        """int64: a rank's places among all patches."""
        return (self.owners == rank).repeat_interleave(self.sizes).nonzero().flatten()

    def own(self, patches: torch.Tensor) -> torch.Tensor:
        """This rank's rows of all frames' [P, ...]; rows that are its share already are left as they are."""
        count, everything = self.patches[self.rank], int(self.sizes.sum())
        if len(patches) == count:
            return patches
        if len(patches) != everything:
            raise ValueError(f"{len(patches)} patches, but the grids have {everything}, {count} of them this rank's")
        return patches.index_select(0, self.patches_of(self.rank).to(patches.device))

    def gather(self, rows: torch.Tensor, window: int, group: dist.ProcessGroup) -> torch.Tensor:
        """All frames' rows in order from each rank's share: [own, H] -> [all, H], a row for each `window` patches.

        Collective over `group`, whose ranks are the ones meant here; not all of them need have rows.  The gradient must
        be the same on all of them, and each takes its own rows of it.
        """
        if self.ranks == 1:
            return rows
        owners = self.owners.repeat_interleave(self.sizes // window)
        counts = self._shares(self.sizes // window)
        longest = int(counts.max())
        places = torch.empty_like(owners)
        for rank in range(self.ranks):
            places[owners == rank] = rank * longest + torch.arange(int(counts[rank]))
        own = (owners == self.rank).nonzero().flatten()
        return _Gather.apply(rows, places.to(rows.device), own.to(rows.device), longest, group)

    def _shares(self, amounts: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.ranks, dtype=torch.int64).index_add_(0, self.owners, amounts)

    def split(self, counts: list[int]) -> list[Self]:
        """In pieces of so many frames."""
        pairs = zip(self.grids.split(counts), self.owners.split(counts), strict=True)
        return [type(self)(grids, owners, self.rank, self.ranks) for grids, owners in pairs]


class _Gather(torch.autograd.Function):
    """Shares of different length, filled up to the longest for the collective; then put in order."""

    @staticmethod
    def forward(ctx, rows, places, own, longest, group):
        ctx.save_for_backward(own)
        filled = F.pad(rows, (0, 0, 0, longest - len(rows)))
        gathered = filled.new_empty(group.size() * longest, rows.shape[1])
        dist.all_gather_into_tensor(gathered, filled.contiguous(), group=group)
        return gathered.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None, None, None


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the ViT made of some pictures, before the merger: the rows of the frames that this rank saw."""

    rows: torch.Tensor
    """[P of the own share, vision_dim]"""
    frames: Frames

    def split(self, counts: list[int]) -> list[Self]:
        """In pieces of so many frames."""
        frames = self.frames.split(counts)
        rows = self.rows.split([part.patches[part.rank] for part in frames])
        return [type(self)(*piece) for piece in zip(rows, frames, strict=True)]

    @classmethod
    def join(cls, pieces: list[Self]) -> Self:
        """One after the other."""
        first, frames = pieces[0].frames, [piece.frames for piece in pieces]
        grids, owners = (torch.cat([getattr(part, name) for part in frames]) for name in ("grids", "owners"))
        return cls(torch.cat([piece.rows for piece in pieces]), Frames(grids, owners, first.rank, first.ranks))
