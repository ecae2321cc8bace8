"""Each step's micro-batches on every rank: loaded once for a data-parallel rank, then sent to its TP and PP peers.

One rank of each tensor- and pipeline-parallel group reads files, so that a picture is decoded once and peers can never
disagree about a bad sample.  Everything that can be wrong with the data raises on all ranks together.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from umer1.data.bad_samples import BadSampleCounts
from umer1.data.dataset import PairDataset
from umer1.data.images import ImageConfig
from umer1.data.loader import DataConfig, Loader, StepMaker
from umer1.data.processor import Processor
from umer1.data.sampler import BlockSampler
from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.training.config import SFTConfig


def image_config(data: DataConfig, directory: HFDirectory) -> ImageConfig:
    """Pixel bounds: flags, else the directory's preprocessor files, else METHOD's recipe."""
    return ImageConfig.from_settings(
        directory.config.vision,
        directory.image_settings,
        directory.video_settings,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
    )


def build_loader(config: SFTConfig, directory: HFDirectory, state: ParallelState) -> Loader:
    """The loader of a data-parallel rank's source."""
    data = config.data
    processor = Processor(
        directory.tokenizer,
        directory.special,
        directory.config,
        image_config(data, directory),
        data.seq_length,
        max_frames=data.max_frames,
        blank_image_for_text=data.blank_image_for_text,
    )
    dataset = PairDataset(data.data_path, data.data_root, processor, max_source_pixels=data.max_source_pixels)
    try:
        sampler = BlockSampler(
            dataset.name_ids, dataset.names, data.global_batch_size, data.data_block_size, config.run.seed
        )
    except UserError as error:
        raise UserError(f"{data.data_path}: {error}") from None
    interleaved = config.parallel.num_layers_per_virtual_pipeline_stage is not None
    save = config.checkpoint.save
    maker = StepMaker(
        dataset,
        sampler,
        data,
        dp_rank=state.dp_rank,
        dp_size=state.dp_size,
        pad_to_multiple=state.tp_size if config.parallel.sequence_parallel else 1,
        micro_batches_multiple_of=state.pp_size if interleaved else 1,
        disc_only=config.loss.weights()[1:] == (0.0, 0.0),
    )
    return Loader(maker, None if save is None else Path(save) / "bad_samples.jsonl")


def raise_together(failure: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise UserError on every rank when any rank has a failure; the first rank's text."""
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    found = [text for text in failures if text is not None]
    if found:
        raise UserError(found[0])


class BatchSource:
    """`next()` gives this rank's micro-batches on its device; state and counts go into the checkpoint."""

    def __init__(self, config: SFTConfig, directory: HFDirectory, state: ParallelState):
        self.config, self.state = config, state
        self.is_source = state.tp_rank == 0 and state.pp_rank == 0
        self.loader: Loader | None = None
        failure = None
        if self.is_source:
            try:
                self.loader = build_loader(config, directory, state)
            except UserError as error:
                failure = str(error)
        raise_together(failure)

    @property
    def counts(self) -> BadSampleCounts:
        """On sources: samples seen and bad ones, over all data-parallel ranks and resumes."""
        return self.loader.counts

    def next(self) -> tuple[list[PackedBatch], bool]:
        """(micro-batches, whether any data-parallel rank has more than one)."""
        batches, several, failure = [], False, None
        if self.is_source:
            step = self.loader.next()
            batches = step.batches
            several, failure = self._agree(len(batches), step.failure)
        if self.state.tp_size * self.state.pp_size > 1:
            batches, several, failure = self._send(batches, several, failure)
        if failure is not None:
            raise UserError(failure)
        return [batch.to(self.state.device) for batch in batches], several

    def _agree(self, count: int, own_failure: str | None) -> tuple[bool, str | None]:
        """Sum the counts over data-parallel sources; why the run has to stop, if it has."""
        group, device = self.state.groups.dp, self.state.device
        delta = torch.cat([self.counts.take_delta(), torch.tensor([count > 1, own_failure is not None])]).to(device)
        dist.all_reduce(delta, group=group)
        self.counts.add(delta[:-2])
        failure = None
        if delta[-1]:
            texts: list[str | None] = [None] * self.state.dp_size
            dist.all_gather_object(texts, own_failure, group=group)
            first = next(text for text in texts if text is not None)
            failure = f"{first}. {self.counts.report()}. {self._listed()}Check --data-root and the data file"
        else:
            try:
                self.counts.check(self.config.data.max_bad_sample_fraction, self._bad_samples_path())
            except UserError as error:
                failure = str(error)
        return bool(delta[-2]), failure

    def _send(self, batches: list[PackedBatch], several: bool, failure: str | None):
        """From the source to its tensor- and pipeline-parallel peers; pixels only to the first stage."""
        group = self.state.groups.mp
        source = dist.get_process_group_ranks(group)[0]
        pixels = [batch.pixel_values for batch in batches]
        for batch in batches:
            batch.pixel_values = batch.pixel_values[:0]
        message = [(batches, several, failure, [tuple(tensor.shape) for tensor in pixels])]
        dist.broadcast_object_list(message, source, group=group)
        batches, several, failure, shapes = message[0]
        if self.state.pp_rank == 0:
            for position, (batch, shape) in enumerate(zip(batches, shapes, strict=True)):
                mine = pixels[position] if self.is_source else torch.empty(shape)
                mine = mine.to(self.state.device).contiguous()
                if mine.numel() and self.state.tp_size > 1:
                    dist.broadcast(mine, source, group=self.state.groups.tp)
                batch.pixel_values = mine
        return batches, several, failure

    def _bad_samples_path(self) -> str | None:
        return None if self.config.checkpoint.save is None else f"{self.config.checkpoint.save}/bad_samples.jsonl"

    def _listed(self) -> str:
        return f"They are listed in {self._bad_samples_path()}. " if self._bad_samples_path() else ""

    def describe(self) -> str:
        """On sources: what is trained on."""
        dataset = self.loader.maker.dataset
        notes = "".join(f"; {note}" for note in self.loader.sampler.notes())
        return f"{dataset.path}: {len(dataset)} pairs of {len(dataset.names)} data sets{notes}"

    def report(self) -> str:
        """On sources: one line about bad samples."""
        return f"{self.counts.report()}. {self._listed() if self.counts.bad else ''}".strip()

    def state_dict(self) -> dict[str, Any] | None:
        """JSON on sources, the same on each; None elsewhere."""
        return self.loader.state_dict() if self.is_source else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the next step, at any number of ranks; raises on all ranks when the data changed."""
        failure = None
        if self.is_source:
            try:
                self.loader.load_state_dict(state)
            except UserError as error:
                failure = str(error)
        raise_together(failure)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
