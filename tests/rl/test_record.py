"""The rollouts files: what an outside reader finds in them."""

import json

import numpy as np
import pytest

from umer1.rl.record import RolloutEntry, ScoredCompletion, write_rollouts


def entry(iteration: int = 7, **changes) -> RolloutEntry:
    values = {
        "iteration": iteration,
        "slot": 3,
        "side": "positive",
        "dataset": "img",
        "index": 153,
        "prompt": "a<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|><|video_pad|><|video_pad|>b\nc",
        "prompt_tokens": 42,
        "completions": [
            ScoredCompletion(
                status="ok",
                finish_reason="stop",
                text="<think>é\n\x1b[31m</think><answer>x<gen_emb>",
                token_ids=[5, 6, 7],
                logprobs=np.array([-0.1, -1e-9, -3.3333333], dtype=np.float32),
                old_logprobs=np.array([-0.2, -np.inf, -1.0], dtype=np.float32),
                rewards={"format": 1.0, "embedding": 0.25},
                total=np.float32(1.25),
                advantage=-0.5,
            ),
            ScoredCompletion(status="missing_gen_emb", finish_reason="length", text="y", token_ids=[1], total=0.0),
            ScoredCompletion(status="failed"),
        ],
    }
    return RolloutEntry(**(values | changes))


def test_a_line_holds_what_the_step_used(tmp_path):
    write_rollouts(tmp_path / "rollouts", [entry(), entry(side="query")])
    lines = (tmp_path / "rollouts" / "iter_0000007.jsonl").read_text().splitlines()
    assert [json.loads(line)["side"] for line in lines] == ["positive", "query"]
    line = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [line[key] for key in ("iteration", "slot", "dataset", "index", "prompt_tokens")] == [7, 3, "img", 153, 42]
    assert line["prompt"] == "a<|vision_start|><|image_pad|><|vision_end|><|video_pad|>b\nc"
    first, second, third = line["completions"]
    want = entry().completions[0]
    assert first["token_ids"] == [5, 6, 7] and first["text"] == want.text and first["status"] == "ok"
    assert np.array_equal(np.array(first["logprobs"], dtype=np.float32), want.logprobs)  # no bit is lost
    assert first["old_logprobs"] == [-0.2, None, -1.0]
    assert first["rewards"] == {"format": 1.0, "embedding": 0.25}
    assert (first["total"], first["advantage"], first["finish_reason"]) == (1.25, -0.5, "stop")
    assert second["advantage"] is None and second["old_logprobs"] is None
    assert third["status"] == "failed" and third["token_ids"] == [] and third["total"] is None


def test_text_for_people(tmp_path):
    write_rollouts(tmp_path, [entry()])
    text = (tmp_path / "iter_0000007.txt").read_text()
    assert "step 7, pair 3 (img, record 153), positive: 42 tokens" in text
    assert "<|image_pad|> x 16<|vision_end|><|video_pad|> x 2b" in text
    assert "[0] advantage -0.5000, reward +1.2500, format +1.0000, embedding +0.2500, 3 tokens\n" in text
    assert "\x1b" not in text and "\\x1b[31m" in text and "é" in text
    assert "cut off, no <gen_emb>" in text and "[2] failed, left out" in text


def test_a_step_run_again_replaces_its_files(tmp_path):
    write_rollouts(tmp_path, [entry(), entry()])
    write_rollouts(tmp_path, [entry(slot=9)])
    lines = (tmp_path / "iter_0000007.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["slot"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000007.jsonl", "iter_0000007.txt"]


def test_half_a_surrogate_pair_in_a_name_stays_the_escape_that_it_was(tmp_path):
    write_rollouts(tmp_path, [entry(dataset="a\ud800")])
    (text,), (line,) = ([path.read_text() for path in tmp_path.glob(f"*.{end}")] for end in ("txt", "jsonl"))
    assert "(a\\ud800, record" in text and json.loads(line)["dataset"] == "a\ud800"


def test_entries_of_one_step_alone(tmp_path):
    for entries in ([], [entry(1), entry(2)]):
        with pytest.raises(ValueError, match="one step"):
            write_rollouts(tmp_path, entries)
