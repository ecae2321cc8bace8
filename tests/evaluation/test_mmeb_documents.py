"""The 24 visual document tasks against what the reference evaluation does with the same tables, and the odd cases."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from mmeb_folders import DOCUMENTS, document_tables, make_folders, picture, picture_name, write_file, write_table

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.readers import read_task
from umer1.evaluation.mmeb_v2.registry import TASKS

FRESH = int.from_bytes(os.urandom(4), "little")
QUERY = "Find a document image that matches the given query:"
TARGET = "Understand the content of the provided document image."


def reference(tables: dict[str, list[dict]]) -> tuple[list[tuple], list]:
    """([text, pages, scores], names of candidates in order): dictionaries filled row by row, as the reference does."""
    qrels: dict = {}
    for row in tables["qrels"]:
        if row["score"] > 0:
            pages = qrels.setdefault(row["query-id"], {})
            pages[row["corpus-id"]] = max(pages.get(row["corpus-id"], 0), row["score"])
    queries, names = [], []
    for row in tables["queries"]:
        pages = qrels.get(row["query-id"], {})
        queries.append((f"{QUERY} {row['query']}", [str(page) for page in pages], list(pages.values())))
        names += [page for page in pages if page not in names]
    names += [row["corpus-id"] for row in tables["corpus"] if row["corpus-id"] not in names]
    return queries, names


def write(root, name: str, tables: dict[str, list[dict]]) -> None:
    local, _, split = DOCUMENTS[name]
    for subset, rows in tables.items():
        write_table(root / "visdoc-tasks" / local / subset / f"{split}-00000-of-00001.parquet", rows)


@pytest.mark.parametrize("hub", (False, True), ids=("repository", "hub"))
def test_every_task_equals_the_reference(tmp_path, hub):
    written = make_folders(tmp_path, DOCUMENTS, seed=FRESH, hub=hub)
    for name, tables in written.items():
        data, (queries, names) = read_task(TASKS[name], tmp_path), reference(tables)
        where = f"{name}, seed {FRESH}"
        assert len(data.queries) == len(queries), where
        for query, (text, pages, scores) in zip(data.queries, queries, strict=True):
            assert query.item.text == text and not query.item.images, where
            assert list(query.cand_names) == list(query.label_names) == pages, where
            assert list(query.rel_scores) == scores and query.label_is_list, where
        assert [candidate.name for candidate in data.candidates] == [str(page) for page in names], where
        held = {str(row["corpus-id"]): row["image"]["bytes"] for row in tables["corpus"]}
        folder = f"{name}-fixed" if hub and DOCUMENTS[name][1].endswith("-fixed") else name
        for candidate in data.candidates:
            path = f"visdoc-tasks/{folder}/{picture_name(name, candidate.name)}"
            assert (candidate.item.text, candidate.item.images, candidate.item.missing) == (TARGET, (path,), ()), where
            assert (tmp_path / path).read_bytes() == held[candidate.name], where


@pytest.mark.parametrize("folder", ("", "images/"))
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith("_v2") or "_v2_" in name])
def test_pictures_of_vidore_v2_lie_in_folders_without_the_prefix(tmp_path, folder, name):
    """As the reference evaluation and the published archive of page pictures have them; nothing is written twice."""
    tables = document_tables(name, np.random.default_rng(FRESH), 2)
    write(tmp_path, name, tables)
    pictures = f"visdoc-tasks/{folder}{name.removeprefix('ViDoRe_')}"
    for row in tables["corpus"][1:]:
        write_file(tmp_path / pictures / f"{row['corpus-id']}.png", row["image"]["bytes"])
    data = read_task(TASKS[name], tmp_path)
    assert {c.item.images for c in data.candidates} == {
        (f"{pictures}/{row['corpus-id']}.png",) for row in tables["corpus"]
    }
    assert not (tmp_path / "visdoc-tasks" / name).exists()


@pytest.mark.parametrize("name, old", (("ViDoSeek-page", "ViDoSeek-page"), ("MMLongBench-page", "MMLongBench")))
def test_page_tasks_as_the_hub_had_them_at_first(tmp_path, name, old):
    tables = document_tables(name, np.random.default_rng(FRESH), 2)
    for subset, rows in tables.items():
        write_table(tmp_path / "VLM2Vec" / old / subset / "test-00000-of-00001.parquet", rows)
    data = read_task(TASKS[name], tmp_path)
    assert len(data.queries) == 2 and {Path(c.item.images[0]).parent.name for c in data.candidates} == {name}


def test_pages_are_written_once_and_never_over_a_file(tmp_path):
    tables = make_folders(tmp_path, ["ViDoRe_tatdqa"], seed=FRESH)["ViDoRe_tatdqa"]
    folder = tmp_path / "visdoc-tasks/ViDoRe_tatdqa"
    own = folder / f"{tables['corpus'][0]['corpus-id']}.png"
    own.write_bytes(b"the user's own file")
    first = read_task(TASKS["ViDoRe_tatdqa"], tmp_path)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    again = read_task(TASKS["ViDoRe_tatdqa"], tmp_path)
    assert own.read_bytes() == b"the user's own file"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert len(before) == len(tables["corpus"]) and first == again


def test_of_an_id_that_the_corpus_has_twice_the_first_picture_is_written(tmp_path):
    """As in the reference evaluation, which writes no file that is there."""
    rng = np.random.default_rng(FRESH)
    tables = document_tables("ViDoRe_arxivqa", rng, 2)
    tables["corpus"].append(tables["corpus"][0] | {"image": {"bytes": picture(rng), "path": None}})
    write(tmp_path, "ViDoRe_arxivqa", tables)
    read_task(TASKS["ViDoRe_arxivqa"], tmp_path)
    written = (tmp_path / f"visdoc-tasks/ViDoRe_arxivqa/{tables['corpus'][0]['corpus-id']}.png").read_bytes()
    assert written == tables["corpus"][0]["image"]["bytes"], FRESH


def test_bytes_that_are_no_picture_are_missing(tmp_path):
    tables = document_tables("ViDoRe_arxivqa", np.random.default_rng(FRESH), 2)
    tables["corpus"][0]["image"]["bytes"] = b"%PDF-1.7"
    tables["corpus"][1]["image"]["bytes"] = None
    write(tmp_path, "ViDoRe_arxivqa", tables)
    data = read_task(TASKS["ViDoRe_arxivqa"], tmp_path)
    missing = {candidate.name: candidate.item.missing for candidate in data.candidates if candidate.item.missing}
    assert missing == {name: (f"visdoc-tasks/ViDoRe_arxivqa/{name}.png",) for name in ("0", "1")}
    assert {path.name for path in (tmp_path / "visdoc-tasks/ViDoRe_arxivqa").iterdir()} == {
        f"{row['corpus-id']}.png" for row in tables["corpus"][2:]
    }


def test_qrels_of_unknown_documents_and_queries_without_any(tmp_path):
    """A relevant page that the corpus lacks is a candidate, with its picture if the disk has it."""
    rng = np.random.default_rng(FRESH)
    tables = {
        "queries": [{"query-id": i, "query": f"query {i}"} for i in (7, 8, 9)],
        "corpus": [{"corpus-id": i, "image": {"bytes": picture(rng), "path": None}} for i in (1, 2)],
        "qrels": [
            {"query-id": 7, "corpus-id": 50, "score": 1},
            {"query-id": 7, "corpus-id": 2, "score": 1},
            {"query-id": 7, "corpus-id": 50, "score": 3},
            {"query-id": 8, "corpus-id": 1, "score": 0},
            {"query-id": 9, "corpus-id": 60, "score": 1},
            {"query-id": 99, "corpus-id": 70, "score": 1},
        ],
    }
    write(tmp_path, "MMLongBench-doc", tables)
    write_file(tmp_path / "visdoc-tasks/MMLongBench-doc/60.png", picture(rng))
    data = read_task(TASKS["MMLongBench-doc"], tmp_path)
    labels = [(query.label_names, query.rel_scores) for query in data.queries]
    assert labels == [(("50", "2"), (3.0, 1.0)), ((), ()), (("60",), (1.0,))]
    assert [candidate.name for candidate in data.candidates] == ["50", "2", "60", "1"]
    assert [bool(candidate.item.missing) for candidate in data.candidates] == [True, False, False, False]


def test_ids_that_lead_out_of_the_folder_are_missing_and_nothing_is_written(tmp_path):
    rng, root = np.random.default_rng(FRESH), tmp_path / "root"
    tables = {
        "queries": [{"query-id": "q", "query": "one"}],
        "corpus": [{"corpus-id": i, "image": {"bytes": picture(rng), "path": None}} for i in ("../../../out", "in")],
        "qrels": [{"query-id": "q", "corpus-id": "in", "score": 1}],
    }
    write(root, "ViDoSeek-doc", tables)
    data = read_task(TASKS["ViDoSeek-doc"], root)
    assert [bool(candidate.item.missing) for candidate in data.candidates] == [False, True]
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["in.png"]


def test_an_id_that_no_file_can_have_is_missing(tmp_path):
    """Half a surrogate pair, which JSON can spell."""
    for name in ("VisRAG_PlotQA", "ViDoSeek-doc"):
        place, _, split = DOCUMENTS[name]
        page = [{"corpus-id": "a\ud83d.png"}]
        for subset, rows in {"queries": [{"query-id": "q", "query": "?"}], "corpus": page}.items():
            write_table(tmp_path / "visdoc-tasks" / place / subset / f"{split}.jsonl", rows)
        qrels = [{"query-id": "q", "corpus-id": "a\ud83d.png", "score": 1}]
        write_table(tmp_path / "visdoc-tasks" / place / "qrels" / f"{split}.jsonl", qrels)
        (candidate,) = read_task(TASKS[name], tmp_path).candidates
        assert candidate.name == "a\ud83d.png" and candidate.item.missing


def test_pictures_that_were_unpacked_are_taken_from_there(tmp_path):
    """visdoc-tasks/data and visdoc-tasks/images, as the two archives unpack."""
    tables = make_folders(tmp_path, ["VisRAG_InfoVQA"], seed=FRESH)["VisRAG_InfoVQA"]
    visdoc = tmp_path / "visdoc-tasks"
    (visdoc / "data").mkdir()
    (visdoc / "VisRAG-Ret-Test-InfoVQA").rename(visdoc / "data/VisRAG-Ret-Test-InfoVQA")
    (visdoc / "images").mkdir()
    (visdoc / "VisRAG_InfoVQA").rename(visdoc / "images/VisRAG_InfoVQA")
    data = read_task(TASKS["VisRAG_InfoVQA"], tmp_path)
    assert all(c.item.images[0].startswith("visdoc-tasks/images/VisRAG_InfoVQA/") for c in data.candidates)
    assert len(list((visdoc / "images/VisRAG_InfoVQA").iterdir())) == len(tables["corpus"])


def test_corrected_pages_come_first_and_have_pictures_of_their_own(tmp_path):
    make_folders(tmp_path, ["ViDoSeek-page"], seed=FRESH)
    before = read_task(TASKS["ViDoSeek-page"], tmp_path)
    make_folders(tmp_path, ["ViDoSeek-page"], seed=FRESH + 1, hub=True)
    after = read_task(TASKS["ViDoSeek-page"], tmp_path)
    assert before.fingerprint != after.fingerprint and "ViDoSeek-page-fixed" in after.spec.options["note"]
    assert all(c.item.images[0].startswith("visdoc-tasks/ViDoSeek-page/") for c in before.candidates)
    assert all(c.item.images[0].startswith("visdoc-tasks/ViDoSeek-page-fixed/") for c in after.candidates)


def test_a_root_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:  # root may write anywhere: a file where the folder should be stands for it
        make_folders(tmp_path, ["ViDoRe_docvqa"], seed=FRESH)
        folder = tmp_path / "visdoc-tasks/ViDoRe_docvqa"
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.write_text("no folder")
    else:
        make_folders(tmp_path, ["ViDoRe_docvqa"], seed=FRESH)
        (tmp_path / "visdoc-tasks/ViDoRe_docvqa").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="ViDoRe_docvqa/.*cannot be written"):
        read_task(TASKS["ViDoRe_docvqa"], tmp_path)


@pytest.mark.parametrize(
    "subset, change, message",
    (
        ("qrels", {"score": "much"}, "score must be a number, not 'much'"),
        ("qrels", {"score": float("inf")}, "score must be a number, not inf"),
        ("qrels", {"score": 10**400}, "score must be a number, not 10"),
        ("queries", {"query": None}, "query 0 must be a string, not None"),
        # pandas makes floats of a column of numbers that has a gap; 0.0 would be no page of the corpus's 0
        ("qrels", {"corpus-id": 0.0}, "corpus-id must be a name or a number, not 0.0"),
        ("qrels", {"corpus-id": None}, "corpus-id must be a name or a number, not None"),
        ("queries", {"query-id": True}, "query-id must be a name or a number, not True"),
    ),
)
def test_rows_that_are_none(tmp_path, subset, change, message):
    tables = document_tables("ViDoRe_infovqa", np.random.default_rng(FRESH), 2)
    write(tmp_path, "ViDoRe_infovqa", tables)
    folder = tmp_path / "visdoc-tasks" / DOCUMENTS["ViDoRe_infovqa"][0] / subset
    next(folder.iterdir()).unlink()
    tables[subset][0] |= change
    write_table(folder / "test.jsonl", tables[subset])
    with pytest.raises(UserError, match=message):
        read_task(TASKS["ViDoRe_infovqa"], tmp_path)


def test_a_table_that_is_not_there_is_named(tmp_path):
    make_folders(tmp_path, ["ViDoRe_infovqa"], seed=FRESH)
    folder = tmp_path / "visdoc-tasks" / DOCUMENTS["ViDoRe_infovqa"][0]
    next((folder / "qrels").iterdir()).unlink()
    with pytest.raises(UserError, match=f"(?s)'test' split of 'qrels'.*{folder.name}"):
        read_task(TASKS["ViDoRe_infovqa"], tmp_path)
