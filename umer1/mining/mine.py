"""`umer1 mine`: hard negatives of an SFT file, by a model's embeddings.

    umer1 mine --model DIR --input pairs.jsonl --data-root data --output mined.jsonl --num-negatives 4
    torchrun --nproc-per-node 8 -m umer1.cli mine ... --mode gen

Every pair gets as negatives the positives of other pairs that score highest with its query, without those that equal
one of the query's positives and those that score so high that they may be right answers themselves.  --mode gen
compares the states at <gen_emb> of the responses that the file has, as training does; nothing is generated.  A run that
was broken off goes on when the same command is given again.  How it works: docs/mining.md.
"""

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.configuration import help_text, load_config
from umer1.data.dataset import PairDataset
from umer1.data.media import MediaRoot
from umer1.data.schema import Sequence, Side
from umer1.distributed.parallel import ParallelState, init_distributed
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.encode import Side as EncoderSide
from umer1.evaluation.mmeb_v2.encode import SideEncoder
from umer1.evaluation.mmeb_v2.parts import Parts
from umer1.files import alone_in, make_folder
from umer1.inference.embedders import Embedded
from umer1.inference.engine import Engine, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig
from umer1.inference.inputs import Input
from umer1.inference.replicas import on_first, share_with_all
from umer1.mining.config import MineCommand, MineConfig
from umer1.mining.corpus import Corpus, Sides, read_corpus
from umer1.mining.select import select
from umer1.mining.write import write_mined
from umer1.progress import Progress

_SHOWN = 20  # records that one message lists


def main(argv: list[str]) -> None:
    """The command; every rank runs it, rank 0 selects and writes."""
    if {"-h", "--help"} & set(argv):
        print(help_text(MineCommand, __doc__))
        return
    command = load_config(MineCommand, argv)
    config = command.mine
    make_folder(Path(config.output).absolute().parent)
    dataset = PairDataset(config.input, config.data_root)
    corpus = read_corpus(dataset, config.mode, across_data_sets=config.across_data_sets)
    _refuse(config, corpus, len(dataset))
    make_folder(work_folder(config))
    with init_distributed(command.engine.parallel()) as state, ExitStack() as held:
        if len(set(share_with_all(dataset.contents[0], state))) > 1:
            raise UserError(f"{config.input} is not the same on all machines; give all ranks one file")
        on_first(lambda: held.enter_context(alone_in(work_folder(config))), state)
        command.engine.model = on_first(lambda: str(newest_model(command.engine.model)), state)
        sha256 = on_first(lambda: model_fingerprint(command.engine.model), state)
        queries, candidates = embed(command, dataset, corpus, sha256, state)

        def finish() -> str:
            progress = Progress("umer1 mine", len(corpus.pairs), unit="pairs")
            mined = select(corpus, queries, candidates, config, device=state.device, progress=progress.add)
            progress.finish()
            report = write_mined(config, dataset, corpus, mined, {"path": command.engine.model, "sha256": sha256})
            shutil.rmtree(work_folder(config), ignore_errors=True)
            return report

        report = on_first(finish, state)
        if state.rank == 0:
            print(report, flush=True)


def work_folder(config: MineConfig) -> Path:
    """What a run that was broken off leaves for the next."""
    return Path(f"{config.output}.parts")


def _refuse(config: MineConfig, corpus: Corpus, count: int) -> None:
    if corpus.bad and not config.skip_bad_inputs:
        lines = [
            f"  record {index}: {error.cause}: {error.detail}" for index, error in list(corpus.bad.items())[:_SHOWN]
        ]
        lines += [f"  and {len(corpus.bad) - _SHOWN} more"] if len(corpus.bad) > _SHOWN else []
        raise UserError(
            f"{config.input}: {len(corpus.bad)} of {count} records are not SFT pairs; mend them, or leave them as they "
            "are and have them counted by --skip-bad-inputs:\n" + "\n".join(lines)
        )
    if not len(corpus.pairs):
        raise UserError(f"{config.input}: none of the {count} records is an SFT pair (docs/data.md)")


class SideStates:
    """The state of one side of pairs: at `<disc_emb>`, or at the `<gen_emb>` of the response in the file."""

    def __init__(self, engine: Engine, dataset: PairDataset, sides: Sides, kind: str, mode: str):
        self.engine, self.dataset, self.sides, self.kind, self.mode = engine, dataset, sides, kind, mode

    def prepare(self, item: Input, media: MediaRoot) -> Sequence:
        pair = self.dataset.read(self.sides.pairs[item.line - 1])
        side: Side = pair.query if self.kind == "qry" else pair.positive
        if self.mode == "disc":
            # a pair whose negative has a response that training refuses would be refused with it
            self.engine.processor.response_ids(side.response)
            side = replace(side, response=None)
        return self.engine.processor.encode_side(side, media)

    def embed(self, items: list[Input], prompts: list[Sequence]) -> list[Embedded]:
        rows = [prompt.disc_index if self.mode == "disc" else prompt.gen_index for prompt in prompts]
        return [(embedding, None) for embedding in self.engine.embed(prompts, rows)]


def embed(
    command: MineCommand, dataset: PairDataset, corpus: Corpus, sha256: str, state: ParallelState
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(queries float32 [Q, H], candidates float32 [C, H]) on rank 0, nan where a side is unusable; collective."""
    config = command.mine
    directory = open_directory(command.engine)
    processor = make_processor(command.engine, directory)
    engine = load_engine(command.engine, directory, processor, state)
    settings = [
        sha256,
        on_first(lambda: _file_hash(config.input), state),
        config.mode,
        config.across_data_sets,
        str(command.engine.dtype),
        command.engine.max_input_tokens,
        command.engine.blank_image_for_text,
        asdict(processor.image_config),
    ]
    total = len(corpus.queries.inputs) + len(corpus.candidates.inputs)
    progress = Progress("umer1 mine", total, enabled=state.rank == 0)
    found = []
    for kind, sides in (("qry", corpus.queries), ("tgt", corpus.candidates)):
        encoder = SideEncoder(
            engine,
            dataset.media,
            GenerationConfig(),
            embedder=SideStates(engine, dataset, sides, kind, config.mode),
            allow_bad=config.skip_bad_inputs,
            flag="--skip-bad-inputs",
            save_every=config.save_every,
            num_workers=config.num_workers,
            progress=progress,
        )
        identity = hashlib.sha256(json.dumps([kind, *settings]).encode()).hexdigest()
        side = EncoderSide(config.input, kind, config.mode, sides.pairs, sides.inputs, "", identity, generates=False)
        done = encoder.encode(side, Parts(work_folder(config) / kind, identity))
        if state.rank == 0:
            found.append(_rows(done.encoded, len(sides.inputs), engine.model_config.hidden_size))
    progress.finish()
    return tuple(found) if found else (None, None)


def _rows(encoded: list[Any], count: int, hidden: int) -> np.ndarray:
    rows = np.full((count, hidden), np.nan, dtype=np.float32)
    for item in encoded:
        rows[item.position] = item.embedding
    return rows


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
