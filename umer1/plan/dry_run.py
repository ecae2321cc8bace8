"""`--dry-run` of the training programs: everything that can be wrong with a command, found without its cluster.

The settings are checked as at a real start, for --world-size processes.  Then a rank of each pipeline stage is played
in turn: fake process groups of the real size, the real model and its gradient buffers on tensors without memory.  What
those hold is compared with what the plan says of them.  Ends with the plan.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from umer1.configuration import load_config
from umer1.distributed.parallel import init_distributed, launched_rank, launched_world_size
from umer1.errors import UserError
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.plan.no_memory import NoMemory
from umer1.plan.predict import Plan, make_plan
from umer1.plan.report import as_text, header, settings_text
from umer1.plan.settings import GRPODryRunConfig, SFTDryRunConfig, training_part
from umer1.plan.shapes import SHAPES
from umer1.training.build import build_training_model
from umer1.training.launch import program_violations

FLAG = "--dry-run"
STAGES = {"sft": SFTDryRunConfig, "grpo": GRPODryRunConfig}


def is_asked(argv: list[str]) -> bool:
    """Whether the command line has --dry-run."""
    return FLAG in argv


def dry_run(
    stage: str, argv: list[str], default_config: Path, check: Callable[[Any], list[str]] = lambda config: []
) -> Plan | None:
    """Check, play the ranks, print the plan and return it; None on other ranks than the first.

    Raises ConfigError with all violations, UserError if it does not fit.

    stage, default_config, check: as the program has them.  Flags of PlanConfig are legal beside those of training;
    --shape stands for a model directory that this machine does not have.  Under torchrun the first rank alone speaks,
    and --world-size is torchrun's where it is not given.
    """
    if launched_rank():
        return None
    argv = [word for word in argv if word != FLAG]
    given = any(word.split("=")[0] == "--world-size" for word in argv)
    if not given and launched_world_size() > 1:
        argv += ["--world-size", str(launched_world_size())]
    plan = _checked_plan(stage, argv, default_config, check)
    print("\n\n".join([header(plan.settings, stage), settings_text(plan)]), flush=True)
    for pipeline_stage in range(plan.setup.layout.pp):
        print(_play(plan, pipeline_stage), flush=True)
    print(f"\n{as_text(plan)}", flush=True)
    if plan.problems():
        raise UserError("the run would not fit: " + "; ".join(plan.problems()))
    return plan


def _checked_plan(stage: str, argv: list[str], default_config: Path, check: Callable[[Any], list[str]]) -> Plan:
    models = []

    def violations(config: Any) -> list[str]:
        settings = config.plan
        if settings.processes_of_node < 1:
            return []
        config.parallel.resolve(settings.world_size, gpu=settings.on_gpus)
        if settings.shape is not None:
            models.append(SHAPES[settings.shape])
            found = config.layout_violations(models[0], settings.world_size)
            return found + config.node_violations(settings.processes_of_node)
        opened: list[HFDirectory] = []
        size = settings.world_size, settings.processes_of_node
        found = program_violations(config, check, *size, opened, gpu=settings.on_gpus, weights=False)
        models.extend(directory.config for directory in opened)
        return found

    config = load_config(STAGES[stage], argv, default_config, violations)
    return make_plan(training_part(config), models[0], config.plan)


def _play(plan: Plan, pipeline_stage: int) -> str:
    """Build the first rank of a pipeline stage as it would be; one line about it."""
    setup, layout = plan.setup, plan.setup.layout
    rank = layout.rank_of(pp=pipeline_stage)
    with _fake_processes(rank, layout.world_size), init_distributed(setup.parallel) as state:
        with NoMemory():
            models = build_training_model(
                setup.config.model,
                setup.parallel,
                SimpleNamespace(config=setup.model),
                state,
                weights_follow=True,
            )
        weights = sum(parameter.numel() for model in models for parameter in model.parameters())
        gradients = sum(buffer.numel for model in models for buffer in model.buffers)
        place = layout.place(rank, plan.settings.gpus_per_node)
        assert (state.tp_rank, state.dp_rank, state.pp_rank) == (place.tp, place.dp, place.pp), place
    # FP8 weights, which have buffers of their own, need Transformer Engine: what was built has them in bf16.
    in_bf16 = replace(setup, config=replace(setup.config, fp8=FP8Config()))
    planned = in_bf16.states(pipeline_stage).gradients // 4
    assert gradients == planned, f"rank {rank}: {gradients} elements of gradients, the plan says {planned}"
    return (
        f"rank {rank}, first of stage {pipeline_stage}: built with {weights:,} parameters and {gradients:,} elements "
        f"of gradients, in groups of TP {state.tp_size}, DP {state.dp_size}, PP {state.pp_size}"
    )


@contextmanager
def _fake_processes(rank: int, world_size: int) -> Iterator[None]:
    """A default process group of that size with nobody else in it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, which training needs not

    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
