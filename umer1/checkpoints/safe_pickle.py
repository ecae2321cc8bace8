"""The two pickled files of a torch_dist checkpoint, opened by an unpickler that can build nothing else.

torch reads `.metadata` with plain pickle and megatron reads `common.pt` with its own list of permitted classes.  Before
either does, the same bytes go through the unpickler below, which knows a handful of passive classes and refuses every
other name; after that the plain readers can only do the same.
"""

import io
import pickle
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any

Names = Set[tuple[str, str]]
_DCP = "torch.distributed.checkpoint"
_METADATA_GLOBALS = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((f"{_DCP}.metadata", name) for name in ("TensorProperties", "TensorStorageMetadata", "ChunkStorageMetadata")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}
# common.pt: its tensors are never built here, so that the names need only stand for nothing.
_STORAGES = ("FloatStorage", "DoubleStorage", "BFloat16Storage", "HalfStorage", "LongStorage", "IntStorage")
_COMMON_STAND_INS = {("torch._utils", "_rebuild_tensor_v2"), *(("torch", name) for name in _STORAGES)}
_MAX_PICKLE_BYTES = 1 << 30
_ENCRYPTED = 1  # flag of a zip archive's member
# Element types are plain constants of torch: "torch float32".
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
_DTYPES |= {"float8_e4m3fn", "float8_e5m2"}


def _nothing(*args: Any) -> None:
    return None


class _Unpickler(pickle.Unpickler):
    """Builds `permitted` classes, gives nothing for `stand_ins` and for tensors' data, and refuses the rest."""

    def __init__(self, data: bytes, permitted: Names = frozenset(), stand_ins: Names = frozenset()):
        super().__init__(io.BytesIO(data))
        self.permitted, self.stand_ins = permitted | {("collections", "OrderedDict")}, stand_ins

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.stand_ins:
            return _nothing
        if (module, name) in self.permitted or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of umer1 contains")

    def persistent_load(self, pid: Any) -> None:
        return None


def check_pickles(directory: Path, files: set[str]) -> None:
    """Raise ValueError if `.metadata` or `common.pt` holds more than passive data or points out of `files`."""
    metadata = _load(".metadata", _Unpickler(_read_metadata(directory / ".metadata"), permitted=_METADATA_GLOBALS))
    _load("common.pt", _Unpickler(_read_common(directory / "common.pt"), stand_ins=_COMMON_STAND_INS))
    try:
        kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
        places = {str(info.relative_path) for info in metadata.storage_data.values()}
    except (AttributeError, TypeError) as error:  # passive, and something else
        raise ValueError(f".metadata is not a checkpoint's ({error})") from error
    if kinds - {"TensorStorageMetadata"}:
        # Other entries are pickled objects inside the shards, which torch would load without a check.
        raise ValueError(f".metadata lists entries that are not tensors ({', '.join(sorted(kinds))})")
    if outside := places - files:
        raise ValueError(f".metadata points to files that the manifest does not list: {', '.join(sorted(outside)[:4])}")


def _read_metadata(path: Path) -> bytes:
    if not path.is_file() or path.stat().st_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"{path.name} is missing or has more than {_MAX_PICKLE_BYTES} bytes")
    return path.read_bytes()


def _read_common(path: Path) -> bytes:
    """The pickle inside a torch file, which is a zip archive of stored (not compressed) members."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
            plain = [m for m in members if m.compress_type == zipfile.ZIP_STORED and not m.flag_bits & _ENCRYPTED]
            if len(members) != 1 or plain != members or members[0].file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"{path.name} is not a torch file")
            return archive.read(members[0])
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is not a torch file ({error})") from error


def _load(name: str, unpickler: _Unpickler) -> Any:
    try:
        return unpickler.load()
    except Exception as error:  # a hostile pickle can make the unpickler fail in any way
        raise ValueError(f"{name} is refused: {error}") from error
