"""Every byte that torch's CPU allocator hands out and takes back, from the profiler's memory events: exact, not RSS.

The peak is what `torch.cuda.max_memory_allocated` is on a GPU: tensors and the temporaries inside of operators, not the
interpreter, not libraries, not what gloo or oneDNN allocate on their own.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._C._profiler import _EventType


@dataclass
class Peak:
    """Filled when the block of `allocations` ends."""

    bytes: int = 0


@contextmanager
def allocations():
    """Count allocations of this thread (backward included) inside the block; what was there before is not in it.

    The profiler sees one thread.  Where the last reference to a tensor was one of gloo's threads, its end is not seen;
    it is inferred when the same address is handed out again.
    """
    found = Peak()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    events, pending = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    total = 0
    for _, address, size in sorted(events):
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
            found.bytes = max(found.bytes, total)
