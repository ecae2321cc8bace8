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
    try:
        arrays = read_arrays(path)
        embeddings, about = arrays["embeddings"], json.loads(arrays["about"].tobytes())
        for name, value in {"model": model, "data": data, "mode": mode}.items():
            if about[name] != value:
                raise ValueError(f"{name} {about[name]}, not {value}")
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != len(about["keys"]):
            raise ValueError("the embeddings are not float32, one for each key")
        return about["keys"], embeddings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the vectors asked for ({error}); remove it to have it made anew, or use another --output"
        ) from None
