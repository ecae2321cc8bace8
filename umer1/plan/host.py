"""Host memory of a rank beside its device's: an optimizer that is there, GRPO's reference, the snapshot of a save."""

import heapq
import re

from umer1.plan.parameters import Parameter
from umer1.plan.setup import Setup
from umer1.training.policy_config import GRPOConfig


def host_bytes(setup: Setup, stage: int) -> dict[str, int]:
    """What -> bytes for the rank of pipeline stage `stage` that takes most; without batches and what workers hold."""
    states, config = setup.states(stage), setup.config
    found = {"the optimizer": states.host}
    if setup.hardware.gpu and isinstance(config, GRPOConfig) and config.policy.beta > 0:
        found["GRPO's reference"] = states.trained * setup.itemsize
    if config.checkpoint.async_save:
        found["the snapshot that async_save writes from"] = snapshot_bytes(
            setup.chunks(stage),
            stage=stage,
            dp=setup.layout.dp,
            itemsize=setup.itemsize,
            distributed=setup.parallel.use_distributed_optimizer,
        )
    return {what: size for what, size in found.items() if size}


def snapshot_bytes(
    chunks: list[list[Parameter]], *, stage: int, dp: int, itemsize: int, distributed: bool = True
) -> int:
    """Of the data-parallel rank that writes most of a checkpoint (checkpoints/shards.py).

    Each weight once, and of a trained one the fp32 main weight (where there is one) and both moments.  Megatron deals
    whole tensors out (megatron.core.dist_checkpointing.exchange_utils): the largest first, each to the rank that has
    least so far.
    """
    states = 3 if distributed or itemsize < 4 else 2
    sizes = []
    for parameter in (parameter for chunk in chunks for parameter in chunk):
        if parameter.shared and stage > 0:
            continue  # the copy of the embedding
        # A gated FFN's two matrices lie in one, and a checkpoint has them apart.
        parts = 2 if re.search(r"^decoder\..*linear_fc1\.weight$", parameter.name) else 1
        each = parameter.numel // parts
        sizes += parts * [each * itemsize] + parts * states * parameter.trained * [4 * each]
    loads = [0] * dp
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads)
