"""The parts of annotation alone: parsing, filters, journal, selection, frames."""

import errno
import json
import os
import random
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_tools import tiny_directory, write_picture, write_records
from teacher_server import FAILURES, Teacher, good_text
from tokenizers import Tokenizer

from umer1.annotation.answers import AnswerFilter, Fault, repeated_share
from umer1.annotation.ask import Asker, Question
from umer1.annotation.client import Answer, Client, Failed, Refused, Stopped, seconds_of
from umer1.annotation.config import AnnotateConfig, FilterConfig, InputFile
from umer1.annotation.journal import Journal
from umer1.annotation.media import Library
from umer1.annotation.request import request_body
from umer1.annotation.samples import Broken, Sample, side_key
from umer1.annotation.selection import Selection, balanced_quotas
from umer1.annotation.sources import read_samples
from umer1.annotation.teacher_config import TeacherConfig
from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot
from umer1.data.schema import Side
from umer1.errors import UserError


def answer(content: str, reasoning: str | None = None, reason: str = "stop") -> Answer:
    return Answer(content, reasoning, reason, 1, 1)


# what the teacher wrote -> reasoning and summary, or the cause
FORMS = {
    "whole": (answer("<think>a b</think><answer>c</answer>"), ("a b", "c")),
    "no answer tags": (answer("<think>a</think>\n\nc d\n"), ("a", "c d")),
    "answer left open": (answer("<think>a</think><answer>c"), ("a", "c")),
    "reasoning apart": (answer("<answer>c</answer>", "a"), ("a", "c")),
    "thought opened by the chat template": (answer("a b\n</think>\n\nc"), ("a b", "c")),
    "reasoning apart, and none": (answer("<think>a</think>c", ""), ("a", "c")),
    "boxed": (answer("<think>a</think><answer><|begin_of_box|>c<|end_of_box|></answer>"), ("a", "c")),
    "no thought": (answer("c"), "format"),
    "thought left open": (answer("<think>a"), "format"),
    "words before": (answer("Well. <think>a</think>c"), "format"),
    "empty thought": (answer("<think> </think>c"), "format"),
    "empty summary": (answer("<think>a</think><answer></answer>"), "format"),
    "two thoughts": (answer("<think>a</think><think>b</think>c"), "format"),
    "two answers": (answer("<think>a</think><answer>b</answer><answer>c</answer>"), "format"),
    "answer not opened": (answer("<think>a</think>b</answer>"), "format"),
    "embedding token": (answer("<think>a</think>b<gen_emb>"), "format"),
    "marker": (answer("<think>a <image></think>b"), "format"),
    "turn": (answer("<think>a<|im_end|></think>b"), "reserved_token"),
    "half a surrogate pair": (answer("<think>a\ud83d</think>b"), "format"),
    "cut off": (answer("<think>a</think>b", reason="length"), "cut_off"),
    "stopped in a loop": (answer("<think>a a a", reason="repetition"), "repetition"),
    "a wide gap": (answer(f"<think>a</think><answer>b{' ' * 200_000}c</answer>"), "over_length"),
    "loop": (answer(f"<think>{'round and round ' * 50}</think>b"), "repetition"),
    "long": (answer(f"<think>a</think>{' '.join(map(str, range(600)))}"), "over_length"),
}


@pytest.mark.parametrize("name", FORMS)
def test_answer(name):
    given, expected = FORMS[name]
    (got,) = AnswerFilter.open(FilterConfig(strip_box_markers=True), tiny_directory()).responses([given])
    if isinstance(expected, str):
        assert isinstance(got, Fault) and got.cause == expected
    else:
        assert got == f"<think>{expected[0]}</think><answer>{expected[1]}<gen_emb>"


def test_answers_that_are_judged_together_are_judged_as_each_alone():
    """A tokenizer that fills a batch up to its longest text must not make the others as long."""
    tokenizer = Tokenizer.from_file(str(tiny_directory() / "tokenizer.json"))
    tokenizer.enable_padding()
    judge, given = AnswerFilter(FilterConfig(), tokenizer), [given for given, _ in FORMS.values()]
    alone = [found for one in given for found in judge.responses([one])]
    assert len({type(found) for found in alone}) == 2  # turns and faults
    assert judge.responses(given) == alone and judge.responses([]) == []


def test_boxes_stay_unless_asked():
    judge = AnswerFilter.open(FilterConfig(), tiny_directory())
    (turn,) = judge.responses([answer("<think>a</think><|begin_of_box|>c<|end_of_box|>")])
    assert "<|begin_of_box|>c" in turn


def test_repeated_share_counts_ngrams():
    seed = time.time_ns()
    draw = random.Random(seed)
    for _ in range(50):
        ids = [draw.randrange(4) for _ in range(draw.randrange(0, 120))]
        n = draw.randrange(1, 6)
        seen, repeats, total = set(), 0, 0
        for start in range(len(ids) - n + 1):
            gram = tuple(ids[start : start + n])
            repeats, total = repeats + (gram in seen), total + 1
            seen.add(gram)
        assert repeated_share(ids, n) == pytest.approx(repeats / total if total >= 32 else 0.0), seed


def test_journal_survives_any_cut(tmp_path):
    """Cut anywhere in the last line: the lines before it stay, and what is appended then is whole."""
    path, settings = tmp_path / "journal.jsonl", {"teacher_model": "toy"}
    keys = [side_key(Side(str(i))) for i in range(4)]
    journal = Journal(path, settings)
    journal.append([(keys[0], answer("a\n\ud83d")), (keys[1], Refused("no"))])
    journal.append([(keys[2], answer("c"))])
    journal.close()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(path, settings)
        assert keys[2] not in journal and len(journal) == 2 and journal.output_tokens == 1
        journal.append([(keys[3], answer("d"))])
        assert journal.read(keys[0]) == answer("a\n\ud83d") and journal.read(keys[1]) == Refused("no")
        assert journal.read(keys[3]) == answer("d")
        journal.close()
        path.write_bytes(whole)


def test_a_teacher_whose_directory_is_no_unicode(tmp_path):
    name = "caf\udce9"
    for _ in range(2):
        Journal(tmp_path / "journal.jsonl", {"teacher_model": name}).close()
    config = TeacherConfig(endpoint="http://127.0.0.1/v1", teacher_model=name)
    assert json.loads(request_body(Side("a side"), config, MediaRoot(tmp_path)))["model"] == name


def test_journal_refuses_damage_and_a_second_writer(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {})
    with pytest.raises(UserError, match="in use by another run"):
        Journal(path, {})
    journal.append([(side_key(Side("a")), answer("a"))] * 2)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(UserError, match="damaged in line 2"):
        Journal(path, {})


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    Journal(tmp_path / "journal.jsonl", {}).close()


def test_a_full_disk_leaves_no_half_line_behind(tmp_path, monkeypatch):
    """Half of a line was written when the disk was full; what is appended after that, as a run's last act, is whole."""
    path, keys = tmp_path / "journal.jsonl", [side_key(Side(str(i))) for i in range(3)]
    journal, write = Journal(path, {}), os.write
    journal.append([(keys[0], answer("a"))])

    def full(fd: int, content: bytes) -> int:
        if len(content) < 40:
            raise OSError(28, "No space left on device")
        return write(fd, content[: len(content) // 2])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("os.write", full)
        journal.append([(keys[1], answer("b"))])
    journal.append([(keys[2], answer("c"))])
    assert journal.read(keys[2]) == answer("c")
    journal.close()
    again = Journal(path, {})
    assert [key in again for key in keys] == [True, False, True] and again.read(keys[2]) == answer("c")
    again.close()


@pytest.mark.parametrize(
    ("there", "count", "expected"),
    [
        ((9, 9, 9), 6, (2, 2, 2)),
        ((9, 1, 9), 7, (3, 1, 3)),
        ((9, 0, 0), 4, (4, 0, 0)),
        ((1, 1, 1), 9, (1, 1, 1)),
        ((9, 9, 9), 4, (2, 1, 1)),
        ((9, 9, 9), 0, (0, 0, 0)),
    ],
)
def test_quotas(there, count, expected):
    assert tuple(balanced_quotas(dict(zip("ivd", there, strict=True)), count).values()) == expected


def test_a_pair_that_inputs_of_two_modalities_have_is_chosen_once(tmp_path):
    """Twice in the RL file it would be its own negative in a comparison."""
    modalities = ("image", "document")
    pairs = [
        Sample(f"{m}:{i}", "toy", m, Side(f"query {i}"), Side(f"answer {i}")) for m in modalities for i in range(4)
    ]
    selection = Selection(6, 0, MediaRoot(tmp_path))
    assert selection.scan(pairs) == 8
    assert sorted(sample.id for sample in selection.chosen()) == [f"image:{i}" for i in range(4)]


ROWS = {
    "mmeb": {"qry": "<|image_1|>\nRepresent it.", "qry_image_path": "i.png", "pos_text": ["t"], "pos_image_path": None},
    "llavahound-caption": {"video": "v", "conversations": [{"value": "<video>\nwhat?"}, {"value": "rain"}]},
    "llavahound-video": {"video": "v", "conversations": [{"value": "<video>\nwhat?"}, {"value": "rain"}]},
    "vidore": {"query": "how much?", "image": {"bytes": None, "path": "i.png"}, "answer": "much"},
    "vidore-page": {"query": "how much?", "image": "", "image_filename": "i.png"},
    "visrag": {"query": "how much?", "image": "i.png", "source": "x"},
}
VIDEO = (("m/v/0.png", "m/v/1.png"),)
SAMPLES = {
    "mmeb": (Side("Represent it.", ("m/i.png",)), Side("t")),
    "llavahound-caption": (Side("what?", videos=VIDEO), Side("rain")),
    "llavahound-video": (Side("Q\nrain"), Side("T", videos=VIDEO)),
    "vidore": (Side("how much?", ("m/i.png",)), Side("much")),
    "vidore-page": (Side("Q\nhow much?"), Side("T", ("m/i.png",))),
    "visrag": (Side("Q\nhow much?"), Side("T", ("m/i.png",))),
}


@pytest.mark.parametrize("layout", ROWS)
def test_layouts(tmp_path, layout):
    for number in range(2):
        write_picture(tmp_path, f"m/v/{number}.png", 28, 28)
    path = write_records(tmp_path / "rows.json", [ROWS[layout], {"other": "columns"}])
    words = {"query_text": "Q", "target_text": "T"} if "Q" in SAMPLES[layout][0].text else {}
    inputs = [InputFile(layout=layout, path=str(path), media_folder="m", **words)]
    library = Library(MediaRoot(tmp_path), num_frames=8, folder="embedded")
    sample, broken = read_samples(inputs, library)
    assert (sample.query, sample.positive) == SAMPLES[layout] and sample.dataset == "rows" and sample.id == "0:0"
    assert isinstance(broken, Broken) and broken.cause == "bad_record"


def test_words_of_ones_own_are_text(tmp_path):
    """A marker in `query_text` would announce a picture that is not there; half a surrogate pair could not be sent."""
    path = write_records(tmp_path / "rows.jsonl", [{"qry": "what", "pos_text": "t"}], lines=True)
    inputs = [InputFile(layout="mmeb", path=str(path), query_text=text) for text in ("<image>\nLook:", "\ud83d")]
    library = Library(MediaRoot(tmp_path), num_frames=8, folder="embedded")
    sample, broken = read_samples(inputs, library)
    assert sample.query == Side("Look:\nwhat")
    assert isinstance(broken, Broken) and broken.cause == "bad_record"


def test_frames_are_spread_in_natural_order(tmp_path):
    for number in (*range(9, 13), 100):
        write_picture(tmp_path, f"v/f{number}.png", 28, 28)
    library = Library(MediaRoot(tmp_path), num_frames=3, folder="embedded")
    assert library.frames("v", "") == ("v/f9.png", "v/f11.png", "v/f100.png")
    # the same places as in a video file and in evaluation: rounded down
    places = [int(name[3:-4]) for name in Library(MediaRoot(tmp_path), num_frames=4, folder="e").frames("v", "")]
    assert places == [9, 10, 11, 100]
    write_picture(tmp_path, "u/1²3.png", 28, 28)  # a letter that counts as a digit, and is no number
    assert library.frames("u", "") == ("u/1²3.png",)
    for name in ("w", "v/f9.png", "\ud83d"):
        with pytest.raises(BadSample, match="missing_file"):
            library.frames(name, "")


def test_frames_of_a_video_file_are_written_once(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    (tmp_path / "clips").mkdir()
    with av.open(str(tmp_path / "clips" / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 220, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    media = MediaRoot(tmp_path)
    library = Library(media, num_frames=3, folder="embedded")
    found = library.frames("a.mp4", "clips")
    assert [Path(path).name for path in found] == ["0.jpg", "1.jpg", "2.jpg"]
    pictures = [np.asarray(media.open_image(path)) for path in found]
    assert [picture.shape for picture in pictures] == [(48, 64, 3)] * 3
    np.testing.assert_allclose([picture.mean() for picture in pictures], [0, 100, 200], atol=6)
    # a second pass decodes nothing; another number of frames is another folder
    monkeypatch.setattr("umer1.annotation.media.sample_frames", lambda *_: pytest.fail("decoded again"))
    assert Library(media, num_frames=3, folder="embedded").frames("a.mp4", "clips") == found
    monkeypatch.undo()
    folder = tmp_path / Path(found[0]).parent
    shutil.rmtree(folder)
    old, new = (folder.with_name(f".tmp-{folder.name}-{word}") for word in ("old", "new"))  # of killed runs
    for left in (old, new):
        left.mkdir()
    os.utime(old, (1, 1))
    assert library.frames("a.mp4", "clips") == found
    assert not old.exists() and new.exists(), "a run that is at work keeps its own"
    new.rmdir()
    other = Library(media, num_frames=2, folder="embedded").frames("a.mp4", "clips")
    assert len(other) == 2 and not set(other) & set(found)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no video")
    for name, cause in {"bad.mp4": "corrupt_video", "none.mp4": "missing_file", "../../a.mp4": "path_escape"}.items():
        with pytest.raises(BadSample) as caught:
            library.frames(name, "clips")
        assert caught.value.cause == cause


def test_a_refusal_before_the_whole_request_was_read():
    """A proxy answers 413 by the header alone and closes: the side is refused at once, not asked again and again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")

        threading.Thread(target=refuse, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        config = TeacherConfig(endpoint=address, teacher_model="toy", max_attempts=1)
        assert Client(config, None, threading.Event()).ask(b"x" * 10**7) == Refused("status 413: big")


def test_interim_replies_are_passed_over_and_impossible_counts_are_none():
    """A proxy's 102 or 103 was taken for a refusal, and the answer behind it for that to the next question."""
    choice = {"message": {"content": "the first"}, "finish_reason": "stop"}
    reply = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10**400, "completion_tokens": 3}}).encode()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def be_slow() -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n")
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(reply), reply))

        threading.Thread(target=be_slow, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        config = TeacherConfig(endpoint=address, teacher_model="toy", max_attempts=1)
        assert Client(config, None, threading.Event()).ask(b"{}") == Answer("the first", None, "stop", 0, 3)


@pytest.mark.parametrize("fate", [fate for fate in FAILURES if fate not in ("503", "429", "500")])
def test_every_attempt_reaches_the_teacher(fate):
    """What is left of a reply that was no answer does not cost the next attempt."""
    body = json.dumps({"messages": [{"content": [{"text": good_text("a side")}]}]}).encode()
    with Teacher() as teacher:
        teacher.script = [fate]
        config = TeacherConfig(endpoint=teacher.url, teacher_model="toy", max_attempts=2, backoff_seconds=0.01)
        assert isinstance(Client(config, None, threading.Event()).ask(body), Answer)
        teacher.script = [fate] * 2
        failed = Client(config, None, threading.Event()).ask(body)
    assert isinstance(failed, Failed) and (fate != "error body" or "the provider is overloaded" in failed.detail)


def test_a_connection_that_the_server_closed_while_it_was_idle(monkeypatch):
    """vLLM does so after 5 s, less than most waits: every second attempt went to nobody."""
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def be_busy() -> None:
            for _ in range(3):
                with server.accept()[0] as connection:
                    asked.append(connection.recv(1000))
                    connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=be_busy, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        config = TeacherConfig(endpoint=address, teacher_model="toy", max_attempts=3, backoff_seconds=0.2)
        outcome = Client(config, None, threading.Event()).ask(b"{}")
    assert isinstance(outcome, Failed) and outcome.detail.startswith("status 503") and len(asked) == 3


def test_answers_are_kept_while_the_reader_looks_for_the_next_question(tmp_path):
    """A resumed run passes over a million answered sides between two questions: what comes meanwhile is durable."""
    side, kept = Side(good_text("a side")), []
    journal = Journal(tmp_path / "journal.jsonl", {})

    def questions():
        yield Question(side_key(side), side)
        deadline = time.monotonic() + 20
        while side_key(side) not in journal and time.monotonic() < deadline:
            time.sleep(0.01)
            yield None
        kept.append(side_key(side) in journal)

    with Teacher() as teacher:
        config = TeacherConfig(endpoint=teacher.url, teacher_model="toy", concurrency=2)
        assert Asker(config, None, MediaRoot(tmp_path), journal).run(questions(), lambda outcome: None) == {}
    assert kept == [True] and isinstance(journal.read(side_key(side)), Answer)
    journal.close()


def test_waits_have_a_bound_however_many_attempts():
    config = TeacherConfig(endpoint="http://127.0.0.1/v1", teacher_model="toy", max_backoff_seconds=0.5)
    client = Client(config, None, threading.Event())
    assert all(0 <= client._delay(attempt, None) <= 0.5 for attempt in (0, 10, 2000))


def test_a_long_wait_is_said_once_for_all_that_wait(capsys):
    """Every thread of a run may wait an hour as the server asked: nothing said why nothing came."""
    stop = threading.Event()
    stop.set()  # nobody waits here
    client = Client(TeacherConfig(endpoint="http://127.0.0.1/v1", teacher_model="toy"), None, stop)
    for seconds in (20.0, 600.0, 601.0, 10.0, 900.0):
        with pytest.raises(Stopped):
            client._wait(seconds, "status 429: slow")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"umer1 annotate: status 429: slow; the next attempt is in {n} s" for n in (600, 900)]


def test_retry_after_forms():
    assert seconds_of("7") == 7.0 and seconds_of(None) is None and seconds_of("soon") is None
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    # letters that count as digits, and a year that no clock has
    assert seconds_of("\u00b2") is seconds_of("\u0667") is None
    assert seconds_of("Mon, 01 Jan 0001 00:00:00 -0000") in (None, 0.0)


def test_a_folder_of_several_splits_is_not_read_as_one(tmp_path):
    """MMEB-train has the same pairs three times: each would be asked about, and stand in the files, that often."""
    for split in ("original", "diverse_instruction", "train"):
        for shard in range(2):
            (tmp_path / f"{split}-0000{shard}-of-00002.jsonl").write_text("{}")
    named = {"layout": "mmeb", "path": str(tmp_path)}
    (problem,) = AnnotateConfig(
        inputs=[InputFile(**named)], data_root="/", output="x", tokenizer=str(tiny_directory())
    ).violations()
    assert "the splits diverse_instruction, original, train" in problem and "choose one by split" in problem
    files = InputFile(**named, split="original").files()
    assert [file.name for file in files] == ["original-00000-of-00002.jsonl", "original-00001-of-00002.jsonl"]
    assert InputFile(**named, split="orig").files() == []
    (tmp_path / "more.jsonl").write_text("{}")
    (tmp_path / "._more.jsonl").write_bytes(b"\0")
    assert len(InputFile(**named).files()) == 7


def test_one_file_has_one_spelling(tmp_path):
    """Pairs are told apart by their paths: a second spelling let a pair of the RL file into the SFT files."""
    library = Library(MediaRoot(tmp_path), num_frames=2, folder="embedded")
    spellings = [("mmeb", "./images//a.png"), ("./mmeb/", "images/a.png"), ("", "mmeb/./images/a.png")]
    assert {library.image(path, folder) for folder, path in spellings} == {"mmeb/images/a.png"}
