"""Pairs that move between data-parallel ranks, so that each rank has about the same to compute (data/balancing.py).

Costs are exact, for they are those of pairs that have been read: only numbers are compared over all ranks, and of the
pairs none travels but those that another rank computes.
"""

import pickle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from umer1.data import shipping
from umer1.data.balancing import assign


def costs_of_all_ranks(costs: list[float], group: dist.ProcessGroup, device: torch.device) -> np.ndarray:
    """fp64 [ranks, n] of the n pairs that each rank has; the same on all of them."""
    mine = torch.tensor(costs, dtype=torch.float64, device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts).cpu().numpy()


def shared_out(costs: np.ndarray) -> np.ndarray:
    """int64 [ranks, n]: which rank shall compute each pair; see `assign`."""
    ranks, pairs = costs.shape
    return assign(costs.flatten(), np.repeat(np.arange(ranks), pairs), ranks).reshape(ranks, pairs)


def exchange(
    items: list[tuple[Any, Any]], owners: np.ndarray, group: dist.ProcessGroup, device: torch.device
) -> list[tuple[Any, Any]]:
    """What `owners` give to this rank, by slot.  Collective, unless nothing moves.

    items: EncodedPairs or PromptPairs, at least one, each with what goes along with it and can be pickled.  owners:
    int64 [ranks, n], of each item of each rank the rank that gets it; the same on all ranks.  Pixels travel as one
    tensor of the group's device and end there, also those of the pairs that stay.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if (owners == np.arange(ranks)[:, None]).all():
        return items
    owners = owners[rank].tolist()
    kept = [item for item, owner in zip(items, owners, strict=True) if owner == rank]
    pixels = shipping.packed([pair for pair, _ in kept])
    if pixels is not None:
        shipping.unpacked([pair for pair, _ in kept], pixels.to(device))
    leaving = [[item for item, owner in zip(items, owners, strict=True) if owner == to != rank] for to in range(ranks)]
    parts = [shipping.packed([pair for pair, _ in part]) for part in leaving]
    messages = [pickle.dumps(part) for part in leaving]
    sizes = torch.tensor(
        [[len(message), 0 if part is None else len(part)] for message, part in zip(messages, parts, strict=True)]
    ).to(device)
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=group)
    sizes, coming = sizes.T.tolist(), coming.T.tolist()
    content = torch.from_numpy(np.frombuffer(bytearray(b"".join(messages)), dtype=np.uint8))
    content = _all_to_all(content.to(device), sizes[0], coming[0], group)
    some = next(part for part in (pixels, *parts) if part is not None)
    leaving_pixels = torch.cat([some[:0], *(part for part in parts if part is not None)])
    pixels = _all_to_all(leaving_pixels.to(device), sizes[1], coming[1], group)
    for message, part in zip(content.cpu().split(coming[0]), pixels.split(coming[1]), strict=True):
        arrived = pickle.loads(message.numpy().tobytes())  # from a rank of this run, as torch's collectives of objects
        shipping.unpacked([pair for pair, _ in arrived], part)
        kept += arrived
    return sorted(kept, key=lambda item: item[0].slot)


def _all_to_all(values: torch.Tensor, sizes: list[int], coming: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """`values` cut by `sizes`, a piece to each rank; what the ranks sent to this one, in their order."""
    received = values.new_empty(sum(coming), *values.shape[1:])
    dist.all_to_all_single(received, values, coming, sizes, group=group)
    return received
