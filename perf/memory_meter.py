"""Every byte that torch's CPU allocator hands out and takes back, from the profiler's memory events: exact, not RSS.

The peak is what `torch.cuda.max_memory_allocated` is on a GPU: tensors and the temporaries inside of operators, not the
interpreter, not libraries, not what gloo or oneDNN allocate on their own.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Peak:
    """Filled when the block of `allocations` ends."""

    bytes: int = 0


@contextmanager
def allocations():
    """Count allocations of this thread (backward included) inside the block; what was there before is not in it."""
    found = Peak()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        found.bytes = max(found.bytes, now)
