"""The 36 image tasks against what the reference evaluation does with the same rows, and the odd cases."""

import os

import numpy as np
import pytest
from mmeb_folders import IMAGE_KINDS, image_rows, make_folders, picture, write_file, write_table

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.readers import read_task
from umer1.evaluation.mmeb_v2.registry import TASKS

FRESH = int.from_bytes(os.urandom(4), "little")
TOKEN = "<|image_pad|>"


def reference(name: str, rows: list[dict]) -> tuple[list[tuple], dict[str, tuple]]:
    """([query text, picture, names, label], name -> (text, picture)), media tokens where the reference has them.

    Written after the reference's loaders, step for step; paths below its image root.
    """
    kind, queries, candidates = IMAGE_KINDS[name], [], {}
    for row in rows:
        if kind == "t2i":
            query = row["qry_inst"].replace("<|image_1|>", TOKEN) + " " + row["qry_text"] + "\n"
            query += "\n" if name == "VisDial" else ""
            image = None
        else:
            instruction = row["qry_inst"].replace("<|image_1|>", "")
            if kind in ("qa", "i2i"):
                instruction = "\n" + instruction.strip()
            prompt = instruction + " " + row["qry_text"] if row["qry_text"] else instruction
            query = (TOKEN + " " + prompt).replace(" \n", "\n") + "\n"
            image = row["qry_img_path"]
        if kind in ("cls", "qa", "i2t"):
            names, texts, pictures = row["tgt_text"], row["tgt_text"], [None] * len(row["tgt_text"])
        else:
            pictures = row["tgt_img_path"]
            instruction = row["tgt_inst"].replace("<|image_1|>", "")
            if row["tgt_text"][0].strip():
                texts = [(TOKEN + " " + instruction + " " + t).replace(" \n", "\n") + "\n" for t in row["tgt_text"]]
            else:
                texts = [(TOKEN + " " + instruction).replace(" \n", "\n")] * len(pictures)
            names = pictures
            if kind == "i2i":
                names = [path + ":" + text.strip('"') for path, text in zip(pictures, row["tgt_text"], strict=True)]
        queries.append((query, image, names, names[0]))
        for target in zip(names, texts, pictures, strict=True):
            candidates.setdefault(target[0], target[1:])
    return queries, candidates


def plain(text: str) -> str:
    return text.replace(TOKEN, "").strip()


def below(path: str | None) -> tuple[str, ...]:
    return () if path is None else (f"image-tasks/{path}",)


def check(name: str, rows: list[dict], root) -> None:
    data = read_task(TASKS[name], root)
    queries, candidates = reference(name, rows)
    where = f"{name}, seed {FRESH}"
    assert len(data.queries) == len(rows), where
    for query, (text, image, names, label) in zip(data.queries, queries, strict=True):
        assert (query.item.text, query.item.images) == (plain(text), below(image)), where
        assert query.cand_names == tuple(names) and query.label_names == (label,), where
        assert not query.label_is_list and query.rel_scores is None and not query.item.missing, where
    assert [candidate.name for candidate in data.candidates] == list(candidates), where
    for candidate, (text, image) in zip(data.candidates, candidates.values(), strict=True):
        assert (candidate.item.text, candidate.item.images) == (plain(text), below(image)), where
        assert not candidate.item.missing and not candidate.item.video, where


@pytest.mark.parametrize("hub", (False, True), ids=("repository", "hub"))
def test_every_task_equals_the_reference(tmp_path, hub):
    written = make_folders(tmp_path, IMAGE_KINDS, seed=FRESH, hub=hub)
    for name in IMAGE_KINDS:
        check(name, written[name]["rows"], tmp_path)


@pytest.mark.parametrize("name", ("ImageNet-1K", "OK-VQA", "CIRR", "RefCOCO-Matching", "WebQA", "VisDial"))
def test_blanks_and_breaks_anywhere(tmp_path, name):
    """Instructions and texts with blanks at the ends, before line breaks and in the middle."""
    rng = np.random.default_rng(FRESH)
    rows = image_rows(name, rng, 4)

    def mess(text: str) -> str:
        pieces = ["", " ", "\n", " \n", "\n ", "  "]
        return "".join(pieces[rng.integers(6)] + word for word in text.split(" ")) + pieces[rng.integers(6)]

    for row in rows:
        row["qry_inst"], row["tgt_inst"] = mess(row["qry_inst"]), mess(row["tgt_inst"])
        row["qry_text"] = mess(row["qry_text"])
        row["tgt_text"] = [mess(text) if text else text for text in row["tgt_text"]]
    write_table(tmp_path / "image-tasks" / name / "test-00000-of-00001.parquet", rows)
    for path in {path for row in rows for path in [row["qry_img_path"], *row["tgt_img_path"]] if path}:
        write_file(tmp_path / "image-tasks" / path, picture(rng))
    check(name, rows, tmp_path)


def test_missing_pictures_are_named(tmp_path):
    rows = make_folders(tmp_path, ["CIRR"], seed=FRESH)["CIRR"]["rows"]
    gone = [rows[0]["qry_img_path"], rows[1]["tgt_img_path"][0]]
    for path in gone:
        (tmp_path / "image-tasks" / path).unlink()
    data = read_task(TASKS["CIRR"], tmp_path)
    assert [query.item.missing for query in data.queries] == [(f"image-tasks/{gone[0]}",), (), ()]
    assert data.queries[0].item.images == ()
    missing = {candidate.name: candidate.item.missing for candidate in data.candidates if candidate.item.missing}
    assert missing == {f"{gone[1]}:": (f"image-tasks/{gone[1]}",)}


def test_paths_that_leave_the_root_are_missing(tmp_path):
    outside = tmp_path / "outside"
    write_file(outside / "t0.png", b"secret")
    root = tmp_path / "root"
    rows = make_folders(root, ["MSCOCO"], seed=FRESH)["MSCOCO"]["rows"]
    rows[0]["qry_img_path"] = "../../outside/t0.png"
    rows[1]["qry_img_path"] = str(outside / "t0.png")
    rows[2]["qry_img_path"] = "MSCOCO/link.png"
    (root / "image-tasks/MSCOCO/link.png").symlink_to(outside / "t0.png")
    write_table(root / "image-tasks/MSCOCO/test-00000-of-00001.parquet", rows)
    data = read_task(TASKS["MSCOCO"], root)
    assert all(query.item.missing and not query.item.images for query in data.queries)


def test_candidates_named_twice_are_one(tmp_path):
    """Within a query and over queries; what a query ranks keeps its repeats, as the reference's file does."""
    rows = make_folders(tmp_path, ["GQA"], seed=FRESH)["GQA"]["rows"]
    rows[0]["tgt_text"] = ["a", "b", "a", " b"]
    rows[1]["tgt_text"] = ["b", "c", "c"]
    write_table(tmp_path / "image-tasks/GQA/test-00000-of-00001.parquet", rows[:2])
    data = read_task(TASKS["GQA"], tmp_path)
    assert [query.cand_names for query in data.queries] == [("a", "b", "a", " b"), ("b", "c", "c")]
    assert [(candidate.name, candidate.item.text) for candidate in data.candidates] == [
        ("a", "a"),
        ("b", "b"),
        (" b", "b"),
        ("c", "c"),
    ]


def test_pictures_in_the_archives_own_folder(tmp_path):
    """image-tasks/MMEB/... as the archive unpacks."""
    make_folders(tmp_path, ["NIGHTS"], seed=FRESH)
    annotation = tmp_path / "image-tasks/NIGHTS/test-00000-of-00001.parquet"
    annotation.rename(tmp_path / "kept.parquet")
    (tmp_path / "image-tasks/NIGHTS").rename(tmp_path / "moved")
    (tmp_path / "image-tasks/MMEB").mkdir()
    (tmp_path / "moved").rename(tmp_path / "image-tasks/MMEB/NIGHTS")
    annotation.parent.mkdir()
    (tmp_path / "kept.parquet").rename(annotation)
    data = read_task(TASKS["NIGHTS"], tmp_path)
    assert all(item.images and not item.missing for item in [*(q.item for q in data.queries)])
    assert data.candidates[0].item.images[0].startswith("image-tasks/MMEB/NIGHTS/")


@pytest.mark.parametrize(
    "change, message",
    (
        ({"tgt_text": []}, "row 1: tgt_text must be a list of at least one string"),
        ({"tgt_img_path": ["one.png"]}, "3 tgt_text|5 tgt_text and 1 tgt_img_path"),
        ({"tgt_text": "red"}, "row 1: tgt_text must be a list"),
        ({"qry_inst": 7}, "row 1: qry_inst must be a string, not 7"),
    ),
    ids=("no candidates", "lengths", "not a list", "not a string"),
)
def test_rows_that_are_none(tmp_path, change, message):
    rows = make_folders(tmp_path, ["CIRR"], seed=FRESH)["CIRR"]["rows"]
    rows[1] |= change
    (tmp_path / "image-tasks/CIRR/test-00000-of-00001.parquet").unlink()
    write_table(tmp_path / "image-tasks/CIRR/test.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read_task(TASKS["CIRR"], tmp_path)
