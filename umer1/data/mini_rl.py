"""mini-MMEB's pairs for RL, in UME-R1's RL format: questions on boards that neither SFT nor the evaluation shows.

Drawn from streams of their own, so that asking for other RL pairs changes nothing else.  The held-out pairs have one
stream each: that a board has to be drawn again for one of them (the SFT pairs have it already) changes no other.
"""

from collections.abc import Iterator

import numpy as np

from umer1.data.mini_tasks import (
    HOP_TASKS,
    NUM_ANSWERS,
    TASKS,
    Board,
    Question,
    Teacher,
    hop_target,
    look_question,
    sample_board,
    sample_question,
)

_NO_ERRORS = Teacher()  # responses are not written out: the teacher has nothing to do


def board_key(board: Board) -> bytes:
    """Equal for boards that show the same, whatever their noise."""
    return b"".join(frame.astype(np.int16).tobytes() for frame in board.frames) + bytes([board.columns])


def training_questions(
    task: str, count: int, questions_per_board: int, hops: tuple[int, int], seen: set[bytes], rng: np.random.Generator
) -> Iterator[Question]:
    """Questions with answers that are not held out; equal answers share their target's picture.

    hops: fewest and most.  seen: keys of boards not to be used; those that are used are added.
    """
    targets = [hop_target(rng, task, answer) for answer in range(NUM_ANSWERS)]
    for index in range(count):
        if index % questions_per_board == 0:
            while board_key(board := sample_board(rng, task)) in seen:
                pass
            seen.add(board_key(board))
        question = sample_question(rng, task, board, hops, _NO_ERRORS, False)
        yield Question(task, question.query, targets[question.answer], question.answer, question.hops)


def held_out_questions(
    task: str, count: int, max_hops: int, seen: set[bytes], eval_seed: int
) -> Iterator[tuple[Question, np.random.Generator]]:
    """Questions, a quarter of them with held-out answers, no answer twice in a task; each with its stream."""
    answers: set[int] = set()
    for index in range(count):
        rng = np.random.default_rng([eval_seed, 4, TASKS.index(task), index])
        if task not in HOP_TASKS:
            yield _new_look(seen, rng), rng
            continue
        unseen = index % 4 == 3
        while True:
            board = sample_board(rng, task)
            if board_key(board) in seen or not board.has_answer(task, unseen):
                continue
            question = sample_question(rng, task, board, (0, max_hops), _NO_ERRORS, unseen)
            if question.answer not in answers:
                break
        seen.add(board_key(board))
        answers.add(question.answer)
        yield question, rng


def _new_look(seen: set[bytes], rng: np.random.Generator) -> Question:
    while board_key((question := look_question(rng)).query.board) in seen:
        pass
    seen.add(board_key(question.query.board))
    return question
