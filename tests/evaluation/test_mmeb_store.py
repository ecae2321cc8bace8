"""A finished side on disk: there, gone, or damaged."""

import numpy as np
import pytest

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.encode import Side
from umer1.evaluation.mmeb_v2.parts import Done
from umer1.evaluation.mmeb_v2.store import Store
from umer1.inference.inputs import Input
from umer1.inference.runner import Encoded


def test_damaged_vectors_are_named_and_made_anew_once_they_are_removed(tmp_path):
    inputs = [Input(str(number), "text", (), (), number + 1) for number in range(2)]
    side = Side("MSVD", "qry", "disc", [0, 1], inputs, "f" * 64, "identity", generates=False)
    rows = np.eye(2, 4, dtype=np.float32)
    store = Store(tmp_path, "m" * 64)
    assert not store.has(side)
    store.finish(side, Done([Encoded(number, str(number), rows[number], None) for number in range(2)], [], 1.0))
    assert store.has(side)
    np.testing.assert_array_equal(store.read(side.name, side.fingerprint, side.mode).embeddings, rows)
    with pytest.raises(UserError, match=f"data {'f' * 64}, not {'0' * 64}.; use another --output"):
        store.read(side.name, "0" * 64, side.mode)
    path = store.vectors_path(side.name)
    content = bytearray(path.read_bytes())
    content[200] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"MSVD_qry_disc.npz cannot be read \(damaged.*once it is removed"):
        store.read(side.name, side.fingerprint, side.mode)
    record = tmp_path / "sides" / f"{side.name}.json"
    whole = record.read_text()
    for old, new in (('"seconds": 1.0', '"seconds": []'), ('"lost": []', '"lost": [0]'), ('"identity"', '"id"')):
        record.write_text(whole.replace(old, new))
        with pytest.raises(UserError, match="not the record of a task's side"):
            store.has(side)
    record.write_text(whole)
    path.unlink()
    assert not store.has(side)
