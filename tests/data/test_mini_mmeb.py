"""mini-MMEB: files like real data's, reproducible, answers truly held out, a teacher that errs as often as it says."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from umer1.data import prompts
from umer1.data.dataset import PairDataset
from umer1.data.images import ImageConfig
from umer1.data.mini_base import mini_base_path
from umer1.data.mini_mmeb import make_mini_mmeb
from umer1.data.mini_tasks import HOP_TASKS, NUM_ANSWERS, TASKS, Teacher, is_held_out, sample_board, sample_question
from umer1.data.processor import Processor
from umer1.errors import ConfigError, UserError
from umer1.models.qwen2_vl.directory import HFDirectory

SMALL = dict(num_train_pairs=160, num_eval_queries=12)
BRACKETS = re.compile(r"<answer>(.*)<gen_emb>$")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mini_mmeb(tmp_path_factory.mktemp("mini") / "mini_mmeb", **SMALL)


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_accepted_by_the_data_pipeline(root):
    directory = HFDirectory.open(mini_base_path())
    images = ImageConfig.from_settings(directory.config.vision, directory.image_settings, directory.video_settings)
    processor = Processor(directory.tokenizer, directory.special, directory.config, images)
    dataset = PairDataset(root / "train.json", root, processor)
    assert len(dataset) == SMALL["num_train_pairs"]
    assert sorted(dataset.names) == sorted(f"mini-{task}" for task in TASKS)
    for index in range(len(dataset)):
        pair = dataset[index]
        for side in (pair.query, pair.positive):
            assert side.input_ids[side.gen_index] == directory.special.gen_emb
            assert len(side) < 80, "a side must be short enough for two CPU cores"


def test_one_cell_is_one_vision_token(root):
    """No picture is resized: the patch grid has the drawn tiles."""
    directory = HFDirectory.open(mini_base_path())
    images = ImageConfig.from_settings(directory.config.vision, directory.image_settings, directory.video_settings)
    processor = Processor(directory.tokenizer, directory.special, directory.config, images)
    dataset = PairDataset(root / "train.json", root, processor)
    grids = {}
    for index in range(len(dataset)):
        pair = dataset[index]
        grids.setdefault(pair.dataset, set()).add(tuple(pair.query.grid_thw[0].tolist()))
    assert grids == {
        "mini-img": {(1, 6, 6)},
        "mini-doc": {(1, 8, 4)},
        "mini-vid": {(2, 4, 4)},
        "mini-look": {(1, 4, 6)},
    }


def test_sft_records_have_the_real_format(root):
    for record in json.loads((root / "train.json").read_text()):
        for side in (record["qry"], record["pos"]):
            human, gpt = (turn["value"] for turn in side["conversations"])
            assert human.endswith(f"\n{prompts.DISC_EMB}\n{prompts.SUFFIX}")
            assert human.startswith("<image>") == ("image" in side)
            assert human.startswith("<video>") == ("video" in side)
            assert prompts.has_format(gpt) and gpt.endswith("<gen_emb>")


def test_pictures_are_real_png_files_and_none_is_missing_or_left_over(root):
    named = set()
    for record in json.loads((root / "train.json").read_text()):
        for side in (record["qry"], record["pos"]):
            named |= {side.get("image"), *side.get("video", [])}
    for path in root.glob("eval/*/*.jsonl"):
        for record in lines(path):
            named |= {record.get("image"), *record.get("video", [])}
    named.discard(None)
    assert named == {str(path.relative_to(root)) for path in root.rglob("*.png")}
    for name in named:
        with Image.open(root / name) as picture:
            assert picture.format == "PNG" and picture.mode == "RGB"


def test_same_settings_give_the_same_files_and_are_reused(root, tmp_path):
    told = []
    again = make_mini_mmeb(tmp_path / "again", progress=told.append, **SMALL)
    assert files(again) == files(root)
    assert any("50%" in message for message in told)
    stamp = (again / "manifest.json").stat().st_mtime_ns
    make_mini_mmeb(again, progress=told.append, **SMALL)
    assert (again / "manifest.json").stat().st_mtime_ns == stamp
    assert "reusing" in told[-1]


def test_another_seed_gives_other_training_pairs_and_the_same_evaluation(root, tmp_path):
    other = files(make_mini_mmeb(tmp_path / "other", seed=1, **SMALL))
    first = files(root)
    evaluation = [name for name in first if "eval" in name.parts and name.suffix in (".png", ".jsonl")]
    assert evaluation and all(other[name] == first[name] for name in evaluation)
    train = next(name for name in first if name.name == "train.json")
    assert other[train] != first[train]


def test_other_settings_replace_and_foreign_directories_are_refused(tmp_path):
    target = make_mini_mmeb(tmp_path / "mini", **SMALL)
    make_mini_mmeb(target, **SMALL | {"num_train_pairs": 40})
    assert len(json.loads((target / "train.json").read_text())) == 40
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a generated mini-MMEB"):
        make_mini_mmeb(foreign, **SMALL)
    assert (foreign / "chapter.txt").exists()
    with pytest.raises(ConfigError, match="(?s)max_hops=99.*slip_rate=2"):
        make_mini_mmeb(tmp_path / "bad", slip_rate=2, max_hops=99)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini", "thesis"], "nothing may be left behind"


def test_a_failure_leaves_no_half_directory(tmp_path, monkeypatch):
    def full(path, picture):
        raise OSError("no space left on device")

    monkeypatch.setattr("umer1.data.mini_mmeb.save_png", full)
    with pytest.raises(OSError, match="no space"):
        make_mini_mmeb(tmp_path / "mini", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_files(root):
    meta = json.loads((root / "eval" / "meta.json").read_text())
    assert {name: task["metric"] for name, task in meta["tasks"].items()} == {
        "mini-img": "hit@1",
        "mini-doc": "ndcg@5",
        "mini-vid": "hit@1",
        "mini-look": "hit@1",
    }
    for name, task in meta["tasks"].items():
        queries, candidates = (lines(root / "eval" / task[part]) for part in ("queries", "candidates"))
        ids = [candidate["id"] for candidate in candidates]
        assert len(set(ids)) == len(ids) == task["num_candidates"]
        assert len(queries) == task["num_queries"] == SMALL["num_eval_queries"]
        assert all(query["label"] in ids for query in queries)
        if name != "mini-look":
            assert len(candidates) == NUM_ANSWERS, "the pool is every answer"
            answers = [query["groups"]["answer"] for query in queries]
            assert answers.count("unseen") == len(queries) // 4
            assert {query["groups"]["hops"] for query in queries} <= set("01234")


def test_held_out_answers_never_are_answers_in_training(root):
    meta = json.loads((root / "eval" / "meta.json").read_text())
    records = json.loads((root / "train.json").read_text())
    for task in HOP_TASKS:
        said = {
            BRACKETS.search(side["conversations"][1]["value"]).group(1).strip()
            for record in records
            if record["dataset_name"] == f"mini-{task}"
            for side in (record["qry"], record["pos"])
        }
        queries = lines(root / "eval" / meta["tasks"][f"mini-{task}"]["queries"])
        unseen = {query["solution"] for query in queries if query["groups"]["answer"] == "unseen"}
        assert unseen and said and not (unseen & said)
        assert sum(is_held_out(task, answer) for answer in range(NUM_ANSWERS)) == 12


@pytest.mark.parametrize("task", HOP_TASKS)
def test_careful_traces_lead_to_the_answer(task):
    """Each step is `from to left`; the steps join up, count down to zero and end at the answer that the board shows."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        board = sample_board(rng, task)
        question = sample_question(rng, task, board, (1, 4), Teacher(), None)
        steps = [step.split() for step in question.query.think.split(" left,")[:-1]]
        assert len(steps) == question.hops
        assert [left for *_, left in steps] == ["three", "two", "one", "zero"][-question.hops :]
        assert all(first[1] == second[0] for first, second in zip(steps, steps[1:], strict=False))
        assert question.query.summary == question.target.summary
        cell = board.keys.index(question.answer // 8)
        assert board.digits[cell] == question.answer % 8


def test_the_teacher_errs_as_often_as_it_says():
    rng = np.random.default_rng(0)
    count, teacher = 4000, Teacher(slip_rate=0.2, miscount_rate=0.3, terse_rate=0.4)
    board = sample_board(rng, "img")

    def share(hops, happened, teacher):
        asked = [sample_question(rng, "img", board, (hops, hops), teacher, None) for _ in range(count)]
        return np.mean([happened(question) for question in asked])

    def terse(question):
        return question.query.think == " guess"

    def short(question):
        return not terse(question) and question.query.think.count(" left,") < question.hops

    def wrong(question):
        return question.query.summary != question.target.summary

    tolerance = 4 * 0.5 / count**0.5
    assert share(4, terse, teacher) == pytest.approx(0.4, abs=tolerance)
    assert share(4, short, teacher) == pytest.approx(0.6 * 0.3, abs=tolerance)
    assert share(2, wrong, Teacher(slip_rate=0.2)) == pytest.approx(0.2, abs=tolerance)
    assert share(1, terse, teacher) == share(3, short, teacher) == share(0, wrong, teacher) == 0
    assert share(4, wrong, Teacher(terse_rate=1.0)) == 0, "a terse trace states the right answer"
