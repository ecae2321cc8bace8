"""What happens between the command line and the first process group: all checks, those that need files included."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from umer1 import device as devices
from umer1.checkpoints.layout import list_iterations
from umer1.checkpoints.search import is_checkpoint_place
from umer1.checkpoints.source import open_model
from umer1.configuration import load_config
from umer1.data.mini_mmeb import make_mini_mmeb
from umer1.distributed.parallel import ParallelState, launched_world_size
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rules import cannot_be_looked_at, path_problems
from umer1.training.config import SFTConfig
from umer1.training.engines import engine_violations
from umer1.training.policy_config import GRPOConfig

C = TypeVar("C", SFTConfig, GRPOConfig)

MINI_DATA = Path("runs/mini-mmeb")
SFT_RUN = "runs/mini-umer1"  # where the embedded default of SFT saves, and GRPO's goes on


def read_command_line(
    config_class: type[C], argv: list[str], default_config: Path, check: Callable[[C], list[str]] = lambda config: []
) -> tuple[C, HFDirectory]:
    """The configuration and the opened model directory; ConfigError with all violations, before any GPU is touched.

    check: further rules of the stage.
    """
    opened: list[HFDirectory] = []

    def check_files(config: C) -> list[str]:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", launched_world_size()))
        return program_violations(config, check, launched_world_size(), processes, opened, gpu=devices.has_cuda())

    config = load_config(config_class, argv, default_config, check_files)
    return config, opened[0]


def program_violations(
    config: Any,
    check: Callable[[Any], list[str]],
    world_size: int,
    processes_of_node: int,
    opened: list[HFDirectory],
    *,
    gpu: bool,
    weights: bool = True,
) -> list[str]:
    """Broken rules that need files or the number of processes; the model directory that could be opened is appended.

    gpu: whether the run is on GPUs, which decides the settings that are left open.
    weights: whether the directory must hold them.
    """
    problems = check(config) + config.node_violations(processes_of_node)
    config.parallel.resolve(world_size, gpu=gpu)
    try:
        opened.append(open_directory(config, weights=weights))
    except UserError as error:
        problems += [str(error)] if str(error) not in problems else []
    except OSError as error:
        problems.append(cannot_be_looked_at(error.filename or config.model.source, error))
    model = opened[0].config if opened else None
    if isinstance(config, GRPOConfig):
        problems += engine_violations(config, model)
    return problems + (
        config.layout_violations(model, world_size) if model else config.parallel.violations(None, world_size)
    )


def open_directory(config: Any, *, weights: bool = True) -> HFDirectory:
    """Of --hf-model; with --load alone the one kept in its newest checkpoint, without weights; else the tiny base."""
    load = config.checkpoint.load
    if config.model.hf_model is not None or load is None:
        return HFDirectory.open(config.model.source, weights=weights)
    rule = "holds no checkpoint (no iter_* directory); give --hf-model to start from"
    if problems := path_problems("load", load, is_checkpoint_place, rule):
        raise UserError(problems[0])
    return open_model(load)


def draw_mini_mmeb(state: ParallelState) -> None:
    """The generated benchmark in its place (once; it is kept)."""
    if state.rank == 0:
        make_mini_mmeb(MINI_DATA, progress=print)
    state.barrier()


def prepare_default_data(config: SFTConfig, state: ParallelState) -> None:
    """SFT without --data-path: train on mini-MMEB."""
    if config.data.data_path is None:
        draw_mini_mmeb(state)
        config.data.data_path, config.data.data_root = [str(MINI_DATA / "train.json")], str(MINI_DATA)


def prepare_default_prompts(config: GRPOConfig, state: ParallelState) -> None:
    """GRPO without --data-path: train on mini-MMEB's RL pairs, and hold out the ones that are meant for it."""
    if config.data.data_path is not None:
        return
    draw_mini_mmeb(state)
    config.data.data_path, config.data.data_root = [str(MINI_DATA / "rl.json")], str(MINI_DATA)
    if config.heldout.eval_data_path is None:
        config.heldout.eval_data_path, config.heldout.eval_data_root = str(MINI_DATA / "rl_eval.json"), str(MINI_DATA)


def default_policy_violations(config: GRPOConfig) -> list[str]:
    """What GRPO needs that an earlier command makes.

    Raises UserError, one line, when the default command comes before the SFT run that it goes on from.
    """
    load = config.checkpoint.load
    if load == SFT_RUN and config.model.hf_model is None and not _has_checkpoint(Path(load)):
        raise UserError(
            f"there is no SFT run to go on from in {SFT_RUN}; make it by: torchrun --nproc-per-node 2 "
            "examples/pretrain_sft.py (or give --load or --hf-model)"
        )
    if load is None and config.model.hf_model is None:
        return ["GRPO goes on from an SFT model; give --load (an SFT run) or --hf-model (a Hugging Face directory)"]
    return []


def _has_checkpoint(save: Path) -> bool:
    return save.is_dir() and bool(list_iterations(save))
