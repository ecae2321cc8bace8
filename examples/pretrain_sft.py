"""Cold-start SFT of a Qwen2-VL model: discriminative InfoNCE + generative InfoNCE + language loss.

    torchrun --nproc-per-node 2 examples/pretrain_sft.py

trains the embedded default (a tiny Qwen2-VL on generated pictures) on 1, 2 or 4 processes, GPU or not.  Real runs:

    torchrun --nproc-per-node 8 examples/pretrain_sft.py --config examples/configs/qwen2_vl_2b_sft_8xh100.yaml \\
        --hf-model Qwen2-VL-2B-Instruct --data-path train.jsonl --data-root data --save runs/2b --export-hf runs/2b-hf

A run that was stopped goes on from its newest valid checkpoint when the same command is given again.  With --dry-run
--world-size 64 the command is checked on this machine as 64 processes would check it, and its memory and speed planned
(docs/plan.md); nothing is trained.
"""

import sys
from pathlib import Path

from umer1.configuration import help_text
from umer1.distributed.parallel import init_distributed, launched_rank
from umer1.errors import exit_on_user_error
from umer1.plan import dry_run
from umer1.training.config import SFTConfig, machine_violations
from umer1.training.launch import prepare_default_data, read_command_line
from umer1.training.sft import SFTTrainer
from umer1.training.signals import SignalWatch, end_with_launcher
from umer1.training.watch import Watch

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "mini_sft.yaml"


def main() -> None:
    with exit_on_user_error("pretrain_sft"):
        if {"-h", "--help"} & set(sys.argv[1:]):
            if launched_rank() == 0:
                print(help_text(SFTConfig, __doc__))
            return
        if dry_run.is_asked(sys.argv[1:]):
            dry_run.dry_run("sft", sys.argv[1:], DEFAULT_CONFIG)
            return
    end_with_launcher()
    with SignalWatch() as signals, exit_on_user_error("pretrain_sft"):
        config, directory = read_command_line(SFTConfig, sys.argv[1:], DEFAULT_CONFIG, machine_violations)
        with (
            init_distributed(config.parallel, seed=config.run.seed) as state,
            Watch.of(config, state, SFTTrainer.own_phases, signals) as watch,
        ):
            with watch.phase("preparing the default data"):
                prepare_default_data(config, state)
            SFTTrainer(config, directory, state, watch).fit()


if __name__ == "__main__":
    main()
