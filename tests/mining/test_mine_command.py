"""`umer1 mine` on a tiny model: scores of plain transformers, kills, ranks, and a training run on what it wrote."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import SFT, run_in_forks
from sft_reference import Reference, write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.errors import UserError
from umer1.files import alone_in
from umer1.mining.mine import main
from umer1.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model, data): 16 pairs, two of which ask the same and two of which have one answer."""
    folder = tmp_path_factory.mktemp("mine")
    model, data = make_tiny_directory(folder / "model", layers=2), write_pairs(folder / "data", count=16)
    records = json.loads(data.read_text())
    records[5]["qry"], records[9]["pos"] = records[2]["qry"], records[4]["pos"]
    records[7]["neg"] = [records[0]["pos"]]
    data.write_text(json.dumps(records))
    return model, data


def arguments(case, output: Path, *flags: str) -> list[str]:
    model, data = case
    base = ["--model", str(model), "--input", str(data), "--output", str(output), "--fp32", "--num-negatives", "3"]
    return [*base, *flags]


@pytest.mark.parametrize("mode", ["disc", "gen"])
def test_negatives_are_those_of_transformers_vectors(case, tmp_path, mode, capsys):
    model, data = case
    output = tmp_path / "out.json"
    main(arguments(case, output, "--mode", mode, "--relative-margin", "0.02"))
    records, mined = json.loads(data.read_text()), json.loads(output.read_text())
    reference = Reference(model)
    with torch.no_grad():
        sides = [[reference.side(data.parent, record[name])[mode] for record in records] for name in ("qry", "pos")]
    scores = (torch.stack(sides[0]).double() @ torch.stack(sides[1]).double().T).numpy()
    contents = [
        json.dumps([r["pos"].get("image"), r["pos"].get("video"), r["pos"]["conversations"][0]]) for r in records
    ]
    asked = [json.dumps(record["qry"]) for record in records]
    places = {json.dumps(record["pos"]): place for place, record in reversed(list(enumerate(records)))}
    for row, (before, after) in enumerate(zip(records, mined, strict=True)):
        assert {name: after[name] for name in ("dataset_name", "qry", "pos")} == {
            name: before[name] for name in ("dataset_name", "qry", "pos")
        }
        given = before.get("neg", [])
        assert after.get("neg", [])[: len(given)] == given
        right = {contents[other] for other in range(len(records)) if asked[other] == asked[row]}
        bound = scores[row, row] - 0.02 * abs(scores[row, row])
        best = {}
        for place, content in enumerate(contents):
            if content not in right and scores[row, place] <= bound:
                best[content] = max(best.get(content, -2.0), scores[row, place])
        want = sorted(best.values(), reverse=True)[:3]
        new = [places[json.dumps(side)] for side in after.get("neg", [])[len(given) :]]
        got = [scores[row, place] for place in new]
        if not given:  # a negative that was there already is not written twice
            np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"pair {row}")
        assert not {contents[place] for place in new} & right
    account = json.loads(Path(f"{output}.mining.json").read_text())
    assert account["total"]["pairs"] == 16 and account["settings"]["mode"] == mode
    assert "mean score of the positives" in capsys.readouterr().out


def mine_on_rank(argv: list[str]) -> None:
    main(argv)


def test_two_ranks_write_what_one_writes(case, tmp_path):
    main(arguments(case, tmp_path / "one.json"))
    run_distributed(mine_on_rank, 2, arguments(case, tmp_path / "two.json"))
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert not (tmp_path / "two.json.parts").exists()


def mine_another_file(folder: str, argv: list[str]) -> str:
    with pytest.raises(UserError) as error, contextlib.chdir(f"{folder}/{os.environ['RANK']}"):
        main([*argv, "--input", "pairs.json"])
    return str(error.value)


def test_ranks_that_read_other_files_are_refused(case, tmp_path):
    """Copies on two machines, one of them of another day: places of one rank would be other pairs on the next."""
    records = json.loads(case[1].read_text())
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "pairs.json").write_text(json.dumps(records[rank:]))
    said = run_distributed(mine_another_file, 2, str(tmp_path), arguments(case, tmp_path / "out.json"))
    assert said == ["pairs.json is not the same on all machines; give all ranks one file"] * 2


def test_killed_and_started_again(case, tmp_path):
    main(arguments(case, tmp_path / "whole.json", "--save-every", "2", "--max-tokens-per-batch", "200"))
    output = tmp_path / "killed.json"
    flags = arguments(case, output, "--save-every", "2", "--max-tokens-per-batch", "200")
    command = [sys.executable, "-m", "umer1.cli", "mine", *flags]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    first = Path(f"{output}.parts") / "qry" / "00000.npz"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists() and first.exists()
    kept = first.read_bytes()
    main(flags)
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert kept and not first.exists()


def test_a_second_run_of_the_same_output_is_refused(case, tmp_path):
    """Two would write their parts over each other's, and sides that were lost would count as not embedded."""
    (tmp_path / "out.json.parts").mkdir()
    with alone_in(tmp_path / "out.json.parts"), pytest.raises(UserError, match="parts is in use by another run"):
        main(arguments(case, tmp_path / "out.json"))


def test_training_reads_what_was_written(case, tmp_path):
    model, data = case
    output = tmp_path / "mined.jsonl"
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in json.loads(data.read_text())))
    main(
        [
            "--model",
            str(model),
            "--input",
            str(lines),
            "--data-root",
            str(data.parent),
            "--output",
            str(output),
            "--fp32",
        ]
    )
    flags = ["--hf-model", str(model), "--fp32", "--save", str(tmp_path / "run"), "--data-path", str(output)]
    flags += ["--data-root", str(data.parent), *"--global-batch-size 8 --micro-batch-size 4 --train-iters 2".split()]
    done = run_in_forks(SFT, flags)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [step["hard_negatives"] for step in steps] and all(step["hard_negatives"] > 0 for step in steps)


def test_bad_records_are_refused_or_counted_and_stay(case, tmp_path):
    model, data = case
    records = json.loads(data.read_text())
    records[3] = {"dataset_name": "toy", "qry": 7}
    records[6]["qry"] = {**records[6]["qry"], "image": "media/none.png"}
    records[6]["qry"]["conversations"][0]["value"] = "<image>" + records[6]["qry"]["conversations"][0]["value"]
    unfinished = "<think>no end of it"  # disc mode does not read it, but training would, in each pair that got it
    records[11]["pos"]["conversations"][1]["value"] = unfinished
    bad = data.parent / "bad.json"
    bad.write_text(json.dumps(records))
    with pytest.raises(UserError, match="1 of 16 records are not SFT pairs"):
        main(arguments((model, bad), tmp_path / "out.json"))
    main(arguments((model, bad), tmp_path / "out.json", "--skip-bad-inputs"))
    mined = json.loads((tmp_path / "out.json").read_text())
    assert mined[3] == records[3] and mined[6] == records[6] and mined[11] == records[11]
    assert json.dumps(mined).count(unfinished) == 1 and sum(len(record.get("neg", [])) for record in mined) > 10
    total = json.loads((tmp_path / "out.json.mining.json").read_text())["total"]
    assert total["not_pairs"] == 1 and total["pairs_without_embedding"] == 2 and total["pairs"] == 15


def test_wrong_settings_are_said_together(case, tmp_path):
    with pytest.raises(UserError) as error:
        main(["--num-negatives", "0", "--skip-top", "200", "--relative-margin", "-1", "--output", str(tmp_path)])
    for words in ("--input is required", "num_negatives=0", "skip_top=200", "relative_margin=-1", "is a directory"):
        assert words in str(error.value)
