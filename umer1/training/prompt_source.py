"""GRPO's data: each step's pairs of prompts, on every rank of a copy of the model."""

from umer1.data.loader import Loader, PromptStepMaker
from umer1.data.rl_dataset import PromptDataset
from umer1.data.schema import PromptPair
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.training.batches import (
    DataSource,
    bad_samples_path,
    emptied,
    make_processor,
    make_sampler,
    open_data,
    send_pixels,
    send_to_peers,
)
from umer1.training.policy_config import GRPOConfig


def make_prompt_loader(config: GRPOConfig, directory: HFDirectory, state: ParallelState) -> Loader:
    """The loader of a data-parallel rank's source."""
    data = config.data
    dataset = open_data(PromptDataset, data, make_processor(data, directory, config.prompt_length))
    sampler = make_sampler(data, dataset, config.run.seed)
    maker = PromptStepMaker(dataset, sampler, data, dp_rank=state.dp_rank, dp_size=state.dp_size)
    return Loader(maker, bad_samples_path(config.checkpoint.save))


def open_prompts(config: GRPOConfig, directory: HFDirectory, path: str, root: str | None) -> PromptDataset:
    """An RL file under this run's processor; UserError when it is none."""
    processor = make_processor(config.data, directory, config.prompt_length)
    return PromptDataset(path, root, processor, max_source_pixels=config.data.max_source_pixels)


class PromptSource(DataSource):
    """`next()` gives this data-parallel rank's pairs of the global batch, in the order of their slots."""

    def __init__(self, config: GRPOConfig, directory: HFDirectory, state: ParallelState):
        make = lambda: make_prompt_loader(config, directory, state)  # noqa: E731
        super().__init__(make, config.data, config.checkpoint.save, state)

    def next(self) -> list[PromptPair]:
        """The same pairs on all ranks of a copy of the model; pixels on its first stage."""
        pairs, failure = [], None
        if self.is_source:
            step = self.draw()
            pairs = step.pairs
            failure = self.agree(step.failure)
        pairs, failure = share_pairs(pairs, failure, self.state)
        if failure is not None:
            raise UserError(failure)
        return pairs


def share_pairs(
    pairs: list[PromptPair], failure: str | None, state: ParallelState
) -> tuple[list[PromptPair], str | None]:
    """The source's pairs on its tensor- and pipeline-parallel peers; pixels as tensors of their own."""
    if state.tp_size * state.pp_size == 1:
        return pairs, failure
    pixels = [side.sequence.pixel_values for pair in pairs for side in (pair.query, pair.positive)]
    for pair in pairs:
        for side in (pair.query, pair.positive):
            side.sequence.pixel_values = emptied(side.sequence.pixel_values)
    pairs, failure = send_to_peers((pairs, failure), state)
    arrived = iter(send_pixels(pixels, state))
    for pair in pairs:
        for side in (pair.query, pair.positive):
            side.sequence.pixel_values = next(arrived)
    return pairs, failure
