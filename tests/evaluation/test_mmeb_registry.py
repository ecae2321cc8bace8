"""Names and groups of the tasks; annotation files wherever data sets lay them; media below the root."""

import json
import os

import numpy as np
import pytest
from mmeb_folders import NAMES, make_folders, words, write_readme, write_table

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.media_tree import MediaTree, clean
from umer1.evaluation.mmeb_v2.readers import READERS, read_task
from umer1.evaluation.mmeb_v2.registry import GROUPS, TASKS, select
from umer1.evaluation.mmeb_v2.tables import find_annotation

FRESH = int.from_bytes(os.urandom(4), "little")
SIZES = {
    **{"I-CLS": 10, "I-QA": 10, "I-RET": 12, "I-GD": 4},
    **{"V-CLS": 5, "V-QA": 5, "V-RET": 5, "V-MRET": 3},
    **{"VDR1": 10, "VDR2": 4, "VisRAG": 6, "OOD": 4},
}
OUT_OF_DOMAIN = (
    "Place365, ImageNet-A, ImageNet-R, ObjectNet, Country211, ScienceQA, GQA, TextVQA, VizWiz, FashionIQ, Wiki-SS-NQ, "
    "OVEN, EDIS, RefCOCO, RefCOCO-Matching, Visual7W-Pointing, ViDoSeek-page, ViDoSeek-doc, MMLongBench-page, "
    "MMLongBench-doc"
)


def test_tasks_and_groups():
    assert [(group, len(names)) for group, names in GROUPS.items()] == list(SIZES.items())
    assert set(TASKS) == set(NAMES) and len(TASKS) == 78 and all(spec.name == name for name, spec in TASKS.items())
    assert all(spec.layout in READERS for spec in TASKS.values())
    pictures = [spec for spec in TASKS.values() if spec.modality != "video"]
    assert {spec.name for spec in pictures if not spec.in_domain} == set(OUT_OF_DOMAIN.split(", "))
    for spec in pictures:
        document = spec.modality == "visdoc"
        assert spec.candidates == ("global" if document else "local")
        assert spec.metric == ("ndcg_linear@5" if document else "hit@1")


def test_select():
    assert [spec.name for spec in select(["GQA", "ImageNet-1K", "GQA"])] == ["ImageNet-1K", "GQA"]
    assert [spec.name for spec in select(modality="visdoc")] == [
        *GROUPS["VDR1"],
        *GROUPS["VDR2"],
        *GROUPS["VisRAG"],
        *GROUPS["OOD"],
    ]
    assert len(select()) == len(TASKS)
    with pytest.raises(UserError) as error:
        select(["mscoco_t2", "GQA", "nonsense!", "MSVD,VATEX"], "visdoc")
    assert "'mscoco_t2' is not a task of MMEB-V2 (did you mean MSCOCO_t2i" in str(error.value)
    assert "'GQA' is a task of modality 'image', not 'visdoc'" in str(error.value)
    assert "'nonsense!' is not a task" in str(error.value)
    assert "'MSVD,VATEX' is not a task of MMEB-V2 (names stand behind --tasks with blanks" in str(error.value)
    with pytest.raises(UserError, match="'audio' must be one of image, video, visdoc"):
        select(modality="audio")


@pytest.mark.parametrize(
    "file, subset",
    (
        ("data/test-00000-of-00002.parquet", None),
        ("data/test.parquet", None),
        ("test.jsonl", None),
        ("default/test-00000-of-00001.parquet", None),
        ("MC/test-00000-of-00001.parquet", "MC"),
        ("data/MC/test-00000-of-00001.parquet", "MC"),
        ("MC.jsonl", "MC"),
        ("data/MC.json", "MC"),
        ("json/MC.json", "MC"),
    ),
)
def test_usual_places_of_files(tmp_path, file, subset):
    write_table(tmp_path / "hub/set" / file, [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    annotation = find_annotation(tmp_path, ["not/here", "hub/set"], subset=subset)
    assert annotation.rows(["a"]) == [{"a": 1}, {"a": 2}]
    assert annotation.rows(["b"], ["a", "c"]) == [{"b": "x", "a": 1}, {"b": "y", "a": 2}]


def test_several_files_in_order_and_in_one_list(tmp_path):
    for part in range(12):
        write_table(tmp_path / f"set/data/test-{part:05d}-of-00012.parquet", [{"a": part}])
    (tmp_path / "whole.json").write_text(json.dumps([{"a": 1}, {"a": 2}]))
    assert [row["a"] for row in find_annotation(tmp_path, ["set"]).rows(["a"])] == list(range(12))
    assert [row["a"] for row in find_annotation(tmp_path, ["whole.json"]).rows(["a"])] == [1, 2]


def test_the_card_says_what_a_file_is(tmp_path):
    """`configs` of the front matter before usual places; a config without a split is the train split."""
    write_table(tmp_path / "set/odd/one.parquet", [{"a": 1}])
    write_table(tmp_path / "set/odd/two.jsonl", [{"a": 2}])
    write_table(tmp_path / "set/test.jsonl", [{"a": 3}])
    write_readme(tmp_path / "set", {"first": {"test": "odd/one.parquet", "train": "**/*two.jsonl"}})
    for hidden in ("odd/._two.jsonl", ".cache/two.jsonl"):
        write_table(tmp_path / "set" / hidden, [{"a": 4}])
    assert find_annotation(tmp_path, ["set"], subset="first").rows(["a"]) == [{"a": 1}]
    assert find_annotation(tmp_path, ["set"], subset="first", split="train").rows(["a"]) == [{"a": 2}]
    assert find_annotation(tmp_path, ["set"]).rows(["a"]) == [{"a": 3}]
    (tmp_path / "set/README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: odd/two.jsonl\n---\n")
    assert find_annotation(tmp_path, ["set"], subset="x", split="train").rows(["a"]) == [{"a": 2}]
    write_readme(tmp_path / "set", {"first": {"test": "../../etc/*"}})
    with pytest.raises(UserError, match="leads out of the data set's folder"):
        find_annotation(tmp_path, ["set"], subset="first")
    write_readme(tmp_path / "set", {"first": {"test": ""}})
    with pytest.raises(UserError, match="README.md: data_files '' is no pattern"):
        find_annotation(tmp_path, ["set"], subset="first")
    for front in ("a: 2025-13-45", "a: " + "[" * 100_000):
        (tmp_path / "set/README.md").write_text(f"---\n{front}\n---\n")
        with pytest.raises(UserError, match="README.md cannot be read"):
            find_annotation(tmp_path, ["set"])


def test_the_first_place_counts_and_all_are_named_where_none_has_it(tmp_path):
    for place in ("one", "two"):
        write_table(tmp_path / place / "test.jsonl", [{"a": place}])
    assert find_annotation(tmp_path, ["one", "two"]).rows(["a"]) == [{"a": "one"}]
    with pytest.raises(UserError) as error:
        find_annotation(tmp_path, ["one", "two"], subset="Q", split="val")
    assert all(f"{tmp_path}/{place}" in str(error.value) for place in ("one", "two"))
    assert "the 'val' split of 'Q'" in str(error.value)


def test_a_task_that_is_not_there_names_both_layouts(tmp_path):
    with pytest.raises(UserError, match="(?s)image-tasks.*ziyjiang/MMEB_Test_Instruct"):
        read_task(TASKS["GQA"], tmp_path)


@pytest.mark.parametrize("file", ("test.parquet", "test.jsonl", "test.json"))
def test_damaged_files_and_missing_columns(tmp_path, file):
    write_table(tmp_path / "good" / file, [{"a": 1}])
    with pytest.raises(UserError, match="has no column 'b'; it has 'a'"):
        find_annotation(tmp_path, ["good"]).rows(["b"])
    whole = (tmp_path / "good" / file).read_bytes()
    (tmp_path / "good" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{file} cannot be read as (parquet|JSON)"):
        find_annotation(tmp_path, ["good"]).rows(["a"])


@pytest.mark.parametrize("content", (b"[" * 100_000, b"\xff\xfe", b'[{"a": 1},]', b"7"))
def test_what_is_no_json_ends_in_a_message(tmp_path, content):
    (tmp_path / "test.json").write_bytes(content)
    with pytest.raises(UserError, match=r"test.json(: row 0 must be| cannot be read as JSON)"):
        find_annotation(tmp_path, ["test.json"]).rows(["a"])


def test_json_as_other_systems_write_it(tmp_path):
    """A byte order mark, and lines that end in CRLF."""
    (tmp_path / "test.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    (tmp_path / "list.json").write_bytes(b'\xef\xbb\xbf[\r\n{"a": 1}, {"a": 2}]\r\n')
    for name in ("test.jsonl", "list.json"):
        assert find_annotation(tmp_path, [name]).rows(["a"]) == [{"a": 1}, {"a": 2}]


def test_parquet_whose_text_is_no_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff"))
    pyarrow.parquet.write_table(pyarrow.table({"a": raw}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="test.parquet cannot be read as parquet"):
        find_annotation(tmp_path, ["test.parquet"]).rows(["a"])


def test_the_fingerprint_is_of_contents_alone(tmp_path):
    rng = np.random.default_rng(FRESH)
    rows = [{"a": words(rng, 3)} for _ in range(3)]
    write_table(tmp_path / "one/test.jsonl", rows)
    write_table(tmp_path / "two/data/test-00000-of-00001.jsonl", rows)
    write_table(tmp_path / "three/test.jsonl", [*rows[:2], {"a": "changed"}])
    one, two, three = (find_annotation(tmp_path, [place]).fingerprint for place in ("one", "two", "three"))
    assert one == two != three, f"seed {FRESH}"


@pytest.mark.parametrize("saved, shown", ((20, 8), (8, 8), (5, 8), (64, 8), (3, 1), (7, None)))
def test_frames_by_linspace_in_natural_order(tmp_path, saved, shown):
    folder = tmp_path / "frames/v"
    folder.mkdir(parents=True)
    for number in np.random.default_rng(FRESH).permutation(saved):
        (folder / f"Frame_{number}.{('jpg', 'PNG', 'jpeg')[number % 3]}").touch()
    (folder / "notes.txt").touch()
    (folder / "._Frame_0.jpg").touch()  # macOS
    (folder / "more").mkdir()
    places = range(saved) if shown is None or shown > saved else np.linspace(0, saved - 1, shown).astype(int)
    names = [f"frames/v/Frame_{n}.{('jpg', 'PNG', 'jpeg')[n % 3]}" for n in places]
    item = MediaTree(tmp_path).video_item(" text\n", "frames//v/", shown, "v.mp4")
    assert (item.text, list(item.video), item.missing) == ("text", names, ()), f"seed {FRESH}"
    assert MediaTree(tmp_path).video_item("", "frames/w", shown, "w.mp4").missing == ("w.mp4",)


def test_what_is_below_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    for path in (root / "a/b/in.png", tmp_path / "out.png"):
        path.touch()
    (root / "a/link.png").symlink_to(root / "a/b/in.png")
    (root / "a/out.png").symlink_to(tmp_path / "out.png")
    (root / "a/gone.png").symlink_to(root / "nowhere")
    (root / "up").symlink_to(tmp_path)
    tree = MediaTree(root)
    assert [tree.has_file(f"a/{name}") for name in ("link.png", "out.png", "gone.png")] == [True, False, False]
    assert not tree.has_file("up/out.png") and not tree.has_folder("up") and tree.has_folder("a/b")
    assert tree.files("a") == ["link.png"] and tree.folders("") == ["a"]
    for path in ("../out.png", "a/../../out.png", str(tmp_path / "out.png"), "", "a/b", "a\0b", "a/b/none.png"):
        assert not tree.has_file(path) and tree.image_item("", [path]).missing
    assert clean("a//./b/in.png") == "a/b/in.png"
    (root / "here.png").touch()  # a video of a climbing name is not the root's own pictures
    for folder in ("../root", "", "a/\ud83d", "\ud83d"):
        assert tree.video_item("", folder, 8).missing and tree.image_item("", [f"{folder}/x.png"]).missing
    with pytest.raises(UserError, match="cannot be written"):
        tree.write("up/new.png", b"")


def test_the_same_seed_gives_the_same_folders(tmp_path):
    for place in ("one", "two"):
        make_folders(tmp_path / place, ["RefCOCO-Matching", "VisRAG_PlotQA"], seed=FRESH)
    found = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in tmp_path.iterdir()
    ]
    assert found[0] == found[1] and len(found[0]) > 10


@pytest.mark.parametrize("hub", (False, True), ids=("repository", "hub"))
def test_all_78_are_read_and_nothing_is_missing(tmp_path, hub):
    """What every task promises: names are distinct, and what a query ranks and what is right for it are among them."""
    make_folders(tmp_path, seed=FRESH, hub=hub)
    for spec in select():
        data, where = read_task(spec, tmp_path), f"{spec.name}, seed {FRESH}"
        names = {candidate.name for candidate in data.candidates}
        assert data.queries and len(names) == len(data.candidates) and data.spec == spec, where
        for query in data.queries:
            assert query.label_names and names >= {*query.cand_names, *query.label_names}, where
            assert spec.candidates == "global" or set(query.label_names) <= set(query.cand_names), where
        items = [entry.item for entry in (*data.queries, *data.candidates)]
        media = [path for item in items for path in (*item.images, *item.video)]
        assert not any(item.missing for item in items) and all((tmp_path / path).is_file() for path in media), where
        assert all(item.text == item.text.strip() and "<|" not in item.text for item in items), where
        assert all(item.text or item.images or item.video for item in items), where
