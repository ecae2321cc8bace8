"""Which rollout engine this run has, and where it stands among the ranks."""

from contextlib import suppress
from pathlib import Path

from umer1 import device
from umer1.data.images import ImageConfig
from umer1.distributed.flags import SharedFlag
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.engines.torch_engine import TorchEngine
from umer1.rl.engines.vllm_assets import check_head_size, check_positions
from umer1.rl.engines.vllm_engine import VLLMEngine
from umer1.rl.engines.vllm_install import has_vllm, how_to_install
from umer1.rl.phase import FollowingEngine, RolloutPhase
from umer1.rl.types import EngineDied, Interrupted, RolloutEngine, Stop
from umer1.training.batches import raise_together
from umer1.training.policy_config import GRPOConfig


def vllm_problem(model_config: Qwen2VLConfig | None) -> str | None:
    """Why a vLLM engine of this machine cannot run the model, or None; a server answers for itself."""
    if not has_vllm():
        return f"vLLM is not installed: {how_to_install()}"
    try:
        if model_config is not None:
            check_head_size(model_config)
    except UserError as error:
        return str(error)
    return None


def engine_violations(config: GRPOConfig, model_config: Qwen2VLConfig | None) -> list[str]:
    """Why the engine that was asked for cannot be had; the model is None where it could not be opened."""
    if config.rollout.rollout_engine != "vllm" or config.rollout.rollout_server is not None:
        return []
    problem = vllm_problem(model_config)
    return [f"rollout_engine=vllm: {problem}; or use --rollout-engine torch"] if problem else []


def uses_vllm(config: GRPOConfig, model_config: Qwen2VLConfig) -> bool:
    """vllm as it was asked for; auto takes it where it can run the model."""
    asked = config.rollout.rollout_engine
    if asked == "auto" and config.rollout.rollout_server is None:
        return vllm_problem(model_config) is None
    return asked != "torch"


def make_phase(config: GRPOConfig, directory: HFDirectory, state: ParallelState) -> RolloutPhase:
    """Start this rank's engine; collective.  UserError on all ranks when one cannot be started."""
    ranks = 1
    if servers := config.rollout.servers():
        ranks = state.world_size // len(servers)
    elif uses_vllm(config, directory.config):
        ranks = config.rollout.rollout_tensor_parallel_size
    engine, failure = None, None
    try:
        engine = make_engine(config, directory, state, ranks)
    except Exception as error:  # the other ranks would wait for this one
        failure = str(error) or repr(error)
    raise_together(failure)
    timeout = config.rollout.weight_sync_timeout_seconds
    return RolloutPhase(engine, state, ranks_per_engine=ranks, timeout=timeout, leave=SharedFlag("leave"))


def await_engines(phase: RolloutPhase, config: GRPOConfig, stop: Stop) -> None:
    """On GPUs wait for the engines beside the trainer, before it builds its model; collective.

    An engine that starts takes all that is allocated on its GPU meanwhile for its own need, and has so much less for
    keys and values; it even ends when memory becomes free.  One that dies is reported and started anew by its first
    use, which hears a signal as well.
    """
    if device.has_cuda() and config.rollout.rollout_server is None:
        with suppress(EngineDied, Interrupted):
            phase.start(stop)


def make_engine(config: GRPOConfig, directory: HFDirectory, state: ParallelState, ranks: int) -> RolloutEngine:
    """torch: this rank's part of it; vllm: the engine of the group of `ranks` ranks, or a follower of it."""
    dtype, length = config.model.params_dtype, config.data.seq_length
    if not uses_vllm(config, directory.config):
        return TorchEngine(config.rollout, directory, config.parallel, state, params_dtype=dtype, seq_length=length)
    number, place = divmod(state.rank, ranks)
    if place:
        return FollowingEngine()
    if not config.rollout.servers():
        check_positions(directory, length, f"--seq-length {length}")
    save, servers = config.checkpoint.save, config.rollout.servers()
    local_rank = device.local_rank()
    return VLLMEngine(
        config.rollout,
        directory,
        dtype=dtype,
        max_model_len=length,
        rank=state.rank,
        local_rank=local_rank,
        log_path=Path(save) / "logs" / f"vllm-rank{state.rank}.log" if save else None,
        server=servers[number] if servers else None,
        image_config=ImageConfig.of_directory(directory, config.data),
        devices=list(range(local_rank, local_rank + ranks)),
    )


def describe_engine(config: GRPOConfig, model_config: Qwen2VLConfig, state: ParallelState) -> str:
    """For the banner: which engine, and what else there could be."""
    if not uses_vllm(config, model_config):
        why = "asked for" if config.rollout.rollout_engine == "torch" else vllm_problem(model_config)
        return f"torch, plain sampling in the trainer's processes: slow ({why})"
    if servers := config.rollout.servers():
        return "vllm, servers " + ", ".join(f"{host}:{port}" for host, port in servers)
    count = state.world_size // config.rollout.rollout_tensor_parallel_size
    return f"vllm, {count} engine{'s' if count > 1 else ''} beside the trainer"
