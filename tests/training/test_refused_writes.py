"""A disk that refuses what training can do without is said, and training goes on; one that refuses a start ends it."""

import math
from types import SimpleNamespace

import pytest
import torch

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.training.checkpoint import CheckpointConfig
from umer1.training.config import SFTConfig
from umer1.training.metrics import LoggingConfig, MetricsLogger, keep_until
from umer1.training.offending import LossWatch
from umer1.training.sft import SFTTrainer

RECORD = {"train_iters": 2, "consumed_samples": 4, "milliseconds": 1.0, "learning_rate": 0.1, "global_batch_size": 4}


@pytest.fixture
def trainer(tmp_path):
    """One that saves where nothing can be made, not even by root: below a file."""
    (tmp_path / "file").touch()
    made = object.__new__(SFTTrainer)
    made.config = SFTConfig(checkpoint=CheckpointConfig(save=str(tmp_path / "file" / "run")))
    made.iteration = 0
    with init_distributed(ParallelConfig()) as made.state:
        yield made


def test_lines_of_the_record_are_said_once(tmp_path, capsys):
    """In the background a save may just be filling the disk: its own error is what shall end the run."""
    logger = MetricsLogger(LoggingConfig(), str(tmp_path), 0, {})
    logger.jsonl.close()
    logger.jsonl = open("/dev/full", "a")
    for iteration in (1, 2):
        logger.log({**RECORD, "iteration": iteration, "eta_seconds": 1.0})
    logger.close()
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1


def test_a_damaged_record_stops_no_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = ['{"iteration": 1}', '{"iteration": 2}']
    damaged = ['{"iteration": []}', '{"iteration": "2"}', "[1]", 5000 * "9", 3000 * "[", '{"iteration": 3}', '{"itera']
    path.write_text("\n".join([whole[0], *damaged[:-1], whole[1], damaged[-1]]))
    keep_until(path, 2)
    assert path.read_text().splitlines() == whole


def test_samples_that_cannot_be_listed_are_named_in_the_message(trainer, capsys):
    dataset = SimpleNamespace(dataset_name=lambda index: "toy")
    source = {"is_source": True, "take_drawn": lambda: [(torch.tensor([0]), torch.tensor([4711]))]}
    trainer.source = SimpleNamespace(**source, loader=SimpleNamespace(maker=SimpleNamespace(dataset=dataset)))
    trainer.losses = LossWatch(10.0)
    trainer.note_offending(math.nan, 1.0)
    said = capsys.readouterr().err
    assert "'index': 4711" in said and "training goes on" in said


def test_a_start_that_cannot_write_its_settings_is_one_message(trainer):
    with pytest.raises(UserError, match=r"settings and record could not be written under .*Not a directory"):
        trainer.open_logs()
