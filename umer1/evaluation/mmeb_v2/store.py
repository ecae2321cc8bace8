"""The folder of an evaluation: what is kept of each side of each task, and how a later run knows that it is there.

settings.json                        what all vectors depend on
vectors/TASK_qry_gen.npz             embeddings (vectors.py)
responses/TASK_qry_gen.jsonl         what was generated, in gen mode
sides/TASK_qry_gen.json              for which inputs, in how many seconds, and what was left out; written last
parts/TASK_qry_gen/                  of a side that is not finished (parts.py)

coverage/ and scored/ beside them are a run's memory of the disk (memory.py).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.encode import Side
from umer1.evaluation.mmeb_v2.parts import Done, Parts
from umer1.evaluation.mmeb_v2.vectors import load_vectors, save_vectors
from umer1.files import write_json, write_json_lines


@dataclass(frozen=True, slots=True)
class Stored:
    """A finished side."""

    keys: list  # of the inputs that have an embedding, in order: query numbers or candidate names
    embeddings: np.ndarray  # float32 [len(keys), H]
    lost: dict  # key -> cause, of inputs that turned out unusable
    seconds: float
    responses: dict[str, Any] | None  # what the responses were like; None in disc mode


class Store:
    """Only rank 0 writes and reads.  model_sha256: of the model that the vectors are of."""

    def __init__(self, folder: str | Path, model_sha256: str):
        self.folder, self.model_sha256 = Path(folder), model_sha256

    def parts(self, side: Side) -> Parts:
        return Parts(self.folder / "parts" / side.name, side.identity)

    def has(self, side: Side) -> bool:
        """Whether the side is finished; UserError where it is, but for other inputs."""
        path = self._record_path(side.name)
        if not path.exists() or not self.vectors_path(side.name).exists():
            return False
        if self._record(side.name)["identity"] != side.identity:
            raise UserError(
                f"{path} is of another version of the data, or of what was there when other media were missing; "
                "use another --output"
            )
        return True

    def is_there(self, name: str) -> bool:
        """Whether a side of this name is finished, whatever its inputs."""
        return self._record_path(name).exists()

    def finish(self, side: Side, done: Done) -> None:
        """Write the side's files from all its results (by position), then drop its parts."""
        lines = [item.response for item in done.encoded if item.response is not None]
        if side.mode == "gen":
            write_json_lines(self.folder / "responses" / f"{side.name}.jsonl", lines)
        save_vectors(
            self.vectors_path(side.name),
            [side.keys[item.position] for item in done.encoded],
            np.array([item.embedding for item in done.encoded] or np.zeros((0, 0)), dtype=np.float32),
            model=self.model_sha256,
            data=side.fingerprint,
            mode=side.mode,
        )
        lost = [[side.keys[entry.line - 1], asdict(entry)] for entry in done.bad]
        record = {
            "identity": side.identity,
            "inputs": len(side.inputs),
            "seconds": done.seconds,
            "responses": _summary(lines) if side.mode == "gen" else None,
            "lost": lost,
        }
        write_json(self._record_path(side.name), record)
        self.parts(side).remove()

    def read(self, name: str, data: str, mode: str) -> Stored:
        """The finished side `name` of data version `data`; UserError naming what is damaged or does not fit."""
        record = self._record(name)
        keys, embeddings = load_vectors(self.vectors_path(name), model=self.model_sha256, data=data, mode=mode)
        return Stored(keys, embeddings, record["lost"], record["seconds"], record["responses"])

    def vectors_path(self, name: str) -> Path:
        return self.folder / "vectors" / f"{name}.npz"

    def _record_path(self, name: str) -> Path:
        return self.folder / "sides" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any]:
        """identity, seconds, responses, and lost: key -> cause."""
        path = self._record_path(name)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {
                "identity": record["identity"],
                "seconds": float(record["seconds"]),
                "responses": record["responses"],
                "lost": {key: entry["cause"] for key, entry in record["lost"]},
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the record of a task's side ({error!r}); remove it") from None


def _summary(lines: list[dict]) -> dict[str, Any]:
    """What the responses of a side were like."""
    lines = [response for line in lines for response in (line, *line.get("others", []))]
    count = max(len(lines), 1)
    return {
        "count": len(lines),
        "tokens": sum(line["num_tokens"] for line in lines),
        "missing_gen_emb": sum(line["missing_gen_emb"] for line in lines),
        "format_rate": sum(line["well_formed"] for line in lines) / count,
    }
