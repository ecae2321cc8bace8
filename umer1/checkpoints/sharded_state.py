"""Model and optimizer to and from megatron's torch_dist format, independent of TP, PP, VPP and DP.

The sharded part holds tensors only: objects would be pickled, and nothing that umer1 needs is one.  What Transformer
Engine would pickle of FP8's delayed scaling goes with the optimizer's state as tensors (fp8_state.py).
"""

import gc
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from umer1.checkpoints.fp8_state import scaling_to_load, scaling_to_save, take_scaling
from umer1.distributed.optimizer_checkpoint import mend
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.weights import agree, unwrap

# Optimizer state as tensors of the parameters' shapes, so that it loads at any layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's writer without the name of the (temporary) directory in the metadata."""

    def storage_meta(self) -> None:
        return None


class _InProcessSave(SaveShardedStrategy):
    """torch_dist written by torch's own writer in this process.

    megatron's writer forks a process per file and keeps a server process for their results, also when it saves
    synchronously; a killed trainer would leave them behind, and one killed writer would make it wait for ever.
    """

    def __init__(self):
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_Writer(str(checkpoint_dir), thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False, can_run_decentralized_global_plan=False),
        )


def write_sharded(directory: Path, models: list[torch.nn.Module], optimizer: Any, parallel: ParallelState) -> None:
    """Write the weights of `models` and, unless None, the optimizer's state into `directory`; collective.

    Raises UserError on every rank when any rank could not write.
    """
    strategy = _InProcessSave()
    if parallel.dp_size > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, parallel.groups.dp)
    # The steps of dist_checkpointing.save, whose first and last would leave the other ranks waiting if rank 0 failed.
    state = _sharded_state(models, optimizer, is_loading=False)
    if optimizer is not None:
        state["fp8_scaling"] = scaling_to_save(models, parallel)
    sharded, common = save_preprocess(state)
    _on_rank_0(
        parallel, directory, lambda: torch.save(common | {"content_metadata": _METADATA}, directory / "common.pt")
    )
    try:
        strategy.save(sharded, directory)
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise UserError(_not_written(directory, error)) from error
    kind = CheckpointingConfig(strategy.backend, strategy.version)
    _on_rank_0(parallel, directory, lambda: save_config(kind, str(directory)))


def _on_rank_0(parallel: ParallelState, directory: Path, write: Callable[[], None]) -> None:
    """Let rank 0 write a file; its failure is a UserError on every rank."""
    problem = None
    if parallel.rank == 0:
        try:
            write()
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            problem = _not_written(directory, error)
    agree(problem, parallel)


def _not_written(directory: Path, error: BaseException) -> str:
    free = shutil.disk_usage(directory.parent).free / 2**30
    return f"the checkpoint could not be written under {directory.parent} ({free:.1f} GiB free): {_cause(error)}"


def read_sharded(directory: Path, models: list[torch.nn.Module], optimizer: Any, parallel: ParallelState) -> None:
    """Fill `models` and, unless None, `optimizer` from `directory`, which has been checked; collective."""
    strategy = TorchDistLoadShardedStrategy()
    if parallel.dp_size > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, parallel.groups.dp)
    try:
        state = _sharded_state(models, optimizer, is_loading=True)
        if optimizer is not None:
            state["fp8_scaling"] = scaling_to_load(models, directory, parallel)
        with warnings.catch_warnings():
            # torch tells its callers, here megatron, not to use ShardedTensor any more
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            loaded = dist_checkpointing.load(state, str(directory), strategy)
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise UserError(f"{directory} cannot be loaded into this model: {_cause(error)}") from error
    for index, model in enumerate(models):
        missing, unexpected = unwrap(model).load_state_dict(loaded[f"model{index}"], strict=False)
        # Extra states (see _tensors_only) are the only thing that is left out.
        if unexpected or any(not name.endswith("_extra_state") for name in missing):
            raise AssertionError(f"missing {missing}, unexpected {unexpected}")
    if optimizer is not None:
        take_scaling(models, loaded["fp8_scaling"], parallel)
        settings = [_own_settings(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(loaded["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
    gc.collect()


def _sharded_state(models: list[torch.nn.Module], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    state = {f"model{i}": unwrap(model).sharded_state_dict(metadata=dict(_METADATA)) for i, model in enumerate(models)}
    state = _tensors_only(state)
    if optimizer is not None:
        mend(optimizer)
        of_models = {key: state[key] for key in list(state)}
        state["optimizer"] = optimizer.sharded_state_dict(of_models, is_loading=is_loading, metadata=dict(_METADATA))
    return state


def _tensors_only(value: Any) -> Any:
    """Without ShardedObjects: the extra states of layers, pickled and empty but for FP8 with delayed scaling."""
    if isinstance(value, dict):
        return {key: _tensors_only(item) for key, item in value.items() if not isinstance(item, ShardedObject)}
    return value


def _own_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's settings from this run's configuration, which win over the checkpoint's."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _cause(error: BaseException) -> str:
    """One line; torch's CheckpointException lists each rank's error."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(sorted({f"{_single(failure[0])}" for failure in failures.values()}))
    return str(error)


def _single(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
