"""MMEB-V2 on disk as it is published, tiny: annotation files, pictures, frame folders, corpus, queries and qrels.

The names of folders, files and columns are the reference evaluation's, written out here a second time: no reader of
umer1 is asked where anything belongs.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

CLASSIFICATION = "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211"
QA = "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA"
CAPTIONS = "MSCOCO_i2t VisualNews_i2t"
TO_PICTURE = "VisDial MSCOCO_t2i VisualNews_t2i WebQA EDIS Wiki-SS-NQ"
WITH_CAPTIONS = "WebQA EDIS RefCOCO-Matching"  # targets are a picture and a text
PICTURES = "CIRR NIGHTS OVEN FashionIQ MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"
IMAGE_KINDS = {
    **dict.fromkeys(CLASSIFICATION.split(), "cls"),
    **dict.fromkeys(QA.split(), "qa"),
    **dict.fromkeys(CAPTIONS.split(), "i2t"),
    **dict.fromkeys(TO_PICTURE.split(), "t2i"),
    **dict.fromkeys(PICTURES.split(), "i2i"),
}
VIDEOS = (
    "K700 SmthSmthV2 HMDB51 UCF101 Breakfast MVBench Video-MME NExTQA EgoSchema ActivityNetQA "
    "DiDeMo MSR-VTT MSVD VATEX YouCook2 QVHighlight Charades-STA MomentSeeker"
)
_SYNTHETIC = "artificial_intelligence energy government_reports healthcare_industry"
# Task -> (folder below visdoc-tasks, owner/name on the hub, split).
DOCUMENTS = {
    **{
        f"ViDoRe_{name}": (f"{name}{ending}", f"vidore/{name}{ending}", "test")
        for names, ending in (
            ("arxivqa docvqa infovqa tabfquad", "_test_subsampled_beir"),
            ("tatdqa shiftproject " + " ".join(f"syntheticDocQA_{name}" for name in _SYNTHETIC.split()), "_test_beir"),
        )
        for name in names.split()
    },
    "ViDoRe_esg_reports_human_labeled_v2": (
        "esg_reports_human_labeled_v2",
        "vidore/esg_reports_human_labeled_v2",
        "test",
    ),
    **{
        f"ViDoRe_{name}_v2_multilingual": (f"{name}_v2", f"vidore/{name}_v2", "test")
        for name in ("biomedical_lectures", "economics_reports", "esg_reports")
    },
    **{
        f"VisRAG_{name}": (f"VisRAG-Ret-Test-{name}", f"openbmb/VisRAG-Ret-Test-{name}", "train")
        for name in "ArxivQA ChartQA MP-DocVQA SlideVQA InfoVQA PlotQA".split()
    },
    "ViDoSeek-page": ("ViDoSeek-page", "VLM2Vec/ViDoSeek-page-fixed", "test"),
    "ViDoSeek-doc": ("ViDoSeek", "VLM2Vec/ViDoSeek", "test"),
    "MMLongBench-page": ("MMLongBench", "VLM2Vec/MMLongBench-page-fixed", "test"),
    "MMLongBench-doc": ("MMLongBench-doc", "VLM2Vec/MMLongBench-doc", "test"),
}
NAMES = (*IMAGE_KINDS, *VIDEOS.split(), *DOCUMENTS)
_WORDS = "red blue small large square circle left right above table café naïve 7".split()


def make_folders(
    root: Path, names: Iterable[str] | None = None, *, seed: int, queries: int = 3, hub: bool = False
) -> dict[str, dict[str, list[dict]]]:
    """Write the named tasks (all 78) below `root`; their tables as they were written (`rows`, or one a subset).

    hub: annotation as repositories of the hub beside the media, with README files where those say what a file is;
    else as the MMEB-V2 repository unpacks.  The same seed gives the same bytes.
    """
    root, written = Path(root), {}
    for name in NAMES if names is None else names:
        rng = np.random.default_rng([seed, NAMES.index(name)])
        if name in IMAGE_KINDS:
            written[name] = {"rows": _image_task(root, name, rng, queries, hub)}
        elif name in DOCUMENTS:
            written[name] = _document_task(root, name, rng, queries, hub)
        else:
            from mmeb_video_folders import make_video_task

            layout = "hub" if hub else "repository"
            written[name] = {"rows": make_video_task(root, name, seed=seed, queries=queries, layout=layout)}
    return written


def image_rows(name: str, rng: np.random.Generator, queries: int) -> list[dict]:
    """Rows of MMEB_Test_Instruct: the right candidate first, several queries with the same candidates among theirs."""
    kind, rows = IMAGE_KINDS[name], []
    labels = [f"{words(rng, 2)} {i}" for i in range(queries + 2)]
    for number in range(queries):
        order = [number, *(i for i in rng.permutation(len(labels)).tolist() if i != number)]
        targets = [labels[i] for i in order]
        row = {
            "qry_inst": f"<|image_1|>\n{words(rng, 3)}:{' ' * int(rng.integers(0, 2))}",
            "qry_text": "" if kind in ("cls", "i2t") else f"{words(rng, 4)}{' ' * int(rng.integers(0, 2))}",
            "qry_img_path": "" if kind == "t2i" else f"{name}/q{number}.png",
            "tgt_inst": "" if kind in ("cls", "qa", "i2t") else f"<|image_1|>\nRepresent the given {words(rng, 1)}.",
            "tgt_text": targets,
            "tgt_img_path": [""] * len(targets),
        }
        if kind == "t2i" and name not in WITH_CAPTIONS.split():
            row["qry_inst"] = f"Find {words(rng, 2)}:"  # WebQA and EDIS have the token in queries without a picture
        if kind in ("t2i", "i2i"):
            row["tgt_img_path"] = [f"{name}/t{i}.png" for i in order]
            row["tgt_text"] = targets if name in WITH_CAPTIONS.split() else [""] * len(targets)
        if name == "RefCOCO-Matching":  # several objects of one picture, quoted
            row["tgt_img_path"] = [f"{name}/t{i // 2}.png" for i in order]
            row["tgt_text"] = [f'"{text}"' for text in targets]
        rows.append(row)
    return rows


def _image_task(root: Path, name: str, rng: np.random.Generator, queries: int, hub: bool) -> list[dict]:
    rows = image_rows(name, rng, queries)
    folder = root / ("ziyjiang/MMEB_Test_Instruct" if hub else "image-tasks")
    write_table(folder / name / "test-00000-of-00001.parquet", rows)
    pictures = {path for row in rows for path in [row["qry_img_path"], *row["tgt_img_path"]] if path}
    for path in sorted(pictures):
        write_file(root / "image-tasks" / path, picture(rng))
    return rows


def document_tables(name: str, rng: np.random.Generator, queries: int) -> dict[str, list[dict]]:
    """Queries, corpus with pictures inside, and graded qrels with scores of 0 and pairs named twice."""
    if name.startswith("VisRAG"):  # ids are file names, some very long
        pages = [
            f"{words(rng, 2).replace(' ', '_')}_{'x' * int(rng.integers(0, 70))}{i}.png" for i in range(queries + 4)
        ]
    elif name.startswith("ViDoRe"):
        pages = list(range(queries + 4))
    else:
        pages = [f"{words(rng, 1)}_{i}" for i in range(queries + 4)]
    ids = list(range(queries)) if name.startswith("ViDoRe") else [f"q{i}" for i in range(queries)]
    qrels = []
    for number, query in enumerate(ids):
        for place in [number, *rng.choice(len(pages), 2, replace=False).tolist()]:
            score = 1 if place == number else int(rng.integers(0, 4))
            qrels.append({"query-id": query, "corpus-id": pages[place], "score": score})
    return {
        "queries": [{"query-id": query, "query": f"{words(rng, 5)}?", "language": "english"} for query in ids],
        "corpus": [{"corpus-id": page, "image": {"bytes": picture(rng), "path": None}} for page in pages],
        "qrels": qrels,
    }


def picture_name(name: str, page: object) -> str:
    """The file of a page below the task's picture folder."""
    if not name.startswith("VisRAG"):
        return f"{page}.png"
    stem, _, ending = str(page).rpartition(".")
    return f"{stem[:50]}_{hashlib.md5(str(page).encode()).hexdigest()[:8]}.{ending}"


def _document_task(root: Path, name: str, rng: np.random.Generator, queries: int, hub: bool) -> dict[str, list[dict]]:
    """Half of the pages lie in the picture folder, the others in the corpus file alone."""
    local, repository, split = DOCUMENTS[name]
    tables = document_tables(name, rng, queries)
    folder = root / repository if hub else root / "visdoc-tasks" / local
    for subset, rows in tables.items():
        write_table(folder / (f"data/{subset}.parquet" if hub else f"{subset}/{split}-00000-of-00001.parquet"), rows)
    if hub:
        write_readme(folder, {subset: {split: f"data/{subset}.parquet"} for subset in tables})
    pictures = root / "visdoc-tasks" / (f"{name}-fixed" if hub and repository.endswith("-fixed") else name)
    for row in tables["corpus"][::2]:
        write_file(pictures / picture_name(name, row["corpus-id"]), row["image"]["bytes"])
    return tables


def write_readme(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """A data set card whose front matter says which files are which split of which subset."""
    lines = ["---", "configs:"]
    for subset, splits in configs.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {json.dumps(path)}" for split, path in splits.items()]
    (folder / "README.md").write_text("\n".join([*lines, "---", "", "# Card", ""]))


def write_table(path: Path, rows: list[dict]) -> None:
    """A parquet or JSONL file, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def picture(rng: np.random.Generator) -> bytes:
    """A PNG of 28 x 28 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), count))
