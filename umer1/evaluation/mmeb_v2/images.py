"""The 36 image tasks: one row a query with its own candidates, the first of which is right.

Columns of MMEB_Test_Instruct: qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text [C], tgt_img_path [C].  Texts are
joined as the reference evaluation joins them for its own models, less the media tokens: `image_cls` keeps the
instruction's outer blanks, `image_qa` and `image_i2i` do not, and a blank before a line break goes except in text-only
queries.
"""

from collections.abc import Callable
from typing import Any

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.fields import numbered_rows, text_field, texts_field
from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec

PLACES = ("image-tasks", "ziyjiang/MMEB_Test_Instruct", "MMEB_Test_Instruct")  # annotation: the repository, the hub's
FOLDERS = ("image-tasks", "image-tasks/MMEB")  # pictures: where the archive is unpacked to, with its own folder or not
_TOKEN = "<|image_1|>"
_COLUMNS = {
    "image_cls": ("qry_inst", "qry_text", "qry_img_path", "tgt_text"),
    "image_qa": ("qry_inst", "qry_text", "qry_img_path", "tgt_text"),
    "image_i2t": ("qry_inst", "qry_text", "qry_img_path", "tgt_text"),
    "image_t2i": ("qry_inst", "qry_text", "tgt_inst", "tgt_text", "tgt_img_path"),
    "image_i2i": ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path"),
}

_GROUPS = {
    "I-CLS": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    "I-QA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
    "I-RET": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ OVEN EDIS"
    ),
    "I-GD": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
_LAYOUTS = {
    "image_cls": _GROUPS["I-CLS"],
    "image_qa": _GROUPS["I-QA"],
    "image_i2t": "MSCOCO_i2t VisualNews_i2t",
    "image_t2i": "VisDial MSCOCO_t2i VisualNews_t2i WebQA EDIS Wiki-SS-NQ",
    "image_i2i": f"CIRR NIGHTS OVEN FashionIQ {_GROUPS['I-GD']}",
}
_OUT_OF_DOMAIN = (
    "Place365 ImageNet-A ImageNet-R ObjectNet Country211 ScienceQA GQA TextVQA VizWiz FashionIQ Wiki-SS-NQ OVEN EDIS "
    "RefCOCO RefCOCO-Matching Visual7W-Pointing"
)


def _spec(name: str, group: str) -> TaskSpec:
    layout = next(layout for layout, names in _LAYOUTS.items() if name in names.split())
    return TaskSpec(name, "image", group, "local", "hit@1", layout, name not in _OUT_OF_DOMAIN.split())


IMAGE_TASKS = tuple(_spec(name, group) for group, names in _GROUPS.items() for name in names.split())


def read_images(spec: TaskSpec, tree: MediaTree, num_frames: int) -> TaskData:
    """Queries in the rows' order; candidates distinct by name, in order of first appearance."""
    annotation = tree.annotation(PLACES, subset=spec.name, split="test")
    queries: list[Query] = []
    candidates: dict[str, Candidate] = {}
    for where, row in numbered_rows(annotation, _COLUMNS[spec.layout]):
        names, make = _targets(spec.layout, row, where, tree)
        for place, name in enumerate(names):
            if name not in candidates:
                candidates[name] = Candidate(name, make(place))
        names = tuple(candidates[name].name for name in names)  # one string for a name, whatever the number of rows
        queries.append(Query(_query_item(spec.layout, row, where, tree), names, names[:1]))
    return TaskData(spec, queries, list(candidates.values()), annotation.fingerprint)


def _query_item(layout: str, row: dict[str, Any], where: str, tree: MediaTree) -> Item:
    instruction, text = (text_field(row, column, where) for column in ("qry_inst", "qry_text"))
    instruction = instruction.replace(_TOKEN, "")
    if layout == "image_t2i":
        return Item(f"{instruction} {text}".strip())
    if layout in ("image_qa", "image_i2i"):
        instruction = instruction.strip()
    return tree.image_item(_join(instruction, text), [_picture(tree, text_field(row, "qry_img_path", where))])


def _targets(layout: str, row: dict[str, Any], where: str, tree: MediaTree) -> tuple[list[str], Callable[[int], Item]]:
    """(names [C], place -> Item) of a row's candidates."""
    texts = texts_field(row, "tgt_text", where)
    if layout in ("image_cls", "image_qa", "image_i2t"):
        return texts, lambda place: Item(texts[place].strip())
    paths = texts_field(row, "tgt_img_path", where)
    if len(paths) != len(texts):
        raise UserError(f"{where} has {len(texts)} tgt_text and {len(paths)} tgt_img_path; they must be as many")
    instruction = text_field(row, "tgt_inst", where).replace(_TOKEN, "")
    captions = bool(texts[0].strip())  # the first one speaks for the row, as in the reference

    def item(place: int) -> Item:
        text = f"{instruction} {texts[place]}" if captions else instruction
        return tree.image_item(_join(text, ""), [_picture(tree, paths[place])])

    if layout == "image_t2i":
        return paths, item
    # Several objects of one picture are candidates of RefCOCO-Matching: the caption is part of the name.
    return [f"{path}:{text.strip(chr(34))}" for path, text in zip(paths, texts, strict=True)], item


def _join(instruction: str, text: str) -> str:
    return (f"{instruction} {text}" if text else instruction).replace(" \n", "\n").strip()


def _picture(tree: MediaTree, path: str) -> str:
    """Where a picture lies below the root; in the first folder, by name, where it lies nowhere."""
    places = [f"{folder}/{path}" for folder in FOLDERS]
    return next((place for place in places if tree.has_file(place)), places[0])
