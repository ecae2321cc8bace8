"""`umer1 report` on run folders, damaged and hostile ones too."""

import json
import random
import re
from html.parser import HTMLParser

import pytest
import yaml

from umer1.errors import UserError
from umer1.report import chart, command
from umer1.report.runs import read_run

SEED = random.randrange(2**32)
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"


def make_run(path, *, steps=40, loss=2.0, lr=0.5, extra=""):
    rng = random.Random(SEED)
    path.mkdir()
    lines = [
        json.dumps(
            {"iteration": step, "train_iters": steps, "loss": loss + rng.random(), "grad_norm": rng.random() * 9}
        )
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + extra)
    (path / "config.yaml").write_text(yaml.safe_dump({"optimizer": {"lr": lr, "clip_grad": 1.0}, "data": {"seed": 3}}))
    return path


class Tags(HTMLParser):
    """Opened and closed elements, and text."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.words.append(data)


def test_one_run(tmp_path, capsys):
    run = make_run(tmp_path / "sft")
    command.main([str(run)])
    assert "report.html: 1 run, 3 curves" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    tags = Tags(text)
    assert not tags.open and "gradient norm" in tags.words
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"sft: {last['loss']:.4g} at step 40" in tags.words
    # nothing is fetched or run
    assert not [tag for tag, _ in tags.opened if tag in ("script", "link", "img", "iframe", "object")]
    assert not re.findall(r"(?:href|src)=|url\(|@import", text)


def test_an_evaluation_of_its_own_does_not_hide_its_step(tmp_path):
    """A resumed run that makes up for one notes it after the step's own record."""
    run = make_run(tmp_path / "run", extra=json.dumps({"iteration": 40, "eval_reward": 0.5}) + "\n")
    last = read_run("x", run).last
    assert last["eval_reward"] == 0.5 and last["loss"] > 0 and last["train_iters"] == 40


def test_several_runs_share_charts_and_tell_what_differs(tmp_path):
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("one", 0.5), ("two", 0.25))]
    output = tmp_path / "both.html"
    command.main([f"first={runs[0]}", str(runs[1]), "--output", str(output)])
    text = output.read_text()
    assert text.count("<title>first: ") == text.count("<title>two: ") == 2
    differing = text[text.index("<h2>Settings") : text.index("<details><summary>All 3 settings")]
    assert "optimizer.lr" in differing and "clip_grad" not in differing


def test_damage_is_counted_and_told(tmp_path):
    extra = '{"iteration": 41, "loss": NaN}\n{"iteration": 41, "loss": null, "mfu": null}\n'
    extra += '{"iteration": 42, "lo\n[1, 2]\n{"iteration": 43, "loss": Infinity}\n'
    run = make_run(tmp_path / "run", extra=extra)
    (run / "config.yaml").write_text("optimizer: [")
    (run / "run.json").write_text('{"pairs": {"toy": "many"}}')
    (run / "bad_samples.jsonl").write_text('{"cause": "a\u2028line"}\nhalf of\n{"cause": "missing_file"}\n')
    command.main([str(run)])
    words = " ".join(Tags((run / "report.html").read_text()).words)
    for said in (
        "2 damaged lines of metrics.jsonl",
        "loss was not finite 3 times",
        "config.yaml cannot be read",
        "run.json cannot be read",
        "bad_samples.jsonl has 1 damaged lines",
        "2 bad samples",
    ):
        assert said in words, said
    assert "mfu was not" not in words  # never measured here
    assert read_run("x", run).curves["loss"][-1][0] == 40


def test_settings_and_counts_that_no_reader_takes(tmp_path):
    """A date of no calendar, brackets without end, a list in itself, pairs without end: told, and the rest is there."""
    for number, text in enumerate(("data: {seed: 2026-13-45}", "data: " + "[" * 5000, "data: {seed: &x [*x]}")):
        run = make_run(tmp_path / str(number))
        (run / "config.yaml").write_text(text)
        (run / "run.json").write_text('{"pairs": {"toy": Infinity}}')
        command.main([str(run)])
        words = " ".join(Tags((run / "report.html").read_text()).words)
        assert "config.yaml cannot be read" in words and "run.json cannot be read" in words and "loss" in words


def test_numbers_that_no_axis_can_have(tmp_path):
    """A flipped bit of an exponent, and a loss that was never finite: the log writes that as null."""
    path = tmp_path / "run"
    path.mkdir()
    far = [json.dumps({"iteration": step, "loss": None, "x": sign * 1.7e308}) for step, sign in ((1, 1), (2, -1))]
    huge = [
        json.dumps({"iteration": 3, "x": 10**400}),
        json.dumps({"iteration": 10**400, "x": 1}),
        '{"iteration": true}',
    ]
    (path / "metrics.jsonl").write_text("\n".join([*far, *huge]))
    command.main([str(path)])
    words = Tags((path / "report.html").read_text()).words
    assert "run: x was not finite 3 times" in words and "run: loss was not finite 2 times" in words
    assert read_run("x", path).curves == {}
    (path / "metrics.jsonl").write_text('{"iteration": 1, "x": 5e-324}\n{"iteration": 2, "x": -5e-324}\n')
    command.main([str(path)])  # the step between two marks of such an axis would be 0
    assert read_run("x", path).curves == {"x": [(1, 0.0), (2, 0.0)]}


def test_text_of_runs_stays_text(tmp_path):
    run = make_run(tmp_path / "run", extra=json.dumps({"iteration": 41, HOSTILE: 1.0}) + "\n")
    (run / "rollouts").mkdir()
    (run / "rollouts" / "iter_0000001.txt").write_text(HOSTILE + "x" * 30_000)
    (run / "bad_samples.jsonl").write_text(json.dumps({"cause": HOSTILE, HOSTILE: HOSTILE}) + "\n")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {HOSTILE: HOSTILE}}))
    (run / "run.json").write_text(
        json.dumps({"pairs": {HOSTILE: 3}, "versions": [{"step": 0, "packages": {"a": HOSTILE}}]})
    )
    command.main([f"{HOSTILE.replace('/', '').replace('=', '')}={run}", "--output", str(tmp_path / "out.html")])
    tags = Tags((tmp_path / "out.html").read_text())
    assert not tags.open and not [tag for tag, attributes in tags.opened if tag in ("script", "img")]
    assert not [name for _, attributes in tags.opened for name in attributes if name.startswith("on")]
    assert any("10,0" in word and "more characters" in word for word in tags.words)


def test_half_a_surrogate_pair_is_shown(tmp_path):
    """JSON can hold one, as the name of a data set for example, and UTF-8 cannot."""
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text('{"pairs": {"half \\ud83d": 3}}')
    command.main([str(run)])
    assert "half \\ud83d" in (run / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_read_is_said(tmp_path):
    """Folders in the place of files, for root may read every file."""
    run = make_run(tmp_path / "run")
    (run / "rollouts" / "iter_0000001.txt").mkdir(parents=True)
    command.main([str(run)])
    assert "iter_0000001.txt cannot be read: Is a directory" in (run / "report.html").read_text()


def test_wrong_commands_are_one_message(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match=r"is no training run(.|\n)*no record of a step \(1 damaged"):
        command.main([str(tmp_path), str(tmp_path / "empty"), "--output", str(tmp_path / "x.html")])
    with pytest.raises(UserError, match="x{300}.* cannot be read: File name too long"):
        command.main([f"long={tmp_path / ('x' * 300)}"])
    with pytest.raises(UserError, match="several runs need --output"):
        command.main([f"a={run}", f"b={run}"])
    with pytest.raises(UserError, match="two runs are called 'run'"):
        command.main([str(run), str(run), "--output", str(tmp_path / "x.html")])
    with pytest.raises(UserError, match="cannot be written"):
        command.main([str(run), "--output", str(run / "metrics.jsonl" / "x.html")])
    assert not (tmp_path / "x.html").exists()


def test_thinning_keeps_every_spike():
    rng = random.Random(SEED)
    curve = [(step, rng.random()) for step in range(5000)]
    for step in (0, 17, 2500, 4999):
        curve[step] = (step, 100.0 + step)
    kept = chart.thinned(curve)
    assert len(kept) <= 600 and kept == sorted(kept), SEED
    assert {(step, 100.0 + step) for step in (0, 17, 2500, 4999)} <= set(kept), SEED
    assert set(kept) <= set(curve)


@pytest.mark.parametrize("last", [7, 9_999, 100_000, 1_000_000])
def test_labels_of_steps_do_not_meet_each_other_or_the_edge(last):
    text = chart.line_chart("t", [(0, "run", [(0, 1.0), (last, 2.0)])])
    labels = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="middle">([^<]+)<', text)
    halves = [(float(middle), 6.6 * len(label) / 2) for middle, label in labels]  # pixels of a digit at 11
    assert halves[-1][0] + halves[-1][1] <= chart.WIDTH
    assert all(x + half < other - width for (x, half), (other, width) in zip(halves, halves[1:], strict=False)), labels


@pytest.mark.parametrize("values", [(0, 1.7e6), (1e5, 1e5 + 1), (9.5e-5, 1.05e-4), (5, 5 + 1e-9), (-1e9, 1e9), (0, 3)])
def test_labels_of_values_are_whole_and_tell_one_from_the_next(values):
    """1,000,000 tokens/s once stood there as 000,000, cut off by the edge."""
    text = chart.line_chart("t", [(0, "run", list(enumerate(values)))])
    labels = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end">([^<]+)<', text)
    assert all(float(end) - 7 * len(label) >= 0 for end, label in labels), labels  # pixels of a digit in a wide font
    assert len({label for _, label in labels}) == len(labels) >= 3, labels


def test_a_short_curve_is_drawn_over_a_long_one():
    curves = [(0, "short", [(0, 1.0), (1, 2.0)]), (1, "long", [(step, 1.5) for step in range(9)])]
    text = chart.line_chart("t", curves)
    assert text.index('class="line c1"') < text.index('class="line c0"')


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-12, 2e-12], [-1e9, 1e9], [5.0, 5.0 + 1e-9]])
def test_charts_of_any_scale(values):
    text = chart.line_chart("t", [(0, "run", list(enumerate(values)))])
    numbers = [float(word) for word in re.findall(r"[-\d.]+(?=,)", "".join(re.findall(r'points="([^"]+)"', text)))]
    assert "nan" not in text and all(0 <= number <= chart.WIDTH for number in numbers)
