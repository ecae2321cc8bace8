"""The 24 visual document tasks: queries, a corpus of page pictures and graded relevances (qrels), as BEIR has them.

Tables, one subset each: queries (query-id, query), corpus (corpus-id, image), qrels (query-id, corpus-id, score).  Ids
may be numbers; names of candidates are their texts.  A page is `{corpus-id}.png` below the task's picture folder
(VisRAG: a shortened name with a hash); pages that only the corpus file holds are written there once.
"""

import hashlib
import io
import math
import os
from typing import Any

from PIL import Image

from umer1.data.media import FORMATS, MAX_FILE_BYTES
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.fields import name_field
from umer1.evaluation.mmeb_v2.media_tree import MediaTree, clean
from umer1.evaluation.mmeb_v2.tables import Annotation, combine
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec

QUERY_TEXT = "Find a document image that matches the given query:"
TARGET_TEXT = "Understand the content of the provided document image."

# Task -> data set's owner and name on the hub; the MMEB-V2 repository has it by the name alone.
_VIDORE_1 = {
    "arxivqa": "arxivqa_test_subsampled_beir",
    "docvqa": "docvqa_test_subsampled_beir",
    "infovqa": "infovqa_test_subsampled_beir",
    "tabfquad": "tabfquad_test_subsampled_beir",
    "tatdqa": "tatdqa_test_beir",
    "shiftproject": "shiftproject_test_beir",
    "syntheticDocQA_artificial_intelligence": "syntheticDocQA_artificial_intelligence_test_beir",
    "syntheticDocQA_energy": "syntheticDocQA_energy_test_beir",
    "syntheticDocQA_government_reports": "syntheticDocQA_government_reports_test_beir",
    "syntheticDocQA_healthcare_industry": "syntheticDocQA_healthcare_industry_test_beir",
}
_VIDORE_2 = {
    "esg_reports_human_labeled_v2": "esg_reports_human_labeled_v2",
    "biomedical_lectures_v2_multilingual": "biomedical_lectures_v2",
    "economics_reports_v2_multilingual": "economics_reports_v2",
    "esg_reports_v2_multilingual": "esg_reports_v2",
}
_VISRAG = ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
_OUT_OF_DOMAIN = {  # local name, hub's name; before the page numbers were corrected, the hub had the local one
    "ViDoSeek-page": ("ViDoSeek-page", "ViDoSeek-page-fixed"),
    "ViDoSeek-doc": ("ViDoSeek", "ViDoSeek"),
    "MMLongBench-page": ("MMLongBench", "MMLongBench-page-fixed"),
    "MMLongBench-doc": ("MMLongBench-doc", "MMLongBench-doc"),
}
_PAGES_NOTE = (
    "the published scores are of the files before November 2025, whose page numbers were wrong; scores on the "
    "corrected data set, VLM2Vec/{}, cannot be compared with them"
)


def _spec(name: str, group: str, local: str, hub: str) -> TaskSpec:
    layout, split = ("visrag", "train") if group == "VisRAG" else ("vidore", "test")
    places = [f"visdoc-tasks/{local}", f"visdoc-tasks/data/{local}", hub]
    pictures = (f"visdoc-tasks/{name}", f"visdoc-tasks/images/{name}")
    if group == "VDR2":  # its folders lack the prefix; the last one may be the annotation's own
        stem = name.removeprefix("ViDoRe_")
        pictures += (f"visdoc-tasks/images/{stem}", f"visdoc-tasks/{stem}")
    options = {"split": split, "pictures": {"": pictures}}
    if hub.endswith("-fixed"):
        fixed = [hub, *(f"visdoc-tasks/{folder}{name}-fixed" for folder in ("", "data/"))]
        # Corrected files have pictures of their own: an id need not be the same page in both.
        options["pictures"] |= dict.fromkeys(fixed, (f"visdoc-tasks/{name}-fixed", f"visdoc-tasks/images/{name}-fixed"))
        options["note"] = _PAGES_NOTE.format(hub.partition("/")[2])
        places = fixed + places[:-1] + [f"{hub.partition('/')[0]}/{local}"]
    options["places"] = tuple(places)
    return TaskSpec(name, "visdoc", group, "global", "ndcg_linear@5", layout, group != "OOD", options)


DOCUMENT_TASKS = (
    *(_spec(f"ViDoRe_{name}", "VDR1", hub, f"vidore/{hub}") for name, hub in _VIDORE_1.items()),
    *(_spec(f"ViDoRe_{name}", "VDR2", hub, f"vidore/{hub}") for name, hub in _VIDORE_2.items()),
    *(
        _spec(f"VisRAG_{name}", "VisRAG", f"VisRAG-Ret-Test-{name}", f"openbmb/VisRAG-Ret-Test-{name}")
        for name in _VISRAG
    ),
    *(_spec(name, "OOD", local, f"VLM2Vec/{hub}") for name, (local, hub) in _OUT_OF_DOMAIN.items()),
)


def read_documents(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """Candidates: the relevant pages in the queries' order, then the rest of the corpus.

    A query without a relevant page has no label; a relevant page that the corpus lacks is a candidate all the same,
    missing where its picture is.  options: `places` and `split` of the annotation, `pictures`: place -> folders.
    """
    place, tables = _find(spec, tree)
    folders = spec.options["pictures"].get(place, spec.options["pictures"][""])
    relevant = _relevant(tables["qrels"])
    queries = [_query(row, relevant, tables["queries"]) for row in tables["queries"].rows(("query-id", "query"))]
    where = str(tables["corpus"].files[0])
    corpus = [name_field(row, "corpus-id", where) for row in tables["corpus"].rows(("corpus-id",))]
    names = list(dict.fromkeys([name for query in queries for name in query.label_names] + corpus))
    paths = {name: _path(spec, tree, folders, name) for name in names}
    _extract(tables["corpus"], {name: path for name, path in paths.items() if not tree.has_file(path)}, tree)
    candidates = [Candidate(name, tree.image_item(TARGET_TEXT, [paths[name]])) for name in names]
    return TaskData(spec, queries, candidates, combine(tables[name].fingerprint for name in sorted(tables)))


def _find(spec: TaskSpec, tree: MediaTree) -> tuple[str, dict[str, Annotation]]:
    """The first place that has the queries, and all three tables from there."""
    split, places = spec.options["split"], spec.options["places"]
    queries = tree.annotation(places, subset="queries", split=split)
    place = next(place for place in places if queries.files[0].is_relative_to(os.path.join(tree.root, place)))
    tables = {name: tree.annotation([place], subset=name, split=split) for name in ("corpus", "qrels")}
    return place, {"queries": queries, **tables}


def _relevant(qrels: Annotation) -> dict[str, dict[str, float]]:
    """Query -> page -> score, of scores above 0; the highest where a pair is named twice."""
    found: dict[str, dict[str, float]] = {}
    where = str(qrels.files[0])
    for row in qrels.rows(("query-id", "corpus-id", "score")):
        query, page = (name_field(row, column, where) for column in ("query-id", "corpus-id"))
        try:
            score = float(row["score"])
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{where}: score must be a number, not {row['score']!r:.80}")
        if score > 0:
            pages = found.setdefault(query, {})
            pages[page] = max(pages.get(page, 0.0), score)
    return found


def _query(row: dict[str, Any], relevant: dict[str, dict[str, float]], table: Annotation) -> Query:
    where = str(table.files[0])
    number = name_field(row, "query-id", where)
    if not isinstance(row["query"], str):
        raise UserError(f"{where}: query {number} must be a string, not {row['query']!r}")
    pages = relevant.get(number, {})
    names, scores = tuple(pages), tuple(pages.values())
    return Query(Item(f"{QUERY_TEXT} {row['query']}".strip()), names, names, label_is_list=True, rel_scores=scores)


def _path(spec: TaskSpec, tree: MediaTree, folders: tuple[str, ...], name: str) -> str:
    """Where a page's picture lies, or belongs: the first folder that has it, the first that exists, the first."""
    file = f"{name}.png" if spec.layout == "vidore" else _short(name)
    paths = [f"{folder}/{file}" for folder in folders]
    found = [path for path in paths if tree.has_file(path)]
    usable = [path for path, folder in zip(paths, folders, strict=True) if tree.has_folder(folder)]
    return [*found, *usable, *paths][0]


def _short(name: str) -> str:
    """The reference's file name for VisRAG's long ids: 50 letters, 8 of the MD5, the ending."""
    base, ending = os.path.splitext(name)
    digest = hashlib.md5(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{base[:50]}_{digest[:8]}{ending}"


def _extract(corpus: Annotation, wanted: dict[str, str], tree: MediaTree) -> None:
    """Write the pictures that the corpus file holds and the disk does not have."""
    if not wanted:
        return
    for batch in corpus.batches(("corpus-id",), optional=("image",)):
        for row in batch:
            path, image = wanted.get(str(row["corpus-id"])), row.get("image")
            content = image.get("bytes") if isinstance(image, dict) else image
            if path is None or not clean(path) or tree.has_file(path):  # there by now: an id that is named twice
                continue
            if isinstance(content, bytes) and _is_picture(content):
                tree.write(path, content)


def _is_picture(content: bytes) -> bool:
    """Whether the bytes begin as a picture does; what fails later than at its header is found when it is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS):
            return len(content) <= MAX_FILE_BYTES
    except Exception:  # Pillow's readers raise nearly every type on hostile bytes
        return False
