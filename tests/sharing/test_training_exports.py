"""Both training stages, from their command lines to the card of what they export."""

import json
import re
from pathlib import Path

import pytest
from grpo_world import Setting
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1 import conversion
from umer1.distributed.parallel import init_distributed
from umer1.sharing.share import main as share
from umer1.training.config import SFTConfig
from umer1.training.grpo import GRPOTrainer
from umer1.training.launch import read_command_line
from umer1.training.policy_config import GRPOConfig
from umer1.training.sft import SFTTrainer
from umer1.training.watch import Watch

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def train(config_class, trainer, default: str, arguments: list[str]) -> None:
    """The example's program, in this process."""
    config, directory = read_command_line(config_class, arguments, CONFIGS / default)
    with (
        init_distributed(config.parallel, seed=config.run.seed) as state,
        Watch.of(config, state, trainer.own_phases) as watch,
    ):
        trainer(config, directory, state, watch).fit()


def counted(card: str) -> dict[str, int]:
    """The table of data sets."""
    table = card.split("| data set | pairs |\n| --- | --- |\n")[1].split("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"\| (.*) \| (\d+) \|", table)}


def names_in(path: Path) -> dict[str, int]:
    records = json.loads(path.read_text())
    found = [record["dataset_name"] for record in records]
    return {name: found.count(name) for name in found} | {"all": len(found)}


@pytest.fixture
def sft(tmp_path):
    """(data, SAVE, export) of two steps."""
    model, data, save = (
        make_tiny_directory(tmp_path / "start", layers=2),
        write_pairs(tmp_path / "data"),
        tmp_path / "sft",
    )
    flags = ["--hf-model", str(model), "--data-path", str(data), "--fp32", "--save", str(save), "--save-interval", "1"]
    flags += "--global-batch-size 8 --micro-batch-size 8 --train-iters 2 --lr 1e-3 --lr-warmup-iters 0".split()
    train(SFTConfig, SFTTrainer, "mini_sft.yaml", [*flags, "--export-hf", str(tmp_path / "my-model")])
    return data, save, tmp_path / "my-model"


def test_sft_exports_a_card_and_share_tells_the_same_of_its_checkpoints(sft, tmp_path):
    data, save, exported = sft
    card = (exported / "README.md").read_text()
    assert "# my-model\n" in card and "SFT, 2 steps (16 pairs), started from start." in card
    assert counted(card) == names_in(data)
    loss = json.loads((save / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert f"| loss | {loss:.4g} |" in card and "| training from step 0 | version |" in card
    assert str(tmp_path) not in card and (exported / "modules.json").is_file()

    share(["--model", str(save), "--output", str(tmp_path / "again"), "--name", "my-model"])
    assert (tmp_path / "again" / "README.md").read_text() == card
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    conversion.main(["--from-checkpoint", str(save), "--to-hf", str(tmp_path / "converted" / "my-model")])
    assert (tmp_path / "converted" / "my-model" / "README.md").read_text() == card
    share(["--model", str(save / "iter_0000001"), "--output", str(tmp_path / "early")])
    assert "SFT, 1 step (8 pairs)" in (tmp_path / "early" / "README.md").read_text()


def test_grpo_exports_a_card(tmp_path):
    setting = Setting(tmp_path, layers=2)
    flags = setting.flags("--train-iters", "1", "--save", str(tmp_path / "grpo"), "--export-hf", str(tmp_path / "out"))
    train(GRPOConfig, GRPOTrainer, "mini_grpo.yaml", flags + ["--load", "none"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GRPO, 1 step (4 pairs), started from model." in card
    assert counted(card) == names_in(setting.data)
    for said in ("| num_generations | `3` |", "| beta | `", "| rewards | `1 format, 1 embedding` |", "| reward | "):
        assert said in card, said
    assert str(tmp_path) not in card
