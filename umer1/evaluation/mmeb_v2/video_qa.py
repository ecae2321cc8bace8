"""Questions about a video with options of their own: each query ranks its options' texts.

Option names and texts differ where the options carry letters: Video-MME and EgoSchema rank the text without its letter
under the name with it; MVBench keeps the letter that the question shows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.fields import name_field, numbered_rows, text_field, texts_field
from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.tables import combine
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec
from umer1.evaluation.mmeb_v2.video_frames import frames_folder, saved_video

PROMPT = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)

# MVBench's subsets in order, and where each one's videos lie below the task's.
MVBENCH = {
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "counterfactual_inference": "clevrer/video_validation",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One row, whatever its columns are called."""

    folder: str  # of the video's frames, below the task's
    video: str  # its file, below the task's videos
    text: str
    options: Sequence[str]  # the candidates' names
    texts: Sequence[str]  # what is embedded of each
    answer: str  # the right one's name


def read_video_questions(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """Candidates are distinct by name: where two questions share one, the first one's text counts."""
    frames, videos = frames_folder(spec, tree), spec.options["videos"]
    columns, read = _LAYOUTS[spec.name]
    rows, fingerprint = _rows(spec, tree, columns)
    queries: list[Query] = []
    candidates: dict[str, Candidate] = {}
    for where, row in rows:
        question = read(row, where)
        for name, text in zip(question.options, question.texts, strict=True):
            candidates.setdefault(name, Candidate(name, Item(text.strip())))
        text, folder = f"{PROMPT} {question.text}", f"{frames}/{question.folder}"
        item = saved_video(tree, text, folder, num_frames, f"{videos}/{question.video}")
        queries.append(Query(item, tuple(question.options), (question.answer,)))
    return TaskData(spec, queries, list(candidates.values()), fingerprint)


def _rows(spec: TaskSpec, tree: MediaTree, columns: Sequence[str]) -> tuple[Iterator[tuple[str, dict[str, Any]]], str]:
    """(rows, fingerprint); MVBench is 20 subsets one after the other, each row with its `subset`."""
    places, split = spec.options["places"], spec.options["split"]
    if spec.name != "MVBench":
        annotation = tree.annotation(places, subset=spec.options["subset"], split=split)
        return numbered_rows(annotation, columns), annotation.fingerprint
    annotations = {name: tree.annotation(places, subset=name, split=split) for name in MVBENCH}
    rows = (
        (f"{where} of {name}", row | {"subset": name})
        for name, annotation in annotations.items()
        for where, row in numbered_rows(annotation, columns)
    )
    return rows, combine(annotation.fingerprint for annotation in annotations.values())


def _mvbench(row: dict[str, Any], where: str) -> Question:
    texts, answer = texts_field(row, "candidates", where), text_field(row, "answer", where)
    options = _lettered(texts)
    # The last option that is the answer; an answer that is none of them gets the sign before A, and is always a miss.
    place = max((place for place, text in enumerate(texts) if text == answer), default=-1)
    video, subset = name_field(row, "video", where), row["subset"]
    text = _with_options(text_field(row, "question", where), options)
    return Question(
        f"{subset}/{video}", f"{MVBENCH[subset]}/{video}", text, options, options, f"({_letter(place)}) {answer}"
    )


def _nextqa(row: dict[str, Any], where: str) -> Question:
    options = [text_field(row, f"a{place}", where) for place in range(5)]
    text = _with_options(text_field(row, "question", where), _lettered(options))
    answer = _chosen(options, row["answer"], "answer", where)
    return _question(name_field(row, "video", where), text, options, options, answer)


def _video_mme(row: dict[str, Any], where: str) -> Question:
    options = texts_field(row, "options", where)
    letters = [_letter(place) for place in range(len(options))]
    if row["answer"] not in letters:
        raise UserError(f"{where}: answer {row['answer']!r} must be one of {', '.join(letters)}")
    text = f"{text_field(row, 'question', where)}\n" + "\n".join(options)
    answer = options[letters.index(row["answer"])]
    return _question(name_field(row, "videoID", where), text, options, _without_letters(options), answer)


def _egoschema(row: dict[str, Any], where: str) -> Question:
    options = texts_field(row, "option", where)
    text = text_field(row, "question", where) + " ".join(options)
    answer = _chosen(options, row["answer"], "answer", where)
    return _question(name_field(row, "video_idx", where), text, options, _without_letters(options), answer)


def _activitynetqa(row: dict[str, Any], where: str) -> Question:
    options = ["yes", "no"]
    if row["answer"] not in options:
        raise UserError(f"{where}: answer {row['answer']!r} must be yes or no")
    text = f"{text_field(row, 'question', where)}? (A) yes; (B) no."
    return _question(f"v_{name_field(row, 'video_name', where)}", text, options, options, row["answer"])


_LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], str], Question]]] = {
    "MVBench": (("video", "question", "candidates", "answer"), _mvbench),
    "NExTQA": (("video", "question", "answer", "a0", "a1", "a2", "a3", "a4"), _nextqa),
    "Video-MME": (("videoID", "question", "options", "answer"), _video_mme),
    "EgoSchema": (("video_idx", "question", "option", "answer"), _egoschema),
    "ActivityNetQA": (("video_name", "question", "answer"), _activitynetqa),
}


def _question(video: str, text: str, options: Sequence[str], texts: Sequence[str], answer: str) -> Question:
    return Question(video, f"{video}.mp4", text, options, texts, answer)


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _lettered(texts: Sequence[str]) -> list[str]:
    return [f"({_letter(place)}) {text}" for place, text in enumerate(texts)]


def _with_options(question: str, options: Sequence[str]) -> str:
    return "\n".join((question, "Options:", *options))


def _without_letters(options: Sequence[str]) -> list[str]:
    """ "A. Yes." -> "Yes": what follows the first full stop and blank, without either at its ends."""
    return [option[option.find(". ") :].strip(". ") for option in options]


def _chosen(options: Sequence[str], place: Any, column: str, where: str) -> str:
    """The option that a number, or a number's text, points at."""
    # int() takes no text of thousands of digits
    number = int(place) if isinstance(place, str) and place.isdecimal() and len(place) < 10 else place
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(options):
        raise UserError(f"{where}: {column} {place!r:.80} must be a whole number from 0 to {len(options) - 1}")
    return options[number]
