"""`umer1 eval --benchmark mmeb-v2`: scores of a model on the 78 tasks of MMEB-V2.

    umer1 eval --benchmark mmeb-v2 --data-root DIR --check
    umer1 eval --benchmark mmeb-v2 --data-root DIR --model DIR --output DIR --query-mode gen --target-mode gen
    torchrun --nproc-per-node 8 -m umer1.cli eval --benchmark mmeb-v2 ... --tasks MSCOCO_t2i MSVD --engine vllm

--check says what is there and which version it is, without a model.  A run looks at all data before it loads the model,
refuses media that are missing (--allow-missing counts and leaves them out), embeds every distinct candidate once and
saves as it goes: broken off and started again, it goes on where it was.  OUTPUT gets the files of the reference
evaluation, results.json and results.txt.

    umer1 eval --benchmark mmeb-v2 --data-root DIR --stored OUTPUT --output DIR    all pairs of modes, oracle, adaptive
    umer1 eval --benchmark mmeb-v2 --from-reference DIR --output DIR               files of the reference evaluation
"""

import sys
from contextlib import ExitStack

from umer1.configuration import help_text, load_config
from umer1.data.images import ImageConfig
from umer1.distributed.parallel import init_distributed, launched_rank
from umer1.evaluation.mmeb_v2.config import MMEBCommand, MMEBConfig
from umer1.evaluation.mmeb_v2.coverage import check_coverage, coverage_report
from umer1.evaluation.mmeb_v2.memory import Memory, survey
from umer1.evaluation.mmeb_v2.registry import select
from umer1.evaluation.mmeb_v2.run import encode_tasks, open_newest
from umer1.evaluation.mmeb_v2.scoring import Scorer, score_references, score_stored
from umer1.evaluation.mmeb_v2.types import TaskSpec
from umer1.files import alone_in, make_folder, writing_to
from umer1.inference.replicas import on_first


def main(argv: list[str]) -> None:
    """The command; every rank runs it, rank 0 prints and writes."""
    if {"-h", "--help"} & set(argv):
        print(help_text(MMEBCommand, __doc__))
        return
    command = load_config(MMEBCommand, argv)
    config = command.eval
    specs = select(config.tasks or [], config.modality)
    if config.output:
        make_folder(config.output)
    if config.stored or config.from_reference:
        if launched_rank() == 0:
            _score_again(config, specs)
        return
    try:
        _evaluate(command, specs)
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("umer1 eval: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        sys.exit(130)


def _score_again(config: MMEBConfig, specs: list[TaskSpec]) -> None:
    score = score_stored if config.stored else score_references
    with writing_to(config.output):
        score(config, specs, lambda text: print(text, flush=True))


def _evaluate(command: MMEBCommand, specs: list[TaskSpec]) -> None:
    """Look at the data of `specs`, and unless it is only to be checked, run the model over it."""
    config = command.eval
    with init_distributed(command.engine.parallel()) as state, ExitStack() as held:
        kept_in = None if config.check else config.output
        if kept_in is not None:
            on_first(lambda: held.enter_context(alone_in(kept_in)), state)
        opened = None if config.check else open_newest(command, state)  # a model that does not fit is said at once
        frames = opened[1].image_config.num_frames if opened else command.engine.num_frames or ImageConfig().num_frames
        memory = Memory(kept_in, config.data_root, frames, config.max_queries)
        covered = survey(specs, memory, state)
        if config.check and state.rank == 0:
            print(coverage_report(covered, specs), flush=True)
        check_coverage(covered, allow_missing=config.allow_missing)
        if config.check:
            return
        scorer = Scorer(command, state.device)
        sha256 = encode_tasks(command, *opened, specs, covered, state, memory, scorer)
        text = on_first(lambda: scorer.report(sha256), state)
        if state.rank == 0:
            print(text, flush=True)
        state.barrier()
