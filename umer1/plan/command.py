"""`umer1 plan`: what a training run would take, before anything of it exists.

    umer1 plan sft --config examples/configs/qwen2_vl_2b_sft_8xh100.yaml --shape qwen2-vl-2b --world-size 8
    umer1 plan grpo --config FILE --hf-model DIR --world-size 64 --hardware h200 --json

    umer1 plan sft --config FILE --shape qwen2-vl-7b --world-size 8 --headline

Needs no GPU and no weights: the model's shape is that of --shape, of --hf-model's config.json, or, with neither, of the
newest checkpoint in --load.  Every setting of training is legal, and the settings' own rules are checked for
--world-size processes; no other path is looked at.  The memory is counted allocation by allocation (docs/plan.md tells
how far it is right); times rest on assumptions that are named.  --json writes the whole plan as JSON, --headline one
line of it: the first of the recipes in examples/configs.  Status 1: the run would not fit.
"""

import json
import sys
from typing import Any

from umer1.configuration import help_text, load_config
from umer1.errors import UserError
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.plan.predict import Plan, make_plan
from umer1.plan.report import as_json, as_text, header, headline, settings_text
from umer1.plan.settings import GRPOPlanConfig, SFTPlanConfig, training_part, without_files
from umer1.plan.shapes import find_shape
from umer1.training.launch import open_directory

STAGES = {"sft": SFTPlanConfig, "grpo": GRPOPlanConfig}


def main(argv: list[str]) -> None:
    """Run the command.  Raises ConfigError with every violation at once."""
    stages = " or ".join(STAGES)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        print(f"\numer1 plan {stages} --help lists every setting")
        return
    if argv[0] not in STAGES:
        raise UserError(f"{argv[0]!r} is no stage of training; use {stages}")
    stage, rest = argv[0], [word for word in argv[1:] if word not in ("--json", "--headline")]
    if {"-h", "--help"} & set(rest):
        print(help_text(STAGES[stage], __doc__))
        return
    plan = read_plan(stage, rest)
    if "--json" in argv:
        print(json.dumps(as_json(plan), indent=2))
    elif "--headline" in argv:
        print(headline(plan))
    else:
        print("\n\n".join([header(plan.settings, stage), settings_text(plan), as_text(plan)]))
    if plan.problems():
        sys.stdout.flush()
        sys.exit(1)


def read_plan(stage: str, argv: list[str]) -> Plan:
    """The plan of `argv`, flags as the training program takes them and those of PlanConfig."""
    shapes: list[Any] = []

    def check(config: Any) -> list[str]:
        world_size = config.plan.world_size
        config.parallel.resolve(world_size, gpu=config.plan.on_gpus)
        try:
            shapes.append(_shape_of(config))
        except UserError as error:
            return [str(error), *config.parallel.violations(None, world_size if world_size >= 1 else None)]
        if config.plan.processes_of_node < 1:
            return []
        return config.layout_violations(shapes[0], world_size) + config.node_violations(config.plan.processes_of_node)

    config = load_config(STAGES[stage], argv, further=check)
    return make_plan(training_part(without_files(config)), shapes[0], config.plan)


def _shape_of(config: Any) -> Qwen2VLConfig:
    """The model's; of --load alone that of the checkpoint, which training would go on with.  Raises UserError."""
    if config.plan.shape is None and config.model.hf_model is None and config.checkpoint.load is not None:
        return open_directory(config, weights=False).config
    return find_shape(config.plan.shape, config.model.hf_model)
