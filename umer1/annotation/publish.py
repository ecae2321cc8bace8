"""The finished data set: SFT shards, the RL file, what was left out and why, and a manifest; all of it or nothing."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from umer1.annotation.answers import Fault
from umer1.annotation.samples import SIDES, Broken, Sample, human_turn
from umer1.atomic_directory import aside_path, publish
from umer1.data.dataset import PairDataset
from umer1.data.prompts import MARKERS
from umer1.data.schema import Side
from umer1.errors import UserError
from umer1.files import write_json

RL_FILE, FILTERED_FILE, MANIFEST_FILE = "rl.jsonl", "filtered.jsonl", "manifest.json"
AskedSide = tuple[Sample, str, Side]  # the name is one of SIDES
Respond = Callable[[list[AskedSide]], list[str | Fault]]
_TOGETHER = 256  # pairs whose answers are judged together: work for many cores, a few MB of text


class Counts:
    """Pairs read, kept and filtered by cause, for each data set."""

    def __init__(self):
        self.table: dict[str, dict[str, Any]] = {}
        self.last_detail = ""  # of a pair that was filtered

    def add(self, dataset: str, what: str, cause: str | None = None, detail: str = "") -> None:
        """One more pair: sft, rl or repeats_rl as `what` says; filtered where there is a cause."""
        row = self.table.setdefault(dataset, {"read": 0, "sft": 0, "rl": 0, "repeats_rl": 0, "filtered": Counter()})
        row["read"] += 1
        if cause is None:
            row[what] += 1
        else:
            row["filtered"][cause] += 1
            self.last_detail = detail

    def lines(self) -> list[str]:
        """For people, a line for each data set."""
        found = []
        for name, row in self.table.items():
            causes = ", ".join(f"{cause} {count}" for cause, count in row["filtered"].most_common()) or "none"
            kept = f"{row['sft']:,} for SFT, {row['rl']:,} for RL"
            found.append(f"{name}: {row['read']:,} pairs read, {kept}; filtered: {causes}")
        return found


def publish_dataset(
    destination: Path,
    samples: Iterable[Sample | Broken],
    respond: Respond,
    rl: list[Sample],
    apart: set[str],
    *,
    data_root: str | Path,
    pairs_per_shard: int,
    manifest: dict[str, Any],
) -> Counts:
    """Write everything beside `destination` and give it that name in one step.

    respond: the response of each side, or why there is none.
    apart: contents of the pairs that stay out of the SFT files: those of `rl`, and what else was kept for its choice.
    Raises UserError when no SFT pair is left: nothing changes.
    """
    counts, aside = Counts(), aside_path(destination)
    aside.mkdir(parents=True)
    try:
        drawn = {sample.content(): sample.id for sample in rl}
        shards = _Shards(aside, pairs_per_shard)
        with _lines(aside / FILTERED_FILE) as filtered:
            samples, left_out = iter(samples), drawn.keys() | apart
            while some := list(islice(samples, _TOGETHER)):
                responses = iter(respond(_asked_sides(some, left_out)))
                for sample in some:
                    record = _sft_record(sample, responses, drawn, apart, counts, filtered)
                    if record is not None:
                        shards.add(record)
        shards.close()
        if not shards.paths and not rl:
            last = f" (the last time: {counts.last_detail})" if counts.last_detail else ""
            raise UserError(f"no pair is left: {'; '.join(counts.lines())}{last}. Nothing was written")
        for path in shards.paths:
            check_shard(path, data_root)
        if rl:
            with _lines(aside / RL_FILE) as file:
                for sample in rl:
                    file(rl_record(sample))
        manifest |= {
            "datasets": {name: {**row, "filtered": dict(row["filtered"])} for name, row in counts.table.items()}
        }
        manifest["rl_modalities"] = dict(Counter(sample.modality for sample in rl))
        manifest["files"] = [_described(path) for path in sorted(aside.glob("*.jsonl"))]  # a large one has an index
        write_json(aside / MANIFEST_FILE, manifest)
        publish(aside, destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def _asked_sides(samples: list[Sample | Broken], left_out: set[str]) -> list[AskedSide]:
    """The sides of those pairs that may be in the SFT files."""
    return [
        (sample, *named)
        for sample in samples
        if isinstance(sample, Sample) and sample.content() not in left_out
        for named in sample.sides()
    ]


def _sft_record(
    sample: Sample | Broken,
    responses: Iterator[str | Fault],
    drawn: dict[str, str],
    apart: set[str],
    counts: Counts,
    filtered: Callable[[dict], None],
) -> dict | None:
    """The pair as the SFT file has it; None, counted and listed, when it goes elsewhere.

    responses: the next two are this pair's, where it may be in the SFT file.
    """

    def leave_out(cause: str, detail: str, side: str | None = None) -> None:
        counts.add(sample.dataset, "filtered", cause, detail)
        filtered({"id": sample.id, "dataset": sample.dataset, "side": side, "cause": cause, "detail": detail})

    if isinstance(sample, Broken):
        leave_out(sample.cause, sample.detail)
        return None
    if (owner := drawn.get(sample.content())) is not None:
        counts.add(sample.dataset, "rl" if owner == sample.id else "repeats_rl")
        return None
    if sample.content() in apart:
        leave_out("not_chosen", "a pair of --rl-from that RL does not take")
        return None
    record: dict[str, Any] = {"dataset_name": sample.dataset}
    for (name, side), response in [(named, next(responses)) for named in sample.sides()]:
        if isinstance(response, Fault):
            leave_out(response.cause, response.detail, name)
            return None
        turns = [{"from": "human", "value": human_turn(side)}, {"from": "gpt", "value": response}]
        record[name] = _media(side) | {"conversations": turns}
    counts.add(sample.dataset, "sft")
    return record


def _media(side: Side) -> dict[str, Any]:
    """`image` and `video` as a data file has them; absent where there is none."""
    found: dict[str, Any] = {}
    if side.images:
        found["image"] = side.images[0] if len(side.images) == 1 else list(side.images)
    if side.videos:
        found["video"] = list(side.videos[0]) if len(side.videos) == 1 else [list(frames) for frames in side.videos]
    return found


def rl_record(sample: Sample) -> dict[str, Any]:
    """A pair as the RL file has it."""
    record: dict[str, Any] = {"dataset": sample.modality, "dataset_name": sample.dataset}
    for name, side in sample.sides():
        media = _media(side)
        record |= {f"{name}_text": side.text, f"{name}_image": media.get("image", "")}
        record[f"{name}_video"] = media.get("video", [""])
    return record | {"solution": sample.positive.text}


class _Shards:
    """sft-00000.jsonl, sft-00001.jsonl, ... of at most `size` pairs each."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        self.paths: list[Path] = []
        self._file, self._held = None, 0

    def add(self, record: dict) -> None:
        if self._file is None or self._held == self.size:
            self.close()
            self.paths.append(self.folder / f"sft-{len(self.paths):05d}.jsonl")
            # half a surrogate pair, which a file's name may hold, stays the escape that it was
            self._file, self._held = open(self.paths[-1], "w", encoding="utf-8", errors="backslashreplace"), 0
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._held += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@contextmanager
def _lines(path: Path):
    """A function that writes a record as one line."""
    with open(path, "w", encoding="utf-8") as file:
        yield lambda record: file.write(json.dumps(record, ensure_ascii=True) + "\n")


def check_shard(path: Path, data_root: str | Path) -> None:
    """Read every pair back as training does: form, markers against media."""
    pairs = PairDataset(path, data_root)
    for index in range(len(pairs)):
        pair = pairs.read(index)
        for name, side in zip(SIDES, (pair.query, pair.positive), strict=True):
            markers = MARKERS.findall(side.text)
            assert markers == ["<image>"] * len(side.images) + ["<video>"] * len(side.videos), (path, index, name)
    pairs.close()


def _described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with open(path, "rb") as file:
        records = sum(1 for _ in file)
    return {"name": path.name, "bytes": path.stat().st_size, "records": records, "sha256": digest}
