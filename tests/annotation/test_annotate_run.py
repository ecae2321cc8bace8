"""`umer1 annotate` in one process: what is sent, what is written, what stops it, what it says."""

import hashlib
import io
import json
import os
import time
from base64 import b64decode
from collections import Counter
from pathlib import Path

import pytest
from annotation_world import dataset, flags, read_lines, write_world
from data_tools import make_processor, write_picture, write_records
from PIL import Image
from teacher_server import Teacher, good_text

from umer1.annotation.annotate import main
from umer1.annotation.ask import Asker
from umer1.data.dataset import PairDataset
from umer1.data.rl_dataset import PromptDataset
from umer1.errors import ConfigError, UserError


@pytest.fixture
def world(tmp_path):
    return tmp_path, write_world(tmp_path, mmeb=12, hound=6, pages=6)


def test_what_the_teacher_gets(tmp_path):
    inputs = write_world(tmp_path, mmeb=1, hound=1, pages=1)
    write_picture(tmp_path, "images/Toy/0.png", 400, 100)
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url, "--max-image-pixels", "10000", "--max-frame-pixels", "784"))
    content = teacher.bodies["mmeb query 0"]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    picture = decoded(content[0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert picture.size == (200, 50) and picture.format == "JPEG"
    frames = teacher.bodies["hound question 0"]["messages"][0]["content"]
    assert [part["type"] for part in frames] == ["image_url"] * 8 + ["text"]
    assert teacher.bodies["mmeb target 0"]["max_tokens"] == 8704
    assert "skip_special_tokens" not in teacher.bodies["mmeb target 0"]  # not every endpoint knows it


def test_special_tokens_are_kept_where_that_is_asked_for(world):
    """A teacher whose <think> is a special token, as GLM-4.1V's: without the setting nothing of it would be left."""
    root, inputs = world
    with Teacher() as teacher:
        main(flags(root, inputs, teacher.url, "--keep-special-tokens"))
        assert all(body["skip_special_tokens"] is False for body in teacher.bodies.values())
        with pytest.raises(UserError, match="keep_special_tokens was True and is False"):
            main(flags(root, inputs, teacher.url))


def test_video_url_holds_the_frames(tmp_path):
    inputs = write_world(tmp_path, hound=1)[1:2]
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url, "--video-as", "video_url", "--num-frames", "3"))
    video, text = teacher.bodies["hound question 0"]["messages"][0]["content"]
    head, _, frames = video["video_url"]["url"].partition("base64,")
    assert head == "data:video/jpeg;" and text["type"] == "text"
    assert [decoded(frame).size for frame in frames.split(",")] == [(28, 28)] * 3


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(text)))


def test_files_and_rl_selection(world):
    root, inputs = world
    with Teacher() as teacher:
        main(flags(root, inputs, teacher.url, "--rl-pairs", "6", "--pairs-per-shard", "4"))
        asked = set(teacher.asked)
    folder = root / "out" / "dataset"
    sft, filtered, manifest = dataset(root)
    rl = PromptDataset(folder / "rl.jsonl", root, make_processor())
    assert len(rl) == 6 and manifest["rl_modalities"] == {"image": 2, "video": 2, "document": 2}
    assert [rl[i].query.sequence.disc_index > 0 for i in range(6)] == [True] * 6
    apart = {text for record in read_lines(folder / "rl.jsonl") for text in (record["qry_text"], record["pos_text"])}
    assert not apart & asked and len(sft) + len(filtered) == 24 - 6
    assert all(
        not any(f"{text}\n" in turn(record, side) for text in apart) for record in sft for side in ("qry", "pos")
    )
    for entry in manifest["files"]:
        assert hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
    shards = sorted(folder.glob("sft-*.jsonl"))
    assert len(shards) == -(-len(sft) // 4)
    assert PairDataset(shards[0], root, make_processor())[0].query.pixel_values.numel() > 0
    by_text = {turn(record, "qry"): record for record in sft}
    text = next(text for text in by_text if "mmeb query" in text)
    assert text.startswith("<image>mmeb query") and by_text[text]["qry"]["image"].startswith("images/Toy/")
    assert turn(by_text[text], "qry", 1).endswith("<gen_emb>") and "</answer>" not in turn(by_text[text], "qry", 1)


def test_rl_pairs_of_a_trained_model_are_not_of_its_sft_files(world):
    root, inputs = world
    with Teacher() as teacher:
        main(flags(root, inputs, teacher.url, "--rl-pairs", "12"))
        count, sft = sum(teacher.asked.values()), dataset(root)[0]
        rl = root / "out" / "dataset" / "rl.jsonl"
        more = ["--rl-pairs", "6", "--selection-seed", "7", "--rl-from"]
        with pytest.raises(ConfigError, match="rl.jsonl' will be replaced by this run's"):
            main(flags(root, inputs, teacher.url, *more, str(rl)))
        with pytest.raises(UserError, match="record 0 is no pair of an RL file"):
            main(flags(root, inputs, teacher.url, *more, str(root / "mmeb.jsonl")))
        pool = rl.rename(root / "pool.jsonl")
        main(flags(root, inputs, teacher.url, *more, str(pool)))
    assert sum(teacher.asked.values()) == count
    again, filtered, manifest = dataset(root)
    assert again == sft and Counter(entry["cause"] for entry in filtered)["not_chosen"] == 6
    assert manifest["rl_modalities"] == {"image": 2, "video": 2, "document": 2}
    kept, chosen = ({json.dumps(record) for record in read_lines(path)} for path in (pool, rl))
    assert len(kept) == 12 and len(chosen) == 6 and chosen < kept


def test_all_settings_that_name_no_place_are_said_at_once(world):
    root, inputs = world
    (root / "out").mkdir()
    (root / "out" / "dataset").symlink_to(root / "elsewhere")
    refused = str(root / ("x" * 300))
    more = ["--data-root", refused, "--tokenizer", refused, "--rl-from", refused, "--rl-pairs", "-1"]
    with pytest.raises(ConfigError) as caught:
        main(flags(root, [*inputs, inputs[0] | {"path": refused}], "http://localhost:1/v1", *more))
    problems = caught.value.violations
    assert sum("x cannot be looked at: File name too long" in problem for problem in problems) == 4, problems
    wanted = ["rl_pairs=-1", "symbolic link dataset", "inputs[3].path=", "data_root=", "tokenizer=", "rl_from="]
    assert len(problems) == len(wanted) and all(any(word in problem for problem in problems) for word in wanted)


def turn(record: dict, side: str, place: int = 0) -> str:
    return record[side]["conversations"][place]["value"]


def test_run_again_asks_nothing_and_filters_anew(world):
    root, inputs = world
    with Teacher() as teacher:
        main(flags(root, inputs, teacher.url))
        count, before = sum(teacher.asked.values()), len(dataset(root)[0])
        (root / "out" / ".tmp-dataset-0123").mkdir()  # of a run that was killed while it wrote
        main(flags(root, inputs, teacher.url, "--max-repetition", "1"))
        assert {path.name for path in (root / "out").iterdir()} == {"journal.jsonl", "dataset"}
        assert len(dataset(root)[0]) >= before > 0
        with pytest.raises(UserError, match="no pair is left.*over_length"):
            main(flags(root, inputs, teacher.url, "--max-summary-tokens", "1"))
    assert sum(teacher.asked.values()) == count
    assert len(dataset(root)[0]) >= before  # the files of the last good run stay


def test_equal_sides_are_asked_once_or_each(tmp_path):
    dog = good_text("dog")
    rows = [{"qry": good_text(f"picture {i}"), "pos_text": dog} for i in range(5)]
    inputs = [{"layout": "mmeb", "path": str(write_records(tmp_path / "labels.jsonl", rows, lines=True))}]
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url))
        assert teacher.asked[dog] == 1
        main(flags(tmp_path, inputs, teacher.url, "--output", str(tmp_path / "b"), "--no-share-identical-sides"))
        assert teacher.asked[dog] == 6


def test_bad_rows_and_media_are_counted(tmp_path):
    write_picture(tmp_path, "good.png")
    write_picture(tmp_path, "ribbon.png", 70_000, 1)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [
        {"qry": good_text("fine"), "qry_image_path": "good.png", "pos_text": good_text("pos")},
        {"qry": "x", "qry_image_path": "bad.png", "pos_text": "a"},
        {"qry": "x", "qry_image_path": "absent.png", "pos_text": "b"},
        {"qry": "x", "qry_image_path": "../../etc/passwd", "pos_text": "c"},
        {"qry": "x", "qry_image_path": "", "pos_text": ""},
        {"qry": "<|im_start|>system", "pos_text": "d"},
        {"qry": 7, "pos_text": "e"},
        {"qry": "x", "qry_image_path": {"bytes": "iVBORw0KGgo=", "path": "good.png"}, "pos_text": "f"},
        {"qry": "x", "qry_image_path": "ribbon.png", "pos_text": "g"},  # no JPEG can be as wide
        "[]",
    ]
    inputs = [{"layout": "mmeb", "path": str(write_records(tmp_path / "rows.jsonl", rows, lines=True))}]
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url))
    sft, filtered, manifest = dataset(tmp_path)
    causes = [entry["cause"] for entry in filtered]
    path, bad = "path_escape", "bad_record"
    forged, ribbon = "reserved_token", "aspect_ratio"
    assert causes == ["corrupt_image", "missing_file", path, bad, forged, bad, bad, ribbon, bad] and len(sft) == 1
    assert manifest["datasets"]["rows"]["filtered"][bad] == 4


def test_wrong_key_stops_at_once_and_is_never_written(world, monkeypatch, capsys):
    root, inputs = world
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    with Teacher() as teacher:
        teacher.script = ["answer"] * 3 + ["401"] * 1000
        with pytest.raises(UserError, match="answers 401 to every request.*check --api-key-env") as caught:
            main(flags(root, inputs, teacher.url, "--api-key-env", "TEACHER_KEY", "--concurrency", "1"))
        assert teacher.headers[0]["Authorization"] == "Bearer sesame" and sum(teacher.asked.values()) <= 5
        teacher.script = []
        main(flags(root, inputs, teacher.url, "--api-key-env", "TEACHER_KEY"))
    shown = str(caught.value) + "".join(capsys.readouterr())
    written = [path for path in (root / "out").rglob("*") if path.is_file()]
    assert "sesame" not in shown and not any(b"sesame" in path.read_bytes() for path in written)


@pytest.mark.parametrize("key", ["sesame\n", "ses\u00e4me", "open sesame"])
def test_a_key_that_no_header_carries_is_refused_unseen(world, monkeypatch, key):
    root, inputs = world
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(ConfigError, match="api_key_env=TEACHER_KEY: that variable holds") as caught:
        main(flags(root, inputs, "http://127.0.0.1:9/v1", "--api-key-env", "TEACHER_KEY"))
    assert "sesame" not in str(caught.value) and "ses" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://a..b/v1", f"http://{'a' * 64}.org/v1", "http://127.0.0.1:9/v\u00e4"])
def test_an_address_that_nobody_can_have(world, url):
    root, inputs = world
    with pytest.raises(ConfigError, match="endpoint="):
        main(flags(root, inputs, url))


def test_names_that_are_no_utf8_reach_the_training_file(tmp_path):
    """A frame whose name is Latin-1 on the disk: annotated, written, and found again by training."""
    write_picture(tmp_path, "v/0.png", 28, 28)
    latin = os.fsdecode(b"v/caf\xe9.png")
    (tmp_path / "v/0.png").rename(tmp_path / latin)
    rows = [{"video": "v", "conversations": [{"value": good_text("what")}, {"value": good_text("rain")}]}]
    inputs = [{"layout": "llavahound-caption", "path": str(write_records(tmp_path / "rows.json", rows))}]
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url))
    (shard,) = (tmp_path / "out" / "dataset").glob("sft-*.jsonl")
    dataset = PairDataset(shard, tmp_path, make_processor())
    assert dataset.read(0).query.videos == ((latin,),)
    assert dataset[0].query.pixel_values.numel() > 0


def test_a_damaged_tokenizer_is_named(world):
    root, inputs = world
    (root / "model").mkdir()
    (root / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        main(flags(root, inputs, "http://127.0.0.1:9/v1", "--tokenizer", str(root / "model")))


def test_silent_teacher_stops_the_run_and_nothing_is_lost(world):
    root, inputs = world
    with Teacher() as teacher:
        teacher.script = ["answer"] * 10 + ["500"] * 1000
        more = ["--max-attempts", "2", "--stop-after-failures", "5", "--concurrency", "2"]
        with pytest.raises(UserError, match="no answer to 5 sides in a row, the last time: status 500"):
            main(flags(root, inputs, teacher.url, *more))
        assert not (root / "out" / "dataset").exists()
        teacher.script = []
        main(flags(root, inputs, teacher.url, *more))
    assert max(teacher.answered.values()) == 1 and sum(teacher.answered.values()) == 48


def test_nobody_at_the_address_is_said(tmp_path):
    """Too few sides to end the run by --stop-after-failures: the reason is in the message all the same."""
    inputs = write_world(tmp_path, mmeb=1)[:1]
    with pytest.raises(UserError, match="teacher_failed 1 .the last time: ConnectionRefusedError.*attempt 2 of 2"):
        main(flags(tmp_path, inputs, "http://127.0.0.1:9/v1", "--max-attempts", "2"))


def test_failed_sides_are_filtered_and_asked_by_the_next_run(tmp_path):
    inputs = write_world(tmp_path, mmeb=3)[:1]
    with Teacher() as teacher:
        teacher.script = ["500"]
        main(flags(tmp_path, inputs, teacher.url, "--max-attempts", "1", "--concurrency", "1"))
        assert [entry["cause"] for entry in dataset(tmp_path)[1]][:1] == ["teacher_failed"]
        main(flags(tmp_path, inputs, teacher.url))
    assert "teacher_failed" not in [entry["cause"] for entry in dataset(tmp_path)[1]]
    assert max(teacher.answered.values()) == 1


def test_a_server_that_refuses_everybody_stops_the_run(tmp_path):
    """One that was started for no pictures, say; mended, it is asked again about what it refused."""
    inputs = write_world(tmp_path, mmeb=8)[:1]
    more = ["--stop-after-failures", "5", "--concurrency", "1"]
    with Teacher() as teacher:
        teacher.script = ["400"] * 1000
        with pytest.raises(UserError, match="no answer to 5 sides in a row.*At most 0 image.*--ask-refused-again"):
            main(flags(tmp_path, inputs, teacher.url, *more))
        assert not teacher.answered and not (tmp_path / "out" / "dataset").exists()
        teacher.script = []
        main(flags(tmp_path, inputs, teacher.url, *more))
        refused = [entry for entry in dataset(tmp_path)[1] if entry["cause"] == "refused"]
        assert len(refused) >= 3 and "At most 0 image" in refused[0]["detail"]
        main(flags(tmp_path, inputs, teacher.url, *more, "--ask-refused-again"))
        main(flags(tmp_path, inputs, teacher.url, *more))  # what was answered then stays answered
    assert not any("At most 0 image" in entry["detail"] for entry in dataset(tmp_path)[1])
    assert len(teacher.answered) == 16 and max(teacher.answered.values()) == 1


def test_inputs_that_grow_during_the_run(tmp_path, monkeypatch):
    inputs = write_world(tmp_path, mmeb=2)[:1]
    run = Asker.run

    def and_grow(*arguments):
        found = run(*arguments)
        with open(inputs[0]["path"], "a") as file:
            file.write(json.dumps({"qry": good_text("late"), "pos_text": good_text("later")}) + "\n")
        return found

    with Teacher() as teacher:
        with monkeypatch.context() as patch:
            patch.setattr(Asker, "run", and_grow)
            main(flags(tmp_path, inputs, teacher.url))
        late = dataset(tmp_path)[1][-1]
        assert (late["cause"], late["id"]) == ("teacher_failed", "0:2") and "changed during the run" in late["detail"]
        main(flags(tmp_path, inputs, teacher.url))
    assert "0:2" not in [entry["id"] for entry in dataset(tmp_path)[1]]


def test_large_shards_and_folders_of_any_spelling(tmp_path, monkeypatch):
    """A shard that is large enough for a kept index: the index is no file of the data set.  B.JSONL is a pair file."""
    monkeypatch.setattr("umer1.data.index_cache.KEPT_BYTES", 100)
    for name in ("a.jsonl", "B.JSONL"):
        rows = [{"qry": good_text(f"query of {name}"), "pos_text": good_text(f"positive of {name}")}]
        (tmp_path / "pairs").mkdir(exist_ok=True)
        write_records(tmp_path / "pairs" / name, rows, lines=True)
    with Teacher() as teacher:
        main(flags(tmp_path, [{"layout": "mmeb", "path": str(tmp_path / "pairs")}], teacher.url))
    sft, _, manifest = dataset(tmp_path)
    assert {record["dataset_name"] for record in sft} == {"a", "B"}
    assert [(entry["name"], entry["records"]) for entry in manifest["files"]] == [
        ("filtered.jsonl", 0),
        ("sft-00000.jsonl", 2),
    ]


def test_the_passes_over_all_pairs_say_how_far_they_are(tmp_path, capsys):
    inputs = write_world(tmp_path, mmeb=3)[:1]
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url, "--progress-seconds", "0"))
    said = capsys.readouterr().err
    assert all(f"{count} pairs {done}" in said for count in range(3) for done in ("read", "judged"))


def test_concurrency_is_a_bound_and_is_used(world):
    root, inputs = world
    with Teacher() as teacher:
        main(flags(root, inputs, teacher.url, "--concurrency", "3"))
        assert 2 <= teacher.most_busy <= 3


def test_retry_after_is_kept_to_and_stalls_end(tmp_path):
    rows = [{"qry": "picture", "pos_text": "target"}]
    inputs = [{"layout": "mmeb", "path": str(write_records(tmp_path / "one.jsonl", rows, lines=True))}]
    with Teacher(stall_seconds=30) as teacher:
        teacher.script = ["429", "stall"]
        begin = time.monotonic()
        main(flags(tmp_path, inputs, teacher.url, "--request-timeout-seconds", "0.5", "--concurrency", "1"))
        assert 1.5 <= time.monotonic() - begin < 20  # one second of Retry-After, half of the stall
    assert len(dataset(tmp_path)[0]) == 1


def test_other_settings_and_second_run_are_refused(world):
    root, inputs = world
    with Teacher() as teacher:
        main(flags(root, inputs, teacher.url))
        with pytest.raises(UserError, match="teacher_temperature was 0.8 and is 0.1"):
            main(flags(root, inputs, teacher.url, "--teacher-temperature", "0.1"))


def test_every_problem_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    inputs = [{"layout": "mmeb", "path": str(tmp_path / "rows.parquet")}, {"layout": "mmeb", "path": "nowhere"}]
    with pytest.raises(ConfigError) as caught:
        main(
            flags(
                tmp_path, inputs, "ftp://x", "--api-key-env", "NO_SUCH", "--max-repetition", "2", "--concurrency", "0"
            )
        )
    words = ("pip install 'umer1[data]'", "nowhere", "ftp://x", "NO_SUCH", "max_repetition=2.0", "concurrency=0")
    assert len(caught.value.violations) == 6
    assert all(any(word in text for text in caught.value.violations) for word in words)


def test_help_teaches(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("vllm serve", "journal.jsonl", "--strip-box-markers", "--rl-pairs", "visrag"))


def test_damaged_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(UserError, match="rows.parquet is no whole parquet file"):
        main(flags(tmp_path, [{"layout": "visrag", "path": str(tmp_path / "rows.parquet")}], "http://127.0.0.1:9/v1"))


def test_parquet_with_pictures_inside(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    pictures = [Path(tmp_path, write_picture(tmp_path, f"src/{i}.png", seed=i)).read_bytes() for i in (0, 1, 0)]
    rows = [
        {"query": f"page query {i}", "image": {"bytes": content, "path": None}, "source": "x"}
        for i, content in enumerate(pictures)
    ]
    (tmp_path / "visrag").mkdir()
    for part in range(3):
        parquet.write_table(pyarrow.Table.from_pylist(rows[part : part + 1]), tmp_path / "visrag" / f"{part}.parquet")
    inputs = [{"layout": "visrag", "path": str(tmp_path / "visrag"), "dataset": "visrag"}]
    with Teacher() as teacher:
        main(flags(tmp_path, inputs, teacher.url))
    sft, filtered, _ = dataset(tmp_path)
    assert len(sft) + len(filtered) == 3 and len(list(tmp_path.glob("embedded/*/*.png"))) == 2
    for record in sft:
        assert (tmp_path / record["pos"]["image"]).read_bytes() in pictures
        assert "Represent the given document page." in json.dumps(record["pos"])
