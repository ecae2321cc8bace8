"""Flags and YAML: precedence, types, and all problems in one message."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from umer1.configuration import field_help, help_text, load_config, to_yaml
from umer1.errors import ConfigError, UserError


@dataclass(kw_only=True, slots=True)
class Speed:
    """How fast"""

    lr: float = 1e-3
    """Learning rate."""
    train_iters: int = 10
    """Steps."""
    warmup: int | None = None
    """Warm-up,
    over two lines."""

    def violations(self):
        return [f"lr={self.lr} must be above 0"] if self.lr <= 0 else []


@dataclass(kw_only=True, slots=True)
class Model:
    """Which one"""

    train_vision: bool = False
    """Train the ViT."""
    hf_model: str | None = None
    """Directory."""
    data_path: str | None = None
    """File."""

    def violations(self):
        return []


@dataclass(kw_only=True, slots=True)
class Part:
    """One of several"""

    name: str
    """What it is."""
    weight: float = 1.0
    """What it counts."""
    limit: int | None = None
    """At most."""


@dataclass(kw_only=True, slots=True)
class Mixture:
    """What is mixed"""

    parts: list[Part] = field(default_factory=lambda: [Part(name="flour"), Part(name="water", weight=0.5)])
    """The parts."""

    def violations(self):
        return []


@dataclass(kw_only=True, slots=True)
class Config:
    model: Model = field(default_factory=Model)
    speed: Speed = field(default_factory=Speed)
    mixture: Mixture = field(default_factory=Mixture)

    def violations(self):
        return self.speed.violations()


def test_defaults_yaml_flags_in_this_order(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("speed:\n  lr: 1e-4\n  train_iters: 7\ntrain-vision: true\n")  # 1e-4 is text to PyYAML
    config = load_config(Config, ["--config", str(path), "--train-iters=3", "--warmup", "2"])
    assert (config.speed.lr, config.speed.train_iters, config.speed.warmup) == (1e-4, 3, 2)
    assert config.model.train_vision
    assert not load_config(Config, ["--config", str(path), "--freeze-vision"]).model.train_vision
    assert not load_config(Config, ["--config", str(path), "--no-train-vision"]).model.train_vision
    assert load_config(Config, ["--train-iters", "1764380000123456789"]).speed.train_iters == 1764380000123456789


def test_resolved_configuration_reads_back(tmp_path):
    path = tmp_path / "resolved.yaml"
    config = load_config(Config, ["--lr", "3e-5", "--hf-model", "a b", "--warmup", "none"])
    path.write_text(to_yaml(config))
    assert load_config(Config, ["--config", str(path)]) == config


def test_a_whole_number_keeps_every_digit():
    """More than a float has: a seed became another one."""
    for text in (str(2**64 - 1), f"-{2**53 + 1}", "1e3"):
        found = load_config(Config, ["--train-iters", text]).speed.train_iters
        assert found == (1000 if text == "1e3" else int(text))
    for text in ("9" * 400, "9" * 5000, "1.5", "inf", "--5"):
        with pytest.raises(ConfigError, match="must be a whole number|unknown flag"):
            load_config(Config, [f"--train-iters={text}"])


def test_default_config_is_used_only_without_data_or_model(tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text("train_iters: 4\n")
    assert load_config(Config, ["--lr", "2"], path).speed.train_iters == 4
    assert load_config(Config, ["--hf-model", "x"], path).speed.train_iters == 10


def test_every_problem_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("learning: 3\ntrain_iter: 4\nmodel:\n  lr: 3\n")
    flags = ["--config", str(path), "--lrr", "1", "--train-iters", "many", "--lr", "-1", "stray", "--hf-model"]
    with pytest.raises(ConfigError) as caught:
        load_config(Config, flags)
    text = str(caught.value)
    for part in (
        "unknown setting learning",
        "did you mean train_iters",
        "lr belongs to section speed",
        "did you mean --lr",
        "train_iters='many' must be a whole number",
        "lr=-1.0 must be above 0",
        "'stray'",
        "--hf-model needs a value",
    ):
        assert part in text, part
    assert len(caught.value.violations) == 8


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just text", "lr: 2026-13-45", "lr: " + 3000 * "["])
def test_unreadable_yaml_is_one_message(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="c.yaml"):
        load_config(Config, ["--config", str(path)])
    with pytest.raises(UserError, match="nowhere"):
        load_config(Config, ["--config", "nowhere.yaml"])


def test_a_nul_character_is_said_before_a_path_is_made_of_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text('hf_model: "a\\0b"\nlr: -1\n')
    with pytest.raises(ConfigError) as caught:
        load_config(Config, ["--config", str(path)])
    assert caught.value.violations == ["hf_model='a\\x00b' must not hold a NUL character", "lr=-1.0 must be above 0"]


@dataclass(kw_only=True, slots=True)
class Choices:
    """Which of few"""

    mode: Literal["disc", "gen"] = "disc"
    """One."""
    modality: Literal["image", "video"] | None = None
    """One or none."""


@dataclass(kw_only=True, slots=True)
class ChoicesConfig:
    """A program"""

    choices: Choices = field(default_factory=Choices)


def test_help_names_the_legal_values_where_they_are_few():
    text = help_text(ChoicesConfig, "Intro.")
    assert "--mode disc|gen  (default: disc)" in text and "--modality image|video  (default: None)" in text


def test_help_names_every_flag_and_default():
    text = help_text(Config, "Intro.")
    assert "--lr  (default: 0.001)" in text and "--train-vision / --freeze-vision" in text
    assert field_help(Speed)["warmup"] == "Warm-up, over two lines."


def test_a_list_of_maps_from_yaml_and_from_a_flag(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("mixture:\n  parts:\n  - name: salt\n    weight: 1e-3\n  - {name: 7, limit: 2}\n")
    config = load_config(Config, ["--config", str(path)])
    assert config.mixture.parts == [Part(name="salt", weight=1e-3), Part(name="7", limit=2)]
    path.write_text(to_yaml(config))
    assert load_config(Config, ["--config", str(path)]) == config
    flags = ["--config", str(path), "--parts", "[{name: 'a:b', weight: 2}]"]
    assert load_config(Config, flags).mixture.parts == [Part(name="a:b", weight=2.0)]
    assert load_config(Config, ["--parts", "[]"]).mixture.parts == []
    assert load_config(Config, []).mixture == Mixture()


@pytest.mark.parametrize(
    "text,problems",
    [
        ("[{name: a, wieght: 2, weight: x}, {weight: 1}, 3]", 4),
        ("[{name: a}, {name: {b: 1}, limit: 1.5}]", 2),
        ("{name: a}", 1),
        ("[{name: a", 1),
        ("none", 1),
        ("a", 1),
    ],
)
def test_each_fault_of_a_list_is_said(tmp_path, text, problems):
    path = tmp_path / "c.yaml"
    path.write_text(f"parts: {text}\n" if text != "[{name: a" else "parts: '[{name: a'\n")
    for arguments in (["--parts", text], ["--config", str(path)]):
        with pytest.raises(ConfigError) as caught:
            load_config(Config, [*arguments, "--lr", "-1"])
        assert len(caught.value.violations) == problems + 1, str(caught.value)
        assert all("parts" in problem for problem in caught.value.violations[:-1])


def test_a_fault_of_a_list_names_place_and_rule():
    with pytest.raises(ConfigError) as caught:
        load_config(Config, ["--parts", "[{name: a, wieght: 2, weight: x}, {weight: 1}, 3]"])
    text = str(caught.value)
    for part in (
        "unknown setting parts[0].wieght; legal are name, weight, limit",
        "parts[0].weight='x' must be a number",
        "parts[1].name is missing",
        "parts must be a list of maps like [{name: ..., weight: ..., limit: ...}]; parts[2]=3 is no map",
    ):
        assert part in text, text


def test_help_shows_a_list_as_one_types_it():
    shown = "[{name: flour, weight: 1.0, limit: null}, {name: water, weight: 0.5, limit: null}]"
    assert f"--parts  (default: {shown})" in help_text(Config, "Intro.")
    assert load_config(Config, ["--parts", shown]).mixture == Mixture()
