"""The embedded default, mini-MMEB: PNG pictures, short clips and document-like pages in the files real data comes in.

    root/manifest.json                 settings, their hash and counts; written last
    root/train.json                    pairs in UME-R1's SFT format; data sets mini-img, mini-doc, mini-vid, mini-look
    root/rl.json                       other pairs in UME-R1's RL format, without responses
    root/rl_eval.json                  held-out pairs in that format, to watch RL by
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
from umer1.data.mini_rl import board_key, held_out_questions, training_questions
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

MINI_BASE = Path(__file__).parent.parent / "assets" / "mini_base"  # the tiny Qwen2-VL it starts from, by mini_base.py
FORMAT_VERSION = 2  # part of the settings' hash: raise it when the same settings give other files
MANIFEST = "manifest.json"
MAX_RL_EVAL_PAIRS = 192  # 48 a task, of which 12 have the task's 12 held-out answers
MAX_PAIRS = 160_000  # a fourth of them are mini-look's, which has 46,656 mosaics to tell apart
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
    num_rl_pairs: int = 1_536
    "Pairs for RL over the three tasks of arrows (image, video, document), none of them among the training pairs."
    num_rl_eval_pairs: int = 128
    "Held-out pairs to watch RL by, over the four tasks; a quarter of their answers never is one in training."
    num_eval_queries: int = 96
    "Held-out queries per task; a quarter of them has an answer that never is one in training."
    questions_per_board: int = 4
    "Training questions that share one picture."
    max_hops: int = 4
    "Most arrows that a question follows; uniform from 0."
    rl_min_hops: int = 2
    "Fewest arrows that a question for RL follows: what imitation has already learnt has nothing to teach RL."
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
        counts = dict.fromkeys(("num_train_pairs", "num_rl_pairs", "num_rl_eval_pairs", "num_eval_queries"), 4)
        for name, least in (*counts.items(), ("questions_per_board", 1)):
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)} must be at least {least}")
        if self.num_rl_eval_pairs > MAX_RL_EVAL_PAIRS:
            found.append(
                f"num_rl_eval_pairs={self.num_rl_eval_pairs} must be at most {MAX_RL_EVAL_PAIRS}: no two of a task "
                "have the same answer"
            )
        total = self.num_train_pairs + self.num_rl_pairs + self.num_rl_eval_pairs + 4 * self.num_eval_queries
        if total > MAX_PAIRS:
            found.append(
                f"num_train_pairs={self.num_train_pairs} and num_rl_pairs={self.num_rl_pairs} make {total} pairs with "
                f"the held-out ones; at most {MAX_PAIRS} can be told apart"
            )
        if not 0 <= self.max_hops < len(NUMBERS):
            found.append(f"max_hops={self.max_hops} must lie between 0 and {len(NUMBERS) - 1}")
        elif not 0 <= self.rl_min_hops <= self.max_hops:
            found.append(f"rl_min_hops={self.rl_min_hops} must lie between 0 and max_hops={self.max_hops}")
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
        made = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        tell(f"mini-MMEB: {made} in {root}")
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
        self.seen: set[bytes] = set()  # boards of queries, as far as they are written

    def write(self) -> dict[str, int]:
        records = list(self._train_records())
        self._write_list("train.json", records)
        tasks = {f"mini-{task}": self._write_eval_task(task) for task in TASKS}
        meta = {"benchmark": "mini-MMEB", "digest": self.settings.digest(), "data_root": "..", "tasks": tasks}
        write_json(self.root / "eval" / "meta.json", meta)
        rl, rl_eval = list(self._rl_records()), list(self._rl_eval_records())
        self._write_list("rl.json", rl)
        self._write_list("rl_eval.json", rl_eval)
        return {
            "train_pairs": len(records),
            "rl_pairs": len(rl),
            "rl_eval_pairs": len(rl_eval),
            "pictures": self.num_files,
        }

    def _write_list(self, name: str, records: list[str]) -> None:
        write_text(self.root / name, "[\n" + ",\n".join(records) + "\n]\n")

    # -- training pairs ----------------------------------------------------------------------------------------------

    def _train_records(self) -> Iterator[str]:
        """JSON lines, one pair each, task by task."""
        total, done, told = self.settings.num_train_pairs, 0, 0
        for number, task in enumerate(TASKS):
            rng = np.random.default_rng([self.settings.seed, 1, number])
            for question in self._train_questions(task, total // len(TASKS), rng):
                self.seen.add(board_key(question.query.board))
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

    # -- RL pairs ----------------------------------------------------------------------------------------------------

    def _rl_records(self) -> Iterator[str]:
        """JSON lines, one pair each, task by task."""
        settings = self.settings
        hops = (settings.rl_min_hops, settings.max_hops)
        for task in HOP_TASKS:
            rng = np.random.default_rng([settings.seed, 3, TASKS.index(task)])
            count = settings.num_rl_pairs // len(HOP_TASKS)
            for question in training_questions(task, count, settings.questions_per_board, hops, self.seen, rng):
                yield self._rl_record(question, "rl", rng)

    def _rl_eval_records(self) -> Iterator[str]:
        settings = self.settings
        for task in TASKS:
            count = settings.num_rl_eval_pairs // len(TASKS)
            for question, rng in held_out_questions(task, count, settings.max_hops, self.seen, settings.eval_seed):
                yield self._rl_record(question, "rl-eval", rng)

    def _rl_record(self, question: Question, folder: str, rng: np.random.Generator) -> str:
        record = {"dataset": "mini-MMEB", "dataset_name": f"mini-{question.task}"}
        for side, view, part in (("qry", question.query, ""), ("pos", question.target, "-target")):
            media = self._media(view.board, f"{folder}/{question.task}{part}", rng)
            record |= {
                f"{side}_text": view.text,
                f"{side}_image": media.get("image", ""),
                f"{side}_video": media.get("video", [""]),
            }
        return json.dumps(record | {"solution": question.target.summary.strip()}, ensure_ascii=False)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _write_eval_task(self, task: str) -> dict:
        rng = np.random.default_rng([self.settings.eval_seed, 2, TASKS.index(task)])
        questions = [self._eval_question(task, index, rng) for index in range(self.settings.num_eval_queries)]
        if task in HOP_TASKS:
            pool = [hop_target(rng, task, answer) for answer in range(NUM_ANSWERS)]
        else:
            pool = [question.target for question in questions]
        candidates = [self._eval_record(f"{task}-c{i:04d}", view, task, rng) for i, view in enumerate(pool)]
        self.seen.update(board_key(question.query.board) for question in questions)
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
