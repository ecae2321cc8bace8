"""The embedded default, mini-MMEB: PNG pictures, short clips and document-like pages in the files real data comes in.

    root/manifest.json                 settings, their hash and counts; written last
    root/train.json                    pairs in METHOD's SFT format; data sets mini-img, mini-doc, mini-vid, mini-look
    root/images/...                    what the records name (paths relative to root)
    root/eval/meta.json                tasks: metric, files, counts
    root/eval/<task>/queries.jsonl     {"id", "text", "image" | "video", "label", "solution", "groups"}
    root/eval/<task>/candidates.jsonl  {"id", "text", "image" | "video"}: the pool of every query of the task

Evaluation pools hold all answers of a task; 12 of the 96 are never an answer in training (group `answer`: seen,
unseen).
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from umer1.atomic_directory import aside_path, remove
from umer1.data import prompts
from umer1.data.mini_draw import draw, save_png
from umer1.data.mini_tasks import (
    HOP_TASKS,
    NUM_ANSWERS,
    NUMBERS,
    TASKS,
    Board,
    Question,
    Teacher,
    View,
    hop_target,
    is_held_out,
    look_question,
    sample_board,
    sample_question,
)
from umer1.errors import ConfigError, UserError
from umer1.files import write_json, write_text

FORMAT_VERSION = 1  # part of the settings' hash: raise it when the same settings give other files
MANIFEST = "manifest.json"
METRICS = {"img": "hit@1", "doc": "ndcg@5", "vid": "hit@1", "look": "hit@1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniSettings:
    """What the generated files depend on."""

    seed: int = 0
    "Seed of the training pairs."
    eval_seed: int = 0
    "Seed of the held-out queries and candidates, so that runs with other training pairs share one evaluation."
    num_train_pairs: int = 12_288
    "Training pairs over the four tasks; a multiple of 128 leaves no short blocks of 32 pairs."
    num_eval_queries: int = 96
    "Held-out queries per task; a quarter of them has an answer that never is one in training."
    questions_per_board: int = 4
    "Training questions that share one picture."
    max_hops: int = 4
    "Most arrows that a question follows; uniform from 0."
    slip_rate: float = 0.05
    "Share of teacher traces of one hop or more that take a wrong turn."
    miscount_rate: float = 0.6
    """Share of teacher traces of four hops or more that lose count and stop one hop early.  Above one half imitation
    learns the error, and only a reward that sees the right target can unlearn it."""
    terse_rate: float = 0.2
    "Share of teacher traces of two hops or more that state the answer without its steps."
    noise: float = 0.06
    "Standard deviation of colour shifts and of pixel noise, as a share of full scale."

    def violations(self) -> list[str]:
        found = []
        for name, least in (("num_train_pairs", 4), ("num_eval_queries", 4), ("questions_per_board", 1)):
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.max_hops < len(NUMBERS):
            found.append(f"max_hops={self.max_hops} must lie between 0 and {len(NUMBERS) - 1}")
        for name in ("slip_rate", "miscount_rate", "terse_rate", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}={getattr(self, name)} must lie between 0 and 1")
        return found

    def digest(self) -> str:
        text = json.dumps({"format": FORMAT_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_mini_mmeb(root: str | Path, *, progress: Callable[[str], None] | None = None, **settings) -> Path:
    """Generate mini-MMEB under `root`, or reuse what is there with the same settings; returns `root` as a Path.

    settings: fields of MiniSettings.  The directory is filled aside and renamed, so it is complete or absent; one with
    other settings is replaced, anything else of that name is refused.  One process must do this, the others wait.
    Raises ConfigError for settings out of range, UserError for a foreign directory.
    """
    root = Path(root)
    chosen = MiniSettings(**settings)
    if problems := chosen.violations():
        raise ConfigError(problems)
    tell = progress or (lambda message: None)
    if _found_digest(root) == chosen.digest():
        tell(f"mini-MMEB: reusing {root}")
        return root
    if root.exists() and _found_digest(root) is None and any(root.iterdir()):
        raise UserError(f"{root} exists and is not a generated mini-MMEB; remove it or choose another directory")
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_path(root)
    try:
        counts = _Writer(aside, chosen, tell).write()
        write_json(aside / MANIFEST, {"settings": asdict(chosen), "digest": chosen.digest(), "counts": counts})
        if root.exists():
            remove(root)
        os.rename(aside, root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def _found_digest(root: Path) -> str | None:
    try:
        return json.loads((root / MANIFEST).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Writer:
    """Writes one mini-MMEB; keeps count of pictures so that questions about one board share its file."""

    def __init__(self, root: Path, settings: MiniSettings, tell: Callable[[str], None]):
        self.root = root
        self.settings = settings
        self.tell = tell
        self.saved: dict[int, tuple[Board, list[str]]] = {}  # by id; the board is kept so that its id stays taken
        self.in_folder: Counter[str] = Counter()
        self.num_files = 0

    def write(self) -> dict[str, int]:
        records = list(self._train_records())
        write_text(self.root / "train.json", "[\n" + ",\n".join(records) + "\n]\n")
        tasks = {f"mini-{task}": self._write_eval_task(task) for task in TASKS}
        meta = {"benchmark": "mini-MMEB", "digest": self.settings.digest(), "data_root": "..", "tasks": tasks}
        write_json(self.root / "eval" / "meta.json", meta)
        self.tell(f"mini-MMEB: {len(records)} training pairs and {self.num_files} pictures in {self.root.name}")
        return {"train_pairs": len(records), "pictures": self.num_files}

    # -- training pairs ----------------------------------------------------------------------------------------------

    def _train_records(self) -> Iterator[str]:
        """JSON lines, one pair each, task by task."""
        total, done, told = self.settings.num_train_pairs, 0, 0
        for number, task in enumerate(TASKS):
            rng = np.random.default_rng([self.settings.seed, 1, number])
            for question in self._train_questions(task, total // len(TASKS), rng):
                record = {
                    "dataset_name": f"mini-{task}",
                    "qry": self._side(question.query, f"train/{task}", rng),
                    "pos": self._side(question.target, f"train/{task}-target", rng),
                }
                yield json.dumps(record, ensure_ascii=False)
                done += 1
                if 10 * done // total > told:
                    told = 10 * done // total
                    self.tell(f"mini-MMEB: {10 * told}% of {total} training pairs")

    def _train_questions(self, task: str, count: int, rng: np.random.Generator) -> Iterator[Question]:
        settings = self.settings
        if task == "look":
            for _ in range(count):
                yield look_question(rng)
            return
        teacher = Teacher(settings.slip_rate, settings.miscount_rate, settings.terse_rate)
        # One picture per answer: equal targets are then equal files, which masking of equal targets can see.
        targets = [hop_target(rng, task, answer) for answer in range(NUM_ANSWERS)]
        for index in range(count):
            if index % settings.questions_per_board == 0:
                board = sample_board(rng, task)
            question = sample_question(rng, task, board, (0, settings.max_hops), teacher, False)
            yield Question(task, question.query, targets[question.answer], question.answer, question.hops)

    def _side(self, view: View, folder: str, rng: np.random.Generator) -> dict:
        media = self._media(view.board, folder, rng)
        marker = {"image": prompts.IMAGE_MARKER, "video": prompts.VIDEO_MARKER}
        text = "".join(marker[kind] for kind in media) + prompts.user_text(view.text)
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": view.response}]
        return {**media, "conversations": turns}

    def _media(self, board: Board | None, folder: str, rng: np.random.Generator) -> dict:
        """Save a board once; {"image": path}, {"video": [paths]} or {}, relative to the root."""
        if board is None:
            return {}
        if id(board) not in self.saved:
            self.in_folder[folder] += 1
            self.saved[id(board)] = board, self._save(board, f"images/{folder}/{self.in_folder[folder]:05d}", rng)
        paths = self.saved[id(board)][1]
        return {"video": paths} if board.is_video else {"image": paths[0]}

    def _save(self, board: Board, stem: str, rng: np.random.Generator) -> list[str]:
        names = [f"{stem}-{frame}.png" if board.is_video else f"{stem}.png" for frame in range(len(board.frames))]
        (self.root / stem).parent.mkdir(parents=True, exist_ok=True)
        for name, cells in zip(names, board.frames, strict=True):
            save_png(self.root / name, draw(cells, board.columns, rng, self.settings.noise))
        self.num_files += len(names)
        return names

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _write_eval_task(self, task: str) -> dict:
        rng = np.random.default_rng([self.settings.eval_seed, 2, TASKS.index(task)])
        questions = [self._eval_question(task, index, rng) for index in range(self.settings.num_eval_queries)]
        if task in HOP_TASKS:
            pool = [hop_target(rng, task, answer) for answer in range(NUM_ANSWERS)]
        else:
            pool = [question.target for question in questions]
        candidates = [self._eval_record(f"{task}-c{i:04d}", view, task, rng) for i, view in enumerate(pool)]
        queries = []
        for index, question in enumerate(questions):
            record = self._eval_record(f"{task}-q{index:04d}", question.query, task, rng)
            right = question.answer if task in HOP_TASKS else index
            record |= {"label": candidates[right]["id"], "solution": question.target.summary.strip(), "groups": {}}
            if task in HOP_TASKS:
                answer = "unseen" if is_held_out(task, question.answer) else "seen"
                record["groups"] = {"hops": str(question.hops), "answer": answer}
            queries.append(record)
        folder = f"mini-{task}"
        for name, records in (("queries", queries), ("candidates", candidates)):
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_text(self.root / "eval" / folder / f"{name}.jsonl", lines)
        return {
            "metric": METRICS[task],
            "queries": f"{folder}/queries.jsonl",
            "candidates": f"{folder}/candidates.jsonl",
            "num_queries": len(queries),
            "num_candidates": len(candidates),
        }

    def _eval_question(self, task: str, index: int, rng: np.random.Generator) -> Question:
        if task not in HOP_TASKS:
            return look_question(rng)
        unseen = index % 4 == 3
        while not (board := sample_board(rng, task)).has_answer(task, unseen):
            pass
        return sample_question(rng, task, board, (0, self.settings.max_hops), Teacher(), unseen)

    def _eval_record(self, name: str, view: View, task: str, rng: np.random.Generator) -> dict:
        return {"id": name, "text": view.text, **self._media(view.board, f"eval/{task}", rng)}
