"""`umer1 eval --benchmark mmeb-v2` end to end: the mini model on generated folders of the published layout."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mmeb_folders
import numpy as np
import pytest

from umer1.data.mini_mmeb import MINI_BASE
from umer1.errors import ConfigError, UserError
from umer1.evaluation.command import main
from umer1.evaluation.mmeb_v2 import memory
from umer1.files import alone_in
from umer1.testing import run_distributed

TASKS = ["VOC2007", "MSCOCO_t2i", "MVBench", "MSVD", "QVHighlight", "ViDoRe_docvqa", "ViDoSeek-doc"]
SEED = random.randrange(2**31)
GEN = ["--query-mode", "gen", "--target-mode", "gen", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmeb")
    mmeb_folders.make_folders(root, TASKS, seed=SEED)
    return root


def command(data, output, *flags, tasks=TASKS):
    return [
        *("--benchmark", "mmeb-v2", "--model", str(MINI_BASE), "--data-root", str(data), "--output", str(output)),
        *("--tasks", *tasks, "--fp32", *flags),
    ]


def run(data, output, *flags, tasks=TASKS):
    main(command(data, output, *flags, tasks=tasks))


def results(folder, stem="results"):
    return json.loads((Path(folder) / f"{stem}.json").read_text())


def files(folder):
    """Content of all files but those with seconds in them."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    named = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {name: content for name, content in named.items() if not name.startswith(("sides/", "results"))}


def without_seconds(found):
    return {name: {**entry, "seconds": None} for name, entry in found["tasks"].items()}


def test_all_ways_of_scoring_and_the_reference_files(data, tmp_path, capsys):
    """disc and gen run into one folder; its vectors give every pair of modes, its files the same scores again."""
    out = tmp_path / "out"
    run(data, out, tasks=TASKS[4:])
    run(data, out, tasks=TASKS[:4])  # the folder's results are those of both runs
    disc = results(out)
    assert list(disc["tasks"]) == TASKS, SEED
    assert "difference" in capsys.readouterr().out
    assert disc["columns"]["All"] == {"score": None, "tasks": 7, "of": 78}
    run(data, out, *GEN)
    gen = results(out)
    assert results(out, "results_disc-disc") == disc and results(out, "results_gen-gen") == gen
    main(
        ["--benchmark", "mmeb-v2", "--data-root", str(data), "--stored", str(out), "--output", str(tmp_path / "again")]
    )
    for scoring, run_results in (("disc-disc", disc), ("gen-gen", gen)):
        again = results(tmp_path / "again", f"results_{scoring}")
        assert without_seconds(again) == without_seconds(run_results), SEED
    shutil.copytree(data, tmp_path / "bare", ignore=shutil.ignore_patterns("*.png", "*.jp*g"))
    words = ["--data-root", str(tmp_path / "bare"), "--stored", str(out), "--output", str(tmp_path / "bare-again")]
    main(["--benchmark", "mmeb-v2", *words, "--tasks", *sorted(set(TASKS) - {"QVHighlight"})])
    for name, entry in results(tmp_path / "bare-again", "results_gen-gen")["tasks"].items():
        assert entry == results(tmp_path / "again", "results_gen-gen")["tasks"][name], (SEED, name)
    scores = {name: results(tmp_path / "again", f"results_{name}")["tasks"] for name in ("oracle", "disc-gen")}
    for name in TASKS:
        least = max(disc["tasks"][name]["score"], gen["tasks"][name]["score"])
        assert scores["oracle"][name]["score"] >= least - 1e-12, (SEED, name)
    adaptive = results(tmp_path / "again", "results_adaptive")["tasks"]
    text = (tmp_path / "again" / "results_adaptive.txt").read_text()
    assert all(f"\n{words} " in text for words in ("always disc", "price 0.1", "always gen", "oracle")), text
    for name in TASKS:
        section = adaptive[name]["adaptive"]
        assert section["scores"]["gen"] == gen["tasks"][name]["score"] and 0 < section["reasoned"] <= 1
        seconds = section["seconds_per_query"]
        assert seconds["adaptive"] == pytest.approx(seconds["disc"] + section["reasoned"] * seconds["gen"])
        assert section["scores"]["adaptive"] == adaptive[name]["score"] and seconds["disc"] > 0
    for flags in ([], ["--unpickle"]):
        read = tmp_path / f"read{len(flags)}"
        main(["--benchmark", "mmeb-v2", "--from-reference", str(out), "--output", str(read), *flags])
        for name, entry in results(read, "results_disc-disc")["tasks"].items():
            assert entry["metrics"] == pytest.approx(disc["tasks"][name]["metrics"], abs=1e-9), (SEED, name)


def test_two_ranks_give_what_one_gives(data, tmp_path):
    run(data, tmp_path / "one", *GEN)
    run_distributed(run, 2, data, tmp_path / "two", *GEN)
    for path in sorted((tmp_path / "one" / "vectors").iterdir()):
        with np.load(path) as one, np.load(tmp_path / "two" / "vectors" / path.name) as two:
            assert bytes(one["about"]) == bytes(two["about"]), (SEED, path.name)
            np.testing.assert_allclose(two["embeddings"], one["embeddings"], atol=2e-6, err_msg=f"{SEED} {path.name}")


def test_killed_and_started_again_gives_the_same_files(data, tmp_path):
    """kill -9 as soon as a part of a side is saved; the second run takes it over."""
    flags, out = [*GEN, "--save-every", "2", "--max-sequences", "2"], tmp_path / "killed"
    run(data, tmp_path / "whole", *flags)
    words = [sys.executable, "-m", "umer1.cli", "eval", *command(data, out, *flags)]
    child = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("parts/MSVD_*/*.npz")):
        assert child.poll() is None and time.monotonic() < deadline, SEED
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "vectors" / "ViDoSeek-doc_tgt_gen.npz").exists()
    run(data, out, *flags)
    whole, again = files(tmp_path / "whole"), files(out)
    assert whole.keys() == again.keys()
    assert [name for name in whole if whole[name] != again[name]] == [], SEED
    with pytest.raises(UserError, match="max_new_tokens: 4 there, 5 now"):
        run(data, out, *flags, "--max-new-tokens", "5")


def stop_midway(data, output, *flags):
    """Like `run`, but the second rank fails at its third batch."""
    import umer1.inference.embedders as embedders

    made, embed = [], embedders.DiscEmbedder.embed

    def failing(self, items, prompts):
        made.append(items)
        if os.environ["RANK"] == "1" and len(made) == 3:
            raise FloatingPointError("a broken rank")
        return embed(self, items, prompts)

    embedders.DiscEmbedder.embed = failing
    try:
        run(data, output, *flags)
    except UserError as error:
        return str(error)
    finally:
        embedders.DiscEmbedder.embed = embed


UNEVEN = "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2", UNEVEN])
def test_a_rank_that_fails_ends_all_and_another_layout_goes_on(data, tmp_path, layout):
    run(data, tmp_path / "whole")
    flags, out = ["--save-every", "2", "--max-sequences", "2"], tmp_path / "out"
    messages = run_distributed(stop_midway, 2, data, out, *flags)
    assert all("rank 1 of 2 failed: FloatingPointError: a broken rank" in message for message in messages), messages
    assert not (out / "vectors" / "ViDoSeek-doc_tgt_disc.npz").exists()
    run_distributed(run, 2 if layout else 1, data, out, *flags, *layout.split())
    for path in sorted((tmp_path / "whole" / "vectors").iterdir()):
        with np.load(path) as one, np.load(out / "vectors" / path.name) as two:
            assert bytes(one["about"]) == bytes(two["about"]), (SEED, path.name)
            np.testing.assert_allclose(two["embeddings"], one["embeddings"], atol=2e-6, err_msg=f"{SEED} {path.name}")
    whole, again = results(tmp_path / "whole"), results(out)
    for name in TASKS:
        assert again["tasks"][name]["num_queries"] == whole["tasks"][name]["num_queries"], (SEED, name)


def test_vllm_gives_what_torch_gives(data, tmp_path):
    pytest.importorskip("vllm")
    tasks, flags = ["VOC2007", "MSVD"], [*GEN, "--max-input-tokens", "1024"]
    run(data, tmp_path / "torch", *flags, tasks=tasks)
    run(data, tmp_path / "vllm", *flags, "--engine", "vllm", tasks=tasks)
    for path in sorted((tmp_path / "torch" / "responses").iterdir()):
        assert path.read_bytes() == (tmp_path / "vllm" / "responses" / path.name).read_bytes(), (SEED, path.name)
    for path in sorted((tmp_path / "torch" / "vectors").iterdir()):
        with np.load(path) as one, np.load(tmp_path / "vllm" / "vectors" / path.name) as two:
            cosines = (one["embeddings"] * two["embeddings"]).sum(1)
            assert cosines.min() >= 0.99999, (SEED, path.name)


def test_missing_media_refuse_or_are_counted(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    mmeb_folders.make_folders(data, ["MSCOCO_t2i", "VOC2007"], seed=SEED)
    gone, corrupt = sorted((data / "image-tasks" / "VOC2007").glob("*.png"))[:2]
    gone.unlink()
    check = ["--benchmark", "mmeb-v2", "--data-root", str(data), "--tasks", "VOC2007", "MSCOCO_t2i", "--check"]
    for words in (check, command(data, out, tasks=["VOC2007", "MSCOCO_t2i"])):
        with pytest.raises(UserError, match=r"missing in 1 of 2 tasks.*--allow-missing(.|\n)*VOC2007: 1 of 3 queries"):
            main(words)
    assert "incomplete" in capsys.readouterr().out
    assert not (out / "vectors").exists()
    main([*check, "--allow-missing"])
    corrupt.write_bytes(corrupt.read_bytes()[:-40])  # its header is sound: only decoding shows it
    run(data, out, "--allow-missing", tasks=["VOC2007"])
    entry = results(out)["tasks"]["VOC2007"]
    assert entry["num_queries"] == 1, SEED
    causes = entry["coverage"]["left_out_queries"]
    assert causes == {"missing_media": 1, "corrupt_image": 1}, SEED
    assert "VOC2007" in results(out)["notes"][0]


def test_names_that_are_no_unicode_ties_and_sides_of_which_nothing_is_left(tmp_path):
    """Half a surrogate pair is left out and counted; a name twice ranks twice; no query left is one message."""
    data, out = tmp_path / "data", tmp_path / "out"
    rng = np.random.default_rng(SEED)
    mmeb_folders.write_file(data / "image-tasks/日本 🦤.png", mmeb_folders.picture(rng))
    row = {"qry_inst": "", "qry_text": "", "qry_img_path": "日本 🦤.png"}
    rows = [row | {"tgt_text": texts} for texts in (["é", "e\u0301", "é", "\ud800"], ["\ud800", "é"], ["one"])]
    mmeb_folders.write_table(data / "image-tasks/GQA/test.jsonl", rows)
    long = row | {"qry_inst": "word " * 20_000, "tgt_text": ["é", "one"]}
    mmeb_folders.write_table(data / "image-tasks/OK-VQA/test.jsonl", [long])
    for _ in range(2):  # the second one reads what the first one wrote
        run(data, out, "--allow-missing", tasks=["GQA"])
        coverage = results(out)["tasks"]["GQA"]["coverage"]
        assert coverage["left_out_candidates"] == {"bad_record": 1}
        assert coverage["left_out_queries"] == {"no_right_candidate": 1}
    first, second = [json.loads(line) for line in (out / "GQA_disc_disc_pred.jsonl").read_text().splitlines()]
    assert sorted(first["prediction"]) == ["e\u0301", "é", "é"] and second["prediction"] == ["one"]
    with pytest.raises(UserError, match="OK-VQA: nothing is left to be scored"):
        run(data, out, "--allow-missing", tasks=["OK-VQA"])


def test_a_picture_whose_name_is_no_unicode_in_gen_mode(tmp_path):
    """A name of bytes that are no UTF-8: it seeds the response and stands in the file of responses."""
    data, out, name = tmp_path / "data", tmp_path / "out", os.fsdecode(b"\xff.png")
    mmeb_folders.write_file(data / "image-tasks" / name, mmeb_folders.picture(np.random.default_rng(SEED)))
    row = {"qry_inst": "", "qry_text": "", "qry_img_path": name, "tgt_inst": "", "tgt_text": [""]}
    mmeb_folders.write_table(data / "image-tasks/CIRR/test.jsonl", [row | {"tgt_img_path": [name]}])
    run(data, out, *GEN, tasks=["CIRR"])
    (line,) = (out / "responses" / "CIRR_tgt_gen.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == f"CIRR/tgt/{name}:"


def test_media_that_vanish_after_the_look_refuse_the_run(tmp_path, monkeypatch):
    data = tmp_path / "data"
    mmeb_folders.make_folders(data, ["VOC2007"], seed=SEED)

    def survey(*arguments):
        found = memory.survey(*arguments)
        next((data / "image-tasks" / "VOC2007").glob("*.png")).unlink()
        return found

    monkeypatch.setattr("umer1.evaluation.mmeb_v2.command.survey", survey)
    with pytest.raises(UserError, match="media are missing in 1 of 1 tasks"):
        run(data, tmp_path / "out", tasks=["VOC2007"])


@pytest.mark.parametrize("flags, message", ((["--model", "absent"], "absent is"), (["--min-pixels", "0"], "pixels=0")))
def test_a_model_that_cannot_be_used_is_said_before_the_data_is_looked_at(data, tmp_path, capsys, flags, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, *flags)
    assert "coverage" not in capsys.readouterr().err


def test_ctrl_c_says_that_it_goes_on(data, tmp_path, monkeypatch, capsys):
    def survey(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("umer1.evaluation.mmeb_v2.command.survey", survey)
    with pytest.raises(SystemExit, match="130"):
        run(data, tmp_path)
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


def test_settings_of_a_run_that_came_to_nothing_bind_no_other(data, tmp_path):
    run(data, tmp_path, tasks=["VOC2007"])  # in disc mode
    flags = ["--query-mode", "gen", "--max-new-tokens", "2", "--missing-gen-emb"]  # the base writes no <gen_emb>
    with pytest.raises(UserError, match="3 of 3 inputs cannot be embedded"):
        run(data, tmp_path, *flags, "error", tasks=["VOC2007"])
    run(data, tmp_path, *flags, "disc", tasks=["VOC2007"])
    with pytest.raises(UserError, match="missing_gen_emb: 'disc' there, 'append' now"):
        run(data, tmp_path, *flags, "append", tasks=["VOC2007"])


def test_results_of_another_benchmark_are_not_overwritten(data, tmp_path):
    (tmp_path / "results.json").write_text('{"benchmark": "mini"}')
    with pytest.raises(UserError, match="a results.json that is of no MMEB-V2 run"):
        run(data, tmp_path, tasks=["VOC2007"])
    assert (tmp_path / "results.json").read_text() == '{"benchmark": "mini"}'


def test_a_second_run_into_one_folder_is_refused(data, tmp_path):
    with alone_in(tmp_path), pytest.raises(UserError, match="in use by another run"):
        run(data, tmp_path)


@pytest.mark.parametrize(
    "flags, messages",
    (
        (["--check", "--stored", "{data}"], ["check and stored are set; choose one"]),
        (["--stored", "{data}", "--from-reference", "{data}"], ["stored and from_reference are set; choose one"]),
        (["--unpickle"], ["unpickle needs --from-reference"]),
        (["--from-reference", "{data}", "--output", "{data}/"], ["is what is scored; name another directory"]),
        (["--stored", "{data}", "--max-queries", "2"], ["max_queries=2 is for runs of a model"]),
        (["--data-root", "~/no", "--stored", "nil"], ["data_root=~/no is not a dir", "stored=nil is not a dir"]),
    ),
)
def test_settings_that_do_not_go_together(data, tmp_path, flags, messages):
    with pytest.raises(ConfigError) as error:
        run(data, tmp_path, *(flag.format(data=data) for flag in flags))
    for message in messages:
        assert message in str(error.value)


@pytest.mark.thorough
def test_all_tasks(tmp_path):
    mmeb_folders.make_folders(tmp_path / "data", seed=SEED)
    main(
        ["--benchmark", "mmeb-v2", "--model", str(MINI_BASE), "--data-root", str(tmp_path / "data"), "--fp32"]
        + ["--output", str(tmp_path / "out")]
    )
    found = results(tmp_path / "out")
    assert len(found["tasks"]) == 78 and found["columns"]["All"]["score"] is not None, SEED
