"""Pickles of float arrays, opened by an unpickler that can build nothing else.

The reference evaluation keeps its vectors as pickles: an array [N, D], or a dictionary name -> array [D].  Here no name
in a pickle is looked up: a handful of them have stand-ins, made anew for each file, that only note what they are given;
arrays are built afterwards, from shapes, types and bytes that have been checked.  Every other name is refused.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from umer1.errors import UserError

_MAX_BYTES = 16 << 30
_FLOATS = ("f2", "f4", "f8")
# What pickle writes for dictionaries, strings, numbers and arrays, protocols 0 to 5.  The list keeps out extensions,
# persistent ids and classes that are called by other ways than REDUCE.
_OPCODES = set(
    "PROTO FRAME MARK STOP POP GLOBAL STACK_GLOBAL REDUCE BUILD NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST "
    "APPEND APPENDS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE".split()
)


def load_array(path: str | Path) -> np.ndarray:
    """float32 [N, D] from a pickled array; UserError naming the file where it holds anything else."""
    return _read(path, _array)


def load_named_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> float32 [D] from a pickled dictionary of arrays; UserError naming the file."""

    def convert(value: Any) -> dict[str, np.ndarray]:
        if not isinstance(value, dict) or not all(isinstance(name, (str, int)) for name in value):
            raise ValueError("it is not a dictionary of arrays by name")
        return {str(name): _array(array) for name, array in value.items()}

    return _read(path, convert)


def _read(path: str | Path, convert: Any) -> Any:
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        data = path.read_bytes()
        _check_opcodes(data)
        return convert(_Unpickler(io.BytesIO(data)).load())
    except Exception as error:  # a hostile pickle can make the unpickler fail in any way
        raise UserError(f"{path}: not a pickle of plain float arrays ({error})") from None


def _check_opcodes(data: bytes) -> None:
    """ValueError for operations that arrays do not need, lengths beyond the file, and places a table would grow to."""
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise ValueError(f"{opcode.name} at byte {position} is not needed for arrays")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument) <= len(data):
            raise ValueError(f"{opcode.name} {argument} at byte {position} is out of range")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.known[module, name]


class _Noted:
    """An array or its type as the pickle describes it."""

    __slots__ = ("given", "state")

    def __init__(self, *given: Any):
        self.given, self.state = given, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_ins() -> dict[tuple[str, str], Any]:
    """New ones for each file: what a pickle does to them ends with it."""

    def latin1(text: str, encoding: str) -> bytes:  # how protocols below 3 write bytes
        if encoding != "latin1":
            raise ValueError(f"encoding {encoding!r}")
        return text.encode("latin1")

    class Type(_Noted):
        __slots__ = ()

    class Empty(_Noted):  # _reconstruct(ndarray, (0,), b"b"), then its state
        __slots__ = ()

    class Buffer(_Noted):  # _frombuffer(bytes, type, shape, order)
        __slots__ = ()

    found: dict[tuple[str, str], Any] = {("numpy", "dtype"): Type, ("numpy", "ndarray"): None}
    found["_codecs", "encode"] = latin1
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray", "_reconstruct"] = Empty
        found[f"{core}.numeric", "_frombuffer"] = Buffer
    return found


def _array(noted: Any) -> np.ndarray:
    """float32, from the note of an array; ValueError where it is none of floats."""
    if not isinstance(noted, _Noted):
        raise ValueError(f"there is a {type(noted).__name__} where an array belongs")
    if type(noted).__name__ == "Buffer":
        raw, kind, shape, order = noted.given
        fortran = order == "F"
    else:
        _, shape, kind, fortran, raw = noted.state
    if not isinstance(kind, _Noted) or kind.given[0] not in _FLOATS or kind.state[1] not in "<>=|":
        raise ValueError("there is an array that is not of floats")
    dtype = np.dtype(kind.state[1] + kind.given[0])
    if not isinstance(raw, (bytes, bytearray)) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("there is an array without plain bytes or sizes")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"there is an array of shape {tuple(shape)} with {len(raw)} bytes")
    rows = np.frombuffer(raw, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(rows, dtype=np.float32, order="C")
