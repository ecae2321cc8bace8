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

from umer1.configuration import help_text, load_config
from umer1.distributed.parallel import init_distributed
from umer1.evaluation.mmeb_v2.config import MMEBCommand
from umer1.evaluation.mmeb_v2.coverage import check_coverage, coverage_report
from umer1.evaluation.mmeb_v2.memory import Memory, survey
from umer1.evaluation.mmeb_v2.registry import select
from umer1.evaluation.mmeb_v2.run import encode_tasks
from umer1.evaluation.mmeb_v2.scoring import Scorer, score_references, score_stored
from umer1.files import make_folder


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
        (score_stored if config.stored else score_references)(config, specs, lambda text: print(text, flush=True))
        return
    with init_distributed(command.engine.parallel()) as state:
        kept_in = None if config.check else config.output
        memory = Memory(kept_in, config.data_root, command.engine.num_frames, config.max_queries)
        covered = survey(specs, memory, state)
        if config.check and state.rank == 0:
            print(coverage_report(covered, specs), flush=True)
        check_coverage(covered, allow_missing=config.allow_missing)
        if config.check:
            return
        scorer = Scorer(command, state.device)
        sha256 = encode_tasks(command, specs, covered, state, memory, scorer)
        if state.rank == 0:
            print(scorer.report(sha256), flush=True)
        state.barrier()
