"""Embeddings of one side of a task on disk: plain arrays, and what they were made for."""

import json
from pathlib import Path

import numpy as np

from umer1.data.arrays import read_arrays
from umer1.errors import UserError
from umer1.files import atomic_path


def save_vectors(path: str | Path, keys: list, embeddings: np.ndarray, *, model: str, data: str, mode: str) -> None:
    """Write `embeddings` float32 [N, H] of `keys` (query numbers or candidate names) to `path` (.npz)."""
    about = json.dumps({"keys": keys, "model": model, "data": data, "mode": mode})
    with atomic_path(path) as aside, open(aside, "wb") as file:
        np.savez(file, embeddings=embeddings, about=np.frombuffer(about.encode(), dtype=np.uint8))


def load_vectors(path: str | Path, *, model: str, data: str, mode: str) -> tuple[list, np.ndarray]:
    """(keys, embeddings); UserError naming a file that is damaged, or of another model, data version or mode."""
    wanted = {"model": model, "data": data, "mode": mode}
    try:
        arrays = read_arrays(path)
        embeddings, about = arrays["embeddings"], json.loads(arrays["about"].tobytes())
        there, keys = {name: about[name] for name in wanted}, about["keys"]
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != len(keys):
            raise ValueError("the embeddings are not float32, one for each key")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); once it is removed, the next run makes it anew") from None
    differ = [f"{name} {there[name]}, not {value}" for name, value in wanted.items() if there[name] != value]
    if differ:
        raise UserError(f"{path}: not the vectors asked for ({'; '.join(differ)}); use another --output")
    return keys, embeddings
