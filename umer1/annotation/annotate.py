"""`umer1 annotate`: pairs to SFT data with a teacher's reasoning and summaries, and pairs kept apart for RL.

    umer1 annotate --data-root DATA --output OUT --tokenizer MODEL_DIR \\
        --inputs '[{layout: mmeb, path: DATA/mmeb/ImageNet_1K, split: original, media_folder: mmeb},
                   {layout: llavahound-video, path: DATA/hound.jsonl, dataset: hound, media_folder: frames}]' \\
        --endpoint http://localhost:8000/v1 --teacher-model glm-4.1v-thinking --keep-special-tokens --strip-box-markers

A teacher, for instance:  vllm serve zai-org/GLM-4.1V-9B-Thinking --served-model-name glm-4.1v-thinking \\
                              --limit-mm-per-prompt '{"image": 8, "video": 1}' --max-model-len 32768

or no server at all: --serve-teacher --teacher-model DIR runs vLLM in a process of this command.

Each side of each pair is asked once.  Answers go to OUT/journal.jsonl as they come: killed at any moment, the same
command goes on where it stopped, and what was answered is not asked again.  At the end OUT/dataset holds sft-*.jsonl
(for --data-path), rl.jsonl (--rl-pairs), filtered.jsonl (each pair left out, with its cause) and manifest.json (counts,
settings, hashes); it appears whole.  With --model, the pairs for RL are neither trivial nor hopeless to that model.  A
later run asks again what got no answer, and judges all answers anew by the filters then given, at no cost.
docs/annotate.md tells more.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from umer1 import __version__
from umer1.annotation.answers import AnswerFilter, Fault
from umer1.annotation.ask import Asker, Progress, Question
from umer1.annotation.client import Answer, Refused
from umer1.annotation.config import DATASET_FOLDER, AnnotateCommand
from umer1.annotation.difficulty import Difficulty, RankRule
from umer1.annotation.journal import Journal
from umer1.annotation.media import Library
from umer1.annotation.own_teacher import served_teacher
from umer1.annotation.publish import AskedSide, Counts, publish_dataset
from umer1.annotation.samples import Broken, Sample, side_key
from umer1.annotation.selection import Selection, read_contents
from umer1.annotation.sources import read_samples
from umer1.configuration import help_text, load_config
from umer1.data.images import ImageConfig
from umer1.data.media import MediaRoot
from umer1.data.schema import Side
from umer1.errors import UserError
from umer1.files import make_folder
from umer1.inference.engine import EngineConfig, open_directory

# What shapes an answer: a journal goes on with these alone.
_ANSWER_SETTINGS = (
    *("teacher_model", "teacher_prompt", "teacher_temperature", "teacher_top_p", "max_answer_tokens"),
    *("keep_special_tokens", "max_image_pixels", "max_frame_pixels", "video_as"),
)
JOURNAL_FILE, LOG_FILE = "journal.jsonl", "teacher.log"


def main(argv: list[str]) -> None:
    """The command."""
    if {"-h", "--help"} & set(argv):
        print(help_text(AnnotateCommand, __doc__))
        return
    command = load_config(AnnotateCommand, argv)
    make_folder(command.annotate.output)
    try:
        with Annotation(command) as annotation:
            counts = annotation.run()
    except OSError as error:
        raise UserError(f"{command.annotate.output}: {error}; the answers so far are kept") from None
    except KeyboardInterrupt:
        print("umer1 annotate: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        sys.exit(130)
    for line in counts.lines():
        print(f"umer1 annotate: {line}", file=sys.stderr, flush=True)


def _num_frames(engine: EngineConfig) -> int:
    """Of a video: as asked for, else as the model that ranks the pairs was trained, where one is given."""
    if engine.num_frames is None and engine.model:
        return ImageConfig.of_directory(open_directory(engine), engine).num_frames
    return engine.num_frames or ImageConfig().num_frames


class Annotation:
    """One run: scan, ask, write.  To be used in a `with`, which lets go of the journal."""

    def __init__(self, command: AnnotateCommand):
        self.command, config = command, command.annotate
        self.media = MediaRoot(config.data_root, max_source_pixels=command.teacher.max_source_pixels)
        command.engine.num_frames = frames = _num_frames(command.engine)
        self.library = Library(self.media, num_frames=frames, folder=config.embedded_folder)
        self.judge = AnswerFilter.open(command.filters, config.tokenizer)
        settings = {name: getattr(command.teacher, name) for name in _ANSWER_SETTINGS}
        self.journal = Journal(Path(config.output) / JOURNAL_FILE, settings, forget_refusals=config.ask_refused_again)
        for left in Path(config.output).glob(f".*-{DATASET_FOLDER}-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left)

    def __enter__(self) -> "Annotation":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def run(self) -> Counts:
        """Everything; what there is to say at the end."""
        config, teacher = self.command.annotate, self.command.teacher
        difficulty, drawn = self._difficulty(), config.rl_pairs
        if difficulty is not None:
            drawn *= config.rl_oversampling
        among = read_contents(config.rl_from, config.data_root) if config.rl_from else None
        selection = Selection(
            config.rl_pairs, config.selection_seed, self.media, among=among, difficulty=difficulty, drawn=drawn
        )
        total = selection.scan(self._shown("read"))
        rl = selection.chosen()
        print(f"umer1 annotate: {total:,} pairs, {len(rl):,} of them for RL", file=sys.stderr, flush=True)
        progress = Progress(2 * total, self.journal, teacher)
        apart = {sample.content() for sample in rl} | (among or set())
        faults = self._ask(self._questions(apart, progress), progress)
        progress.finish()

        def answer(sample: Sample, name: str, side: Side) -> Answer | Fault:
            key = self._key(sample, name, side)
            if (fault := faults.get(key)) is not None:
                return fault
            entry = self.journal.read(key)
            if entry is None:
                return Fault("teacher_failed", "nobody was asked: the pair files or their media changed during the run")
            return Fault("refused", entry.detail) if isinstance(entry, Refused) else entry

        def respond(sides: list[AskedSide]) -> list[str | Fault]:
            found = [answer(*side) for side in sides]
            judged = iter(self.judge.responses([each for each in found if isinstance(each, Answer)]))
            return [next(judged) if isinstance(each, Answer) else each for each in found]

        return publish_dataset(
            Path(config.output) / DATASET_FOLDER,
            self._shown("judged"),
            respond,
            rl,
            apart,
            data_root=config.data_root,
            pairs_per_shard=config.pairs_per_shard,
            manifest=self._manifest(progress) | ({"difficulty": difficulty.manifest()} if difficulty else {}),
        )

    def _difficulty(self) -> Difficulty | None:
        """What looks at how hard pairs are, where a model is given."""
        config, engine = self.command.annotate, self.command.engine
        if not engine.model:
            return None
        return Difficulty(engine, RankRule(config.rl_min_rank, config.rl_max_rank_share), self.media)

    def _ask(self, questions: Iterator[Question | None], progress: Progress) -> dict[str, Fault]:
        """What stays without an answer, by key; a teacher of our own is started when there is something to ask."""
        teacher = self.command.teacher
        with ExitStack() as stack:
            first = next(filter(None, questions), None)
            if first is None:
                return {}
            api_key = os.environ[teacher.api_key_env] if teacher.api_key_env else None
            if teacher.serve_teacher:
                teacher, api_key = stack.enter_context(
                    served_teacher(teacher, Path(self.journal.path).parent / LOG_FILE)
                )
            asker = Asker(teacher, api_key, self.media, self.journal)
            return asker.run(chain([first], questions), progress.heard)

    def _samples(self) -> Iterator[Sample | Broken]:
        for sample in read_samples(self.command.annotate.inputs, self.library):
            yield self._checked(sample)

    def _shown(self, done: str) -> Iterator[Sample | Broken]:
        """The samples, with a line now and then: the first pass decodes video files and the last one tokenises all
        answers, which may take hours."""
        last = time.monotonic()
        for count, sample in enumerate(self._samples()):
            if time.monotonic() - last >= self.command.teacher.progress_seconds:
                last = time.monotonic()
                print(f"umer1 annotate: {count:,} pairs {done}", file=sys.stderr, flush=True)
            yield sample

    def _checked(self, sample: Sample | Broken) -> Sample | Broken:
        """Texts that training would refuse cost nothing: nobody is asked about them."""
        if isinstance(sample, Sample):
            for _, side in sample.sides():
                if (token := self.judge.structural(side.text)) is not None:
                    return Broken(sample.id, sample.dataset, "reserved_token", f"the text spells {token}")
        return sample

    def _questions(self, left_out: set[str], progress: Progress) -> Iterator[Question | None]:
        """Sides without an answer, each key once; None for each of the others."""
        seen: set[bytes] = set()
        for sample in self._samples():
            if isinstance(sample, Broken):
                continue
            for name, side in sample.sides():
                key = self._key(sample, name, side)
                if key in self.journal or bytes.fromhex(key) in seen or sample.content() in left_out:
                    progress.known()
                    yield None
                else:
                    seen.add(bytes.fromhex(key))
                    yield Question(key, side)

    def _key(self, sample: Sample, name: str, side: Side) -> str:
        return side_key(side, "" if self.command.annotate.share_identical_sides else f"{sample.id}/{name}")

    def _manifest(self, progress: Progress) -> dict[str, Any]:
        files = [file for item in self.command.annotate.inputs for file in item.files()]
        return {
            "umer1": __version__,
            "settings": asdict(self.command),
            "inputs": [{"path": str(file), "bytes": file.stat().st_size} for file in files],
            "teacher": {
                "answers": len(self.journal),
                "input_tokens": self.journal.input_tokens,
                "output_tokens": self.journal.output_tokens,
                "cost": progress.cost(),
            },
        }
