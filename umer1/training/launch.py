"""What happens between the command line and the first process group: all checks, those that need files included."""

from pathlib import Path

from umer1.config import SFTConfig
from umer1.configuration import load_config
from umer1.data.mini_mmeb import make_mini_mmeb
from umer1.distributed.parallel import ParallelState, launched_world_size
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory

MINI_DATA = Path("runs/mini-mmeb")


def read_command_line(argv: list[str], default_config: Path) -> tuple[SFTConfig, HFDirectory]:
    """The configuration and the opened model directory; ConfigError with all violations, before any GPU is touched."""
    opened: list[HFDirectory] = []

    def check_files(config: SFTConfig) -> list[str]:
        try:
            opened.append(HFDirectory.open(config.model.source))
        except UserError as error:
            return [str(error)]
        return config.layout_violations(opened[0].config, launched_world_size())

    config = load_config(SFTConfig, argv, default_config, check_files)
    return config, opened[0]


def prepare_default_data(config: SFTConfig, state: ParallelState) -> None:
    """Without --data-path: draw mini-MMEB (once; it is kept) and train on it."""
    if config.data.data_path is not None:
        return
    if state.rank == 0:
        make_mini_mmeb(MINI_DATA)
    state.barrier()
    config.data.data_path, config.data.data_root = str(MINI_DATA / "train.json"), str(MINI_DATA)
