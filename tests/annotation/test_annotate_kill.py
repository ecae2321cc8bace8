"""1,000 pairs, a teacher that fails, stalls and answers nonsense, kill -9 in between: nothing lost, nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from annotation_world import dataset, flags, read_lines, write_world
from data_tools import make_processor
from teacher_server import Teacher, kind_of_text

from umer1.annotation.config import InputFile
from umer1.annotation.media import Library
from umer1.annotation.samples import side_key
from umer1.annotation.sources import read_samples
from umer1.data.dataset import PairDataset
from umer1.data.media import MediaRoot

CONCURRENCY = 16
CAUSES = {"good": None, "empty": "format", "forged": "format", "refused": "refused"}


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "umer1.cli", "annotate", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_and_resumed(tmp_path):
    inputs = write_world(tmp_path, mmeb=800, hound=50, pages=150)
    library = Library(MediaRoot(tmp_path), num_frames=8, folder="embedded")
    samples = list(read_samples([InputFile(**item) for item in inputs], library))
    texts = {side_key(side): side.text for sample in samples for _, side in sample.sides()}
    assert len(samples) == 1000 and len(texts) == 2000
    seed = time.time_ns()
    with Teacher(fail=0.1, stall=0.004, stall_seconds=15, seed=seed) as teacher:
        more = ["--concurrency", str(CONCURRENCY), "--request-timeout-seconds", "5", "--pairs-per-shard", "300"]
        arguments = flags(
            tmp_path, inputs, teacher.url, *more, "--progress-seconds", "0.2", "--output-token-price", "2"
        )
        journal = tmp_path / "out" / "journal.jsonl"
        lost, before = set(), {}
        for lines in (500, 1200):
            process = start(arguments)
            wait_for_lines(journal, lines, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (tmp_path / "out" / "dataset").exists()
            time.sleep(0.1)  # what the server had begun to answer is counted
            assert {text: teacher.asked[text] for text in before} == before, seed
            known = {texts[record["key"]] for record in complete_lines(journal)[1:]}
            on_the_way = {text for text in teacher.answered if text not in known}
            assert len(on_the_way) <= 2 * CONCURRENCY, seed
            lost |= on_the_way
            before = {text: teacher.asked[text] for text in known}
        with open(journal, "ab") as file:
            file.write(b'{"key": "torn')
        process = start(arguments)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    assert {text: teacher.asked[text] for text in before} == before, seed  # answered before the kill: not asked again
    assert teacher.fates["stall"] > 0 and sum(teacher.fates.values()) - teacher.fates["answer"] > 100, teacher.fates
    twice = {text for text, count in teacher.answered.items() if count > 1}
    assert twice <= lost, seed  # answers that never arrived: their reader was dead
    assert len({record["key"] for record in read_lines(journal)[1:]}) == len(read_lines(journal)) - 1 == 2000

    sft, filtered, manifest = dataset(tmp_path)
    expected = {}
    for sample in samples:
        kinds = [kind_of_text(side.text) for _, side in sample.sides()]
        bad = next((kind for kind in kinds if kind != "good"), None)
        expected[sample.id] = bad and CAUSES.get(bad, bad)
    assert {entry["id"]: entry["cause"] for entry in filtered} == {i: cause for i, cause in expected.items() if cause}
    assert len(sft) == sum(cause is None for cause in expected.values()) == 1000 - len(filtered)
    assert sum(row["read"] for row in manifest["datasets"].values()) == 1000
    assert [entry["records"] for entry in manifest["files"] if entry["name"].startswith("sft")][0] == 300
    assert "ETA" in said and "cost" in said and "/s" in said

    processor = make_processor()
    for path in sorted((tmp_path / "out" / "dataset").glob("sft-*.jsonl")):
        pairs = PairDataset(path, tmp_path, processor)
        for index in range(0, len(pairs), 10):
            assert pairs[index].query.gen_index > 0 and pairs[index].positive.gen_index > 0
    assert all("_of_box|>" not in str(record) for record in sft)


def complete_lines(path: Path) -> list[dict]:
    """A journal's records, as a reader who knows nothing of it sees them: a torn last line is none."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
