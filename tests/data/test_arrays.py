"""An .npz file with any one bit flipped, or cut anywhere, is read or refused: no other error comes of it."""

import numpy as np
import pytest

from umer1.data.arrays import read_arrays


def test_any_damage_ends_in_one_of_two_errors(tmp_path):
    path = tmp_path / "a.npz"
    whole = {"a": np.arange(3, dtype=np.int64), "b": np.frombuffer(b"{}", dtype=np.uint8)}
    np.savez(path, **whole)
    found = read_arrays(path)
    assert found.keys() == whole.keys() and all((found[name] == whole[name]).all() for name in whole)
    content, refused = path.read_bytes(), 0
    flipped = [content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :] for i in range(len(content))]
    for damaged in [*flipped, *(content[:end] for end in range(0, len(content), 5)), b"\x93NUMPY", b"text"]:
        path.write_bytes(damaged)
        try:
            read_arrays(path)
        except (OSError, ValueError):
            refused += 1
    assert refused > len(content) // 4
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none.npz")
