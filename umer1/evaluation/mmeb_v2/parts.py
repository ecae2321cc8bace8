"""What is done of one side of a task while the rest is still being encoded: files that a killed run leaves behind.

    OUTPUT/parts/TASK_qry_gen/00000.npz, 00001.npz, ...   removed once the side's vectors are written

Plain arrays and JSON, each file whole or not at all.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from umer1.data.arrays import read_arrays
from umer1.errors import UserError
from umer1.files import atomic_path
from umer1.inference.inputs import BadInput
from umer1.inference.runner import Encoded


@dataclass(slots=True)
class Done:
    """Results so far, in no order, and the seconds they took."""

    encoded: list[Encoded] = field(default_factory=list)
    bad: list[BadInput] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: "Done") -> None:
        self.encoded += other.encoded
        self.bad += other.bad
        self.seconds += other.seconds

    def positions(self) -> set[int]:
        """Of the inputs that need no more work; a bad input's line is its position + 1."""
        return {item.position for item in self.encoded} | {entry.line - 1 for entry in self.bad}


class Parts:
    """The part files of one side; only rank 0 touches them.

    identity: what they must have been made for (model, data, settings); files of something else are refused.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity

    def read(self) -> Done:
        """All of them; UserError naming a file that is damaged or of something else."""
        done = Done()
        for path in self._files():
            done.add(self._read(path))
        return done

    def write(self, done: Done) -> None:
        """One file more."""
        records = {
            "identity": self.identity,
            "ids": [item.id for item in done.encoded],
            "responses": [item.response for item in done.encoded],
            "bad": [asdict(entry) for entry in done.bad],
            "seconds": done.seconds,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / f"{len(self._files()):05d}.npz") as aside, open(aside, "wb") as file:
            np.savez(
                file,
                positions=np.array([item.position for item in done.encoded], dtype=np.int64),
                embeddings=np.array([item.embedding for item in done.encoded], dtype=np.float32),
                records=np.frombuffer(json.dumps(records).encode(), dtype=np.uint8),
            )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.npz"))

    def _read(self, path: Path) -> Done:
        try:
            arrays = read_arrays(path)
            positions, embeddings = arrays["positions"].tolist(), arrays["embeddings"]
            records = json.loads(arrays["records"].tobytes())
            if records["identity"] != self.identity:
                raise ValueError("it is of another version of the data, or of other inputs")
            rows = zip(positions, records["ids"], embeddings, records["responses"], strict=True)
            bad = [BadInput(**entry) for entry in records["bad"]]
            return Done([Encoded(*row) for row in rows], bad, float(records["seconds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a part of this work ({error}); remove {path.parent}") from None
