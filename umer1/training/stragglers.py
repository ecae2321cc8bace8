"""Which rank holds the others up: each rank's own work by phase, compared once a log line."""

import statistics

import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelState


def straggler_report(own: dict[str, float], state: ParallelState) -> dict[str, float]:
    """slowest_PHASE_rank and slowest_PHASE_ratio, the slowest rank's seconds by the median rank's; collective.

    own: seconds of own work by phase, the same phases on all ranks.  Ranks with no work in a phase are left out of it.
    slowest_rank and slowest_ratio are of all phases together.
    """
    mine = torch.tensor(list(own.values()), dtype=torch.float64, device=state.device)
    everyone = [torch.empty_like(mine) for _ in range(state.world_size)]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).cpu()
    record: dict[str, float] = {}
    for name, seconds in zip(["", *own], [table.sum(1), *table.T], strict=True):
        working = [value for value in seconds.tolist() if value > 0]
        prefix = f"slowest_{name.replace(' ', '_')}_" if name else "slowest_"
        record[f"{prefix}rank"] = int(seconds.argmax())
        record[f"{prefix}ratio"] = max(working) / statistics.median(working) if working else 1.0
    return record
