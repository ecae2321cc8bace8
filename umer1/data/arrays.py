"""Arrays of an .npz file that may be damaged."""

from pathlib import Path

import numpy as np


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every array by name, no Python objects; OSError or ValueError where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except OSError:
        raise
    except Exception as error:  # a flipped bit makes zipfile, zlib and numpy's reader of headers raise nearly any type
        raise ValueError(f"damaged: {type(error).__name__}: {error}") from None
