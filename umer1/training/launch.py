"""What happens between the command line and the first process group: all checks, those that need files included."""

from pathlib import Path

from umer1.checkpoints.layout import iteration_path, list_iterations
from umer1.configuration import load_config
from umer1.data.mini_mmeb import make_mini_mmeb
from umer1.distributed.parallel import ParallelState, launched_world_size
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.export import destination_problem
from umer1.training.checkpoint import ASSETS
from umer1.training.config import SFTConfig

MINI_DATA = Path("runs/mini-mmeb")


def read_command_line(argv: list[str], default_config: Path) -> tuple[SFTConfig, HFDirectory]:
    """The configuration and the opened model directory; ConfigError with all violations, before any GPU is touched."""
    opened: list[HFDirectory] = []

    def check_files(config: SFTConfig) -> list[str]:
        problem = destination_problem(config.model.export_hf) if config.model.export_hf else None
        problems = [problem] if problem else []  # said now, not after days of training
        try:
            opened.append(open_directory(config))
        except UserError as error:
            return [*problems, str(error)]
        return problems + config.layout_violations(opened[0].config, launched_world_size())

    config = load_config(SFTConfig, argv, default_config, check_files)
    return config, opened[0]


def open_directory(config: SFTConfig) -> HFDirectory:
    """Of --hf-model; with --load alone the one kept in its newest checkpoint, without weights; else the tiny base."""
    if config.model.hf_model is None and config.checkpoint.load is not None:
        return HFDirectory.open(newest_assets(Path(config.checkpoint.load)), weights=False)
    return HFDirectory.open(config.model.source)


def newest_assets(load: Path) -> Path:
    """The Hugging Face files inside a checkpoint, or inside the newest one of a save directory."""
    if not (load / ASSETS).is_dir():
        iterations = list_iterations(load) if load.is_dir() else []
        if not iterations:
            raise UserError(f"load={load} holds no checkpoint (no iter_* directory); give --hf-model to start from")
        load = iteration_path(load, max(iterations))
    return load / ASSETS


def prepare_default_data(config: SFTConfig, state: ParallelState) -> None:
    """Without --data-path: draw mini-MMEB (once; it is kept) and train on it."""
    if config.data.data_path is not None:
        return
    if state.rank == 0:
        make_mini_mmeb(MINI_DATA, progress=print)
    state.barrier()
    config.data.data_path, config.data.data_root = str(MINI_DATA / "train.json"), str(MINI_DATA)
