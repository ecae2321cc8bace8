"""The state of one step as each rank will write it: taken between two steps, written then or by a thread later.

megatron's own asynchronous writer is not used.  It forks a process per file, beside CUDA contexts and the threads of
NCCL and vLLM, and keeps a server process for their results; a killed trainer would leave them behind, and one killed
writer would make it wait for ever.  Its steps that do serve are taken one by one: the sharded state dict, the
distribution of the write over data-parallel ranks, the save planner.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

from umer1 import device
from umer1.checkpoints.fp8_state import scaling_to_save
from umer1.checkpoints.sharded_state import METADATA, cause_of, sharded_state
from umer1.distributed.optimizer_checkpoint import gather_states
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.files import not_written


class ShardTaker:
    """Takes the state of one run's models and optimizer, again and again; who writes what is settled once."""

    def __init__(self, parallel: ParallelState):
        self.parallel = parallel
        self._settled = False
        self._distribution: ShardDistribution | None = None

    def take(self, models: list[torch.nn.Module], optimizer: Any, *, copy: bool) -> "Shards":
        """This rank's part of the weights of `models` and, unless None, of the optimizer's state; collective.

        copy: into host memory, page-locked where there is a GPU, so that later steps do not change what is written.
        Otherwise the tensors are the model's own, and have to be written before the next step.
        """
        state = sharded_state(models, optimizer, is_loading=False)
        if optimizer is not None:
            state["fp8_scaling"] = scaling_to_save(models, self.parallel)
        sharded, common = save_preprocess(state, validate_access_integrity=not self._settled)
        group = self.parallel.groups.dp
        if not self._settled:
            self._distribution = determine_main_replica_uniform_distribution(sharded, group)
            self._settled = True
        distribute_main_replicas_with_precomputed_distribution(sharded, group, self._distribution)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        _fetch([tensor for tensors in by_key.values() for tensor in tensors], optimizer, copy)
        packed = io.BytesIO()
        torch.save(common | {"content_metadata": METADATA}, packed)
        return Shards(by_key, packed.getvalue(), in_host_memory=copy)


@torch.no_grad()
def _fetch(tensors: list[ShardedTensor], optimizer: Any, copy: bool) -> None:
    """Give each tensor its data: of shapes what they stand for, of others a copy if asked."""
    wanted = []
    for tensor in tensors:
        if copy or tensor.data.is_meta:
            target = torch.empty(tensor.data.shape, dtype=tensor.data.dtype, pin_memory=device.has_cuda())
            if tensor.data.is_meta:
                wanted.append((tensor.data, target))
            else:
                target.copy_(tensor.data, non_blocking=True)
            tensor.data = target
    if optimizer is not None:
        gather_states(optimizer, wanted)
    device.synchronize()


@dataclass(frozen=True, slots=True)
class Shards:
    """What this rank writes of one step."""

    tensors: dict[str, list[ShardedTensor]]  # by the checkpoint's names
    common: bytes  # what is no tensor, the same on all ranks: common.pt
    in_host_memory: bool

    def write(self, directory: Path, group: dist.ProcessGroup | None) -> None:
        """Write megatron's torch_dist files but for the small ones (`write_small_files`); collective over `group`.

        Raises UserError on every rank when any rank could not write.
        """
        writer = _Writer(
            str(directory),
            thread_count=1,
            sync_files=True,
            # No copies on a CUDA stream of its own where there are none to make: the thread would open device 0.
            per_thread_copy_ahead=0 if self.in_host_memory else 10_000_000,
        )
        planner = _Planner(flatten_state_dict=False, can_run_decentralized_global_plan=False)
        try:
            torch_checkpoint.save(
                mcore_to_pyt_state_dict(self.tensors, False),
                storage_writer=writer,
                planner=planner,
                process_group=group,
            )
        except (CheckpointException, CheckpointingException, OSError) as error:
            raise UserError(not_written("the checkpoint", directory.parent, cause_of(error))) from error

    def write_small_files(self, directory: Path) -> None:
        """Rank 0's: common.pt and the name of the format."""
        (directory / "common.pt").write_bytes(self.common)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's writer; without the name of the (temporary) directory in the metadata, with the system's own errors."""

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: SavePlan, planner: MCoreSavePlanner) -> Future:
        try:
            # Without the archives' own CRC-32, which torch computes with the interpreter's lock held: training would
            # stand still, 0.4 s for a tensor of 400 MB.  The manifest has one of the whole file.
            with serialization_config.patch({"save.compute_crc32": False}):
                return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch's archive writer meets a failed write with an assertion of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _Planner(MCoreSavePlanner):
    """megatron's planner; files do not say what memory they were written from."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            item.tensor_data.properties.pin_memory = False
        return plan
