"""Where each tensor of a directory lies, from the headers of its safetensors files; nothing is executed or trusted.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data
(https://github.com/huggingface/safetensors, "Format").
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from umer1.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # floating types in which weights are accepted
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a weight file: dtype in safetensors' words ("F32", "BF16", "F16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def scan_weights(path: Path) -> dict[str, TensorEntry]:
    """Name -> TensorEntry over all weight files of directory `path`; a UserError lists everything that is wrong."""
    if (path / INDEX_NAME).is_file():
        weight_map = _read_index(path / INDEX_NAME)
        files = sorted(set(weight_map.values()))
    elif (path / SINGLE_NAME).is_file():
        weight_map, files = {}, [SINGLE_NAME]
    else:
        raise UserError(f"{path} has no {SINGLE_NAME} and no {INDEX_NAME}.{_pickle_hint(path)}")
    problems: list[str] = []
    found: dict[str, TensorEntry] = {}
    for name in files:
        file = path / name
        if not file.is_file():
            problems.append(f"{name}, named by {INDEX_NAME}, is missing")
            continue
        try:
            entries = read_header(file)
        except UserError as error:
            problems.append(str(error))
            continue
        for tensor, entry in entries.items():
            if weight_map and weight_map.get(tensor) != name:
                continue  # the index decides which file a tensor is read from
            found[tensor] = entry
    absent = [tensor for tensor in weight_map if tensor not in found and (path / weight_map[tensor]).is_file()]
    if absent and not problems:
        problems.append(f"{INDEX_NAME} names tensors that their files do not hold: {', '.join(sorted(absent)[:8])}")
    if problems:
        raise UserError(f"{path}: the weights cannot be read:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return found


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file; checks the header against the file's size.  Raises UserError."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{file.name} is not a whole safetensors file (its header cannot be read)")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries, spans = {}, []
        for name, item in header.items():
            begin, end = item["data_offsets"]
            shape = tuple(int(extent) for extent in item["shape"])
            if item["dtype"] in DTYPE_BYTES and end - begin != prod(shape) * DTYPE_BYTES[item["dtype"]]:
                raise ValueError(f"{name}: {end - begin} bytes do not make {item['dtype']} {list(shape)}")
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{name} reaches beyond the end of the file (truncated download?)")
            entries[name] = TensorEntry(file, item["dtype"], shape)
            spans.append((begin, end))
        place = 0
        for begin, end in sorted(spans):
            if begin != place:
                raise ValueError(f"its tensors do not follow one another (bytes {place} to {begin})")
            place = end
        if place != size - 8 - length:
            raise ValueError(f"{size - 8 - length - place} bytes behind the last tensor belong to none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file.name} has a corrupt safetensors header: {error}") from error
    return entries


def _read_index(file: Path) -> dict[str, str]:
    """weight_map of an index file; every file name must stay in the index's own directory."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(target) for name, target in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a safetensors index (a JSON object with weight_map): {error!r}.") from error
    if not pairs:
        raise UserError(f"{file} names no tensor.")
    bad = sorted({t for t in pairs.values() if Path(t).name != t or "\\" in t or not t.endswith(".safetensors")})
    if bad:
        raise UserError(
            f"{file} names {', '.join(map(repr, bad[:8]))}; only *.safetensors files in the directory itself are read."
        )
    return pairs


def _pickle_hint(path: Path) -> str:
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return (
            " Its weights are pickled (.bin/.pt), which can execute code and is not read; save it as safetensors with "
            "transformers: model.save_pretrained(DIR)."
        )
    return ""
