"""The puzzles of mini-MMEB and their noisy teacher: what is on each picture, what is asked, and how a trace is written.

`img`, `doc`, `vid`: a board of cells.  Each cell shows its own key (a colour; a letter on document pages), the key of
the next cell and a digit; the pointers form one ring.  "Arrows to follow: three. Start at red": the target is the small
card, page or caption that shows the last cell's key and digit.  A few-layer model can follow zero or one pointers in
one pass; written step by step every hop is one look-up.

`look`: find the same colour mosaic when some of its cells are blanked out.  A summary in words loses what is needed
here, so that the two modes fail on different queries.
"""

from dataclasses import dataclass

import numpy as np

from umer1.data.mini_draw import BLANK_TILE, COLOURS, DIGIT_TILE, DIGITS, LETTER_TILE, LETTERS

HOP_TASKS = ("img", "doc", "vid")
TASKS = (*HOP_TASKS, "look")
NUM_KEYS = len(COLOURS)
NUM_ANSWERS = NUM_KEYS * len(DIGITS)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")

QUERY_OPENING = {
    "img": "Arrows to follow in this picture:",
    "doc": "References to follow on this page:",
    "vid": "Arrows to follow in this clip:",
}
QUERY_MIDDLE = {"img": ". Start at", "doc": ". Start at section", "vid": ". Start at"}
TARGET_TEXT = {"img": "This card.", "doc": "This index page.", "vid": "A clip that ends at"}
LOOK_QUERY = "Find the same mosaic."
LOOK_TARGET = "This mosaic."
SHOWS = " shows"
GUESS = " guess"
LEFT = " left,"

MISCOUNT_FROM = 4  # hops; shorter chains are counted right

_CELLS = {"img": 9, "doc": 8, "vid": 8}
_COLUMNS = {"img": 3, "doc": 2, "vid": 2}
_CELLS_PER_FRAME = {"img": 9, "doc": 8, "vid": 4}
_LOOK_CELLS = 6
_LOOK_COLOURS = 6
_LOOK_BLANKS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Board:
    """What is drawn: one frame (a picture) or several (a video) of tile numbers [cells, 4]."""

    frames: tuple[np.ndarray, ...]
    columns: int
    keys: tuple[int, ...] = ()  # per cell, hop tasks only
    following: tuple[int, ...] = ()  # index of the cell each cell points to
    digits: tuple[int, ...] = ()

    @property
    def is_video(self) -> bool:
        return len(self.frames) > 1

    def answer(self, cell: int) -> int:
        """key * 8 + digit of a cell of a hop task."""
        return self.keys[cell] * len(DIGITS) + self.digits[cell]

    def has_answer(self, task: str, held_out: bool) -> bool:
        """Whether some cell's answer is (or is not) held out of training."""
        return any(is_held_out(task, self.answer(cell)) == held_out for cell in range(len(self.keys)))


@dataclass(frozen=True, slots=True)
class View:
    """One side of a pair: what is seen, what is asked, what the teacher answers."""

    board: Board | None
    text: str
    think: str
    summary: str

    @property
    def response(self) -> str:
        return f"<think>{self.think}</think><answer>{self.summary}<gen_emb>"


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    query: View
    target: View
    answer: int  # key * 8 + digit for hop tasks; -1 for look
    hops: int  # -1 for look


@dataclass(frozen=True, slots=True)
class Teacher:
    """How the rule-based teacher errs, as shares of the traces in which it could.

    slip: one hop or more, takes one wrong turn.  miscount: four hops or more, loses count and stops one hop early.
    terse: two hops or more, states the right answer and no steps.
    """

    slip_rate: float = 0.0
    miscount_rate: float = 0.0
    terse_rate: float = 0.0


def key_word(task: str, key: int) -> str:
    """The word for a key, with its leading space."""
    return " " + (LETTERS[key] if task == "doc" else tuple(COLOURS)[key])


def digit_word(digit: int) -> str:
    return " " + DIGITS[digit]


def is_held_out(task: str, answer: int) -> bool:
    """One digit of every key never is an answer in training: 12 of the 96 answers of each hop task."""
    key, digit = divmod(answer, len(DIGITS))
    return (5 * key + 3 + 2 * HOP_TASKS.index(task)) % len(DIGITS) == digit


def sample_board(rng: np.random.Generator, task: str) -> Board:
    """A board of a hop task; the pointers form one ring through all cells."""
    count = _CELLS[task]
    keys = rng.permutation(NUM_KEYS)[:count]
    ring = rng.permutation(count)
    following = np.empty(count, int)
    following[ring] = np.roll(ring, -1)
    digits = rng.integers(0, len(DIGITS), count)
    offset = LETTER_TILE if task == "doc" else 0
    own, pointer, digit = keys + offset, keys[following] + offset, digits + DIGIT_TILE
    fourth = np.full(count, BLANK_TILE) if task == "doc" else own
    cells = np.stack([own, pointer, fourth, digit], axis=1)
    per_frame = _CELLS_PER_FRAME[task]
    steps = [cells[start : start + per_frame] for start in range(0, count, per_frame)]
    # The model sees two frames at a time (temporal patch 2): every step of a clip lasts two frames.
    frames = [step for step in steps for _ in range(2)] if task == "vid" else steps
    return Board(
        tuple(frames), _COLUMNS[task], tuple(map(int, keys)), tuple(map(int, following)), tuple(map(int, digits))
    )


def sample_question(
    rng: np.random.Generator, task: str, board: Board, hops: tuple[int, int], teacher: Teacher, held_out: bool | None
) -> Question:
    """A question about `board` with hops[0] <= hops <= hops[1].

    held_out: True or False: only answers that are or are not held out, of which the board must have one; None: any.
    """
    wanted = int(rng.integers(hops[0], hops[1] + 1))
    chains = [_walk(board, start, wanted) for start in rng.permutation(len(board.keys))]
    fitting = [chain for chain in chains if held_out in (None, is_held_out(task, board.answer(chain[-1])))]
    assert fitting, "the board has no such answer"
    chain = fitting[0]
    slips, miscounts, is_terse = rng.random(3) < (teacher.slip_rate, teacher.miscount_rate, teacher.terse_rate)
    terse = wanted >= 2 and is_terse
    written = chain
    if not terse and wanted >= MISCOUNT_FROM and miscounts:
        written = written[:-1]
    if not terse and wanted >= 1 and slips:
        written = _slip(rng, board, written)
    if held_out is False and is_held_out(task, board.answer(written[-1])):
        written = chain  # nor may a wrong trace name an answer that is held out
    text = f"{QUERY_OPENING[task]} {NUMBERS[wanted]}{QUERY_MIDDLE[task]}{key_word(task, board.keys[chain[0]])}"
    query = View(
        board, text, GUESS if terse else _trace(task, board, written, wanted), _shown(task, board.answer(written[-1]))
    )
    answer = board.answer(chain[-1])
    return Question(task, query, hop_target(rng, task, answer), answer, wanted)


def _walk(board: Board, start: int, hops: int) -> list[int]:
    chain = [int(start)]
    for _ in range(hops):
        chain.append(board.following[chain[-1]])
    return chain


def _slip(rng: np.random.Generator, board: Board, chain: list[int]) -> list[int]:
    """Take one wrong turn, then go on correctly from there."""
    at = int(rng.integers(1, len(chain)))
    others = [cell for cell in range(len(board.keys)) if cell not in (chain[at], chain[at - 1])]
    wrong = int(others[rng.integers(len(others))])
    return chain[:at] + _walk(board, wrong, len(chain) - 1 - at)


def _shown(task: str, answer: int) -> str:
    key, digit = divmod(answer, len(DIGITS))
    return key_word(task, key) + digit_word(digit)


def _trace(task: str, board: Board, chain: list[int], hops: int) -> str:
    """One `from to left` step per hop: the order in which the base's captions list a cell.

    The count of hops left falls by one a step; the last step of a chain says zero even when it stops early.
    """
    words = [key_word(task, board.keys[cell]) for cell in chain]
    if len(chain) == 1:
        return f"{words[0]} {NUMBERS[0]}{LEFT}"
    last = len(chain) - 1
    left = [hops - i if i < last else 0 for i in range(1, last + 1)]
    return "".join(f"{words[i]}{words[i + 1]} {NUMBERS[n]}{LEFT}" for i, n in enumerate(left))


def hop_target(rng: np.random.Generator, task: str, answer: int) -> View:
    """The card (img), index page (doc) or caption (vid) that shows an answer."""
    shown = _shown(task, answer)
    if task == "vid":
        return View(None, TARGET_TEXT[task] + shown, SHOWS + shown, shown)
    return View(card(rng, task, answer), TARGET_TEXT[task], SHOWS + shown, shown)


def card(rng: np.random.Generator, task: str, answer: int) -> Board:
    """Two by two cells; one of them shows the answer, the others are blank."""
    key, digit = divmod(answer, len(DIGITS))
    own = key + (LETTER_TILE if task == "doc" else 0)
    cells = np.full((4, 4), BLANK_TILE)
    cells[rng.integers(4)] = (own, own, BLANK_TILE if task == "doc" else own, digit + DIGIT_TILE)
    return Board((cells,), 2)


def sample_mosaic(rng: np.random.Generator) -> Board:
    return Board((np.repeat(rng.integers(0, _LOOK_COLOURS, (_LOOK_CELLS, 1)), 4, axis=1),), 3)


def look_question(rng: np.random.Generator) -> Question:
    """A mosaic and the same mosaic with cells blanked; each side's teacher names the two commonest colours it sees."""
    board = sample_mosaic(rng)
    blanked = board.frames[0].copy()
    blanked[rng.permutation(_LOOK_CELLS)[:_LOOK_BLANKS]] = BLANK_TILE
    target = Board((blanked,), 3)
    sides = []
    for text, seen in ((LOOK_QUERY, board), (LOOK_TARGET, target)):
        colours = seen.frames[0][:, 0]
        counts = np.bincount(colours[colours != BLANK_TILE], minlength=_LOOK_COLOURS)
        first, second = np.argsort(-counts, kind="stable")[:2]
        common = key_word("look", int(first)) + key_word("look", int(second))
        sides.append(View(seen, text, SHOWS + common, common))
    return Question("look", sides[0], sides[1], -1, -1)
