"""mini-MMEB: files like real data's, reproducible, answers truly held out, a teacher that errs as often as it says."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umer1.data import prompts
from umer1.data.dataset import PairDataset
from umer1.data.images import ImageConfig
from umer1.data.mini_mmeb import MINI_BASE, make_mini_mmeb
from umer1.data.mini_tasks import (
    HOP_TASKS,
    NUM_ANSWERS,
    NUMBERS,
    TASKS,
    Teacher,
    digit_word,
    is_held_out,
    key_word,
    sample_board,
    sample_question,
)
from umer1.data.processor import Processor
from umer1.data.rl_dataset import PromptDataset
from umer1.errors import ConfigError, UserError
from umer1.models.qwen2_vl.directory import HFDirectory

SMALL = dict(num_train_pairs=160, num_eval_queries=12, num_rl_pairs=60, num_rl_eval_pairs=64)
RL_FILES = ("rl.json", "rl_eval.json")
BRACKETS = re.compile(r"<answer>(.*)<gen_emb>$")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mini_mmeb(tmp_path_factory.mktemp("mini") / "mini_mmeb", **SMALL)


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rl_records(root, names=RL_FILES):
    return [record for name in names for record in json.loads((root / name).read_text())]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_accepted_by_the_data_pipeline(root):
    directory = HFDirectory.open(MINI_BASE)
    images = ImageConfig.of_directory(directory)
    processor = Processor(directory.tokenizer, directory.special, directory.config, images)
    dataset = PairDataset(root / "train.json", root, processor)
    assert len(dataset) == SMALL["num_train_pairs"]
    assert sorted(dataset.names) == sorted(f"mini-{task}" for task in TASKS)
    for index in range(len(dataset)):
        pair = dataset[index]
        for side in (pair.query, pair.positive):
            assert side.input_ids[side.gen_index] == directory.special.gen_emb
            assert len(side) < 80, "a side must be short enough for two CPU cores"


@pytest.mark.parametrize("name, tasks, count", [("rl.json", HOP_TASKS, 60), ("rl_eval.json", TASKS, 64)])
def test_every_rl_record_is_accepted_by_the_data_pipeline(root, name, tasks, count):
    directory = HFDirectory.open(MINI_BASE)
    images = ImageConfig.of_directory(directory)
    dataset = PromptDataset(
        root / name, root, Processor(directory.tokenizer, directory.special, directory.config, images)
    )
    share = count // len(tasks)
    assert len(dataset) == count and Counter(dataset.name_ids.tolist()) == dict.fromkeys(range(len(tasks)), share)
    assert dataset.names == tuple(f"mini-{task}" for task in tasks)
    pairs = [dataset[index] for index in range(count)]
    assert {len(prompt.images) for pair in pairs for prompt in (pair.query, pair.positive)} == {0, 1}
    frames = {video.shape[0] for pair in pairs if pair.dataset == "mini-vid" for video in pair.query.videos}
    assert frames == {4}
    assert max(len(prompt.sequence) for pair in pairs for prompt in (pair.query, pair.positive)) < 60


def test_rl_records_have_the_real_format(root):
    keys = ["dataset", "dataset_name", "qry_text", "qry_image", "qry_video"]
    keys += ["pos_text", "pos_image", "pos_video", "solution"]
    for record in rl_records(root):
        assert list(record) == keys and record["dataset"] == "mini-MMEB" and record["solution"]
        for side in ("qry", "pos"):
            text, image, video = (record[f"{side}_{part}"] for part in ("text", "image", "video"))
            assert not prompts.MARKERS.search(text) and prompts.DISC_EMB not in text
            assert isinstance(image, str) and isinstance(video, list) and bool(image) + (video != [""]) <= 1


def test_rl_pairs_show_boards_that_nothing_else_shows(tmp_path):
    """Without noise equal boards are equal pictures; about ten mosaics would be common by chance."""
    sizes = dict(num_train_pairs=6000, num_rl_pairs=1200, num_rl_eval_pairs=192, num_eval_queries=96)
    root = make_mini_mmeb(tmp_path / "clean", noise=0, **sizes)

    def shown(folder):
        boards: dict[str, bytes] = {}
        for path in sorted((root / "images" / folder).rglob("*.png")):
            if not path.parent.name.endswith("-target"):
                stem = f"{path.parent.name}/{path.name[:5]}"  # of a clip all frames
                boards[stem] = boards.get(stem, b"") + path.read_bytes()
        return list(boards.values())

    evaluation = set()
    meta = json.loads((root / "eval" / "meta.json").read_text())
    for task in meta["tasks"].values():
        for query in lines(root / "eval" / task["queries"]):
            paths = query.get("video") or [query["image"]]
            evaluation.add(b"".join((root / path).read_bytes() for path in paths))
    rl, rl_eval, train = shown("rl"), shown("rl-eval"), set(shown("train"))
    assert len(rl) == 3 * 100 and len(rl_eval) == 192
    assert len(set(rl)) == len(rl) and len(set(rl_eval)) == len(rl_eval)
    assert not set(rl) & (train | evaluation) and not set(rl_eval) & (train | evaluation | set(rl))


def test_rl_questions_are_the_longer_ones(root):
    def hops(name):
        asked = [r["qry_text"].split() for r in rl_records(root, [name]) if r["dataset_name"] != "mini-look"]
        return {NUMBERS.index(word.strip(".,:?")) for text in asked for word in text if word.strip(".,:?") in NUMBERS}

    assert hops("rl.json") == {2, 3, 4} and hops("rl_eval.json") == {0, 1, 2, 3, 4}


def test_rl_answers(root):
    """Training: none that is held out.  Held-out pairs: a quarter of them, and each answer once."""
    for task in HOP_TASKS:
        held_out = set()
        for answer in range(NUM_ANSWERS):
            if is_held_out(task, answer):
                held_out.add(" ".join((key_word(task, answer // 8) + digit_word(answer % 8)).split()))
        said = [
            [r["solution"] for r in rl_records(root, [name]) if r["dataset_name"] == f"mini-{task}"]
            for name in RL_FILES
        ]
        assert not set(said[0]) & held_out
        assert len(set(said[1])) == len(said[1]) == 16 and len(set(said[1]) & held_out) == 4
    targets = {(r["dataset_name"], r["solution"]): r["pos_image"] for r in rl_records(root, ["rl.json"])}
    for record in rl_records(root, ["rl.json"]):
        if record["dataset_name"] in ("mini-img", "mini-doc"):
            assert targets[record["dataset_name"], record["solution"]] == record["pos_image"], "one picture an answer"


def test_other_rl_pairs_change_nothing_else(root, tmp_path):
    other = files(make_mini_mmeb(tmp_path / "other", **SMALL | {"num_rl_pairs": 40, "num_rl_eval_pairs": 4}))
    first = files(root)
    kept = [name for name in first if name.name == "train.json" or name.parts[:2] in (("images", "train"),)]
    kept += [name for name in first if "eval" in name.parts and name.name != "meta.json"]
    assert len(kept) > 100 and all(other[name] == first[name] for name in kept)


def test_one_cell_is_one_vision_token(root):
    """No picture is resized: the patch grid has the drawn tiles."""
    directory = HFDirectory.open(MINI_BASE)
    images = ImageConfig.of_directory(directory)
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
    for record in rl_records(root):
        named |= {record["qry_image"], *record["qry_video"], record["pos_image"], *record["pos_video"]}
    named -= {None, ""}
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
    for name in ("train.json", "rl.json"):
        path = next(path for path in first if path.name == name)
        assert other[path] != first[path]
    pairs = [json.loads(got[Path("rl_eval.json")]) for got in (first, other)]
    same = sum(left == right for left, right in zip(*pairs, strict=True))
    assert same >= len(pairs[0]) - 4, "a pair differs only where training has its board"


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
    with pytest.raises(
        ConfigError, match="(?s)num_rl_pairs=0.*num_rl_eval_pairs=500.*10000000 pairs.*max_hops=99.*slip_rate=2"
    ):
        many = {"num_train_pairs": 10**7 - 884, "num_rl_eval_pairs": 500}
        make_mini_mmeb(tmp_path / "bad", slip_rate=2, max_hops=99, num_rl_pairs=0, **many)
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
