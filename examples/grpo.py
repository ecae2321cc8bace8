"""GRPO of an SFT model: sample responses, reward the embeddings that they lead to, prefer what was better.

    torchrun --nproc-per-node 2 examples/grpo.py

goes on from the embedded default's SFT run (runs/mini-umer1, made by examples/pretrain_sft.py), with vLLM for the
rollouts where it is installed and plain sampling elsewhere.  Real runs:

    torchrun --nproc-per-node 8 examples/grpo.py --config examples/configs/qwen2_vl_2b_grpo_8xh100.yaml \\
        --hf-model runs/2b-hf --data-path rl.json --data-root data --save runs/2b-grpo --export-hf runs/2b-grpo-hf

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
from umer1.training.config import machine_violations
from umer1.training.grpo import GRPOTrainer
from umer1.training.launch import default_policy_violations, prepare_default_prompts, read_command_line
from umer1.training.policy_config import GRPOConfig
from umer1.training.signals import SignalWatch, end_with_launcher
from umer1.training.watch import Watch

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "mini_grpo.yaml"


def main() -> None:
    with exit_on_user_error("grpo"):
        if {"-h", "--help"} & set(sys.argv[1:]):
            if launched_rank() == 0:
                print(help_text(GRPOConfig, __doc__))
            return
        if dry_run.is_asked(sys.argv[1:]):
            dry_run.dry_run("grpo", sys.argv[1:], DEFAULT_CONFIG, default_policy_violations)
            return
    end_with_launcher()
    with SignalWatch() as signals, exit_on_user_error("grpo"):
        config, directory = read_command_line(
            GRPOConfig,
            sys.argv[1:],
            DEFAULT_CONFIG,
            lambda config: default_policy_violations(config) + machine_violations(config),
        )
        with (
            init_distributed(config.parallel, seed=config.run.seed) as state,
            Watch.of(config, state, GRPOTrainer.own_phases, signals) as watch,
        ):
            with watch.phase("preparing the default data"):
                prepare_default_prompts(config, state)
            GRPOTrainer(config, directory, state, watch).fit()


if __name__ == "__main__":
    main()
