"""For each step the pairs or prompts that this data-parallel rank reads, made here or in worker processes.

Whatever the number of ranks and workers, a slot of the global batch holds the same pair: the sampler names it, and a
bad pair's replacement depends on (seed, step, slot) alone.
"""

import itertools
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from umer1.data import shipping
from umer1.data.bad_samples import BadRecord, BadSample, BadSampleCounts, BadSampleLog
from umer1.data.blend import Blend
from umer1.data.data_path import data_files
from umer1.data.dataset import PairDataset, RecordFile
from umer1.data.media import MAX_SOURCE_PIXELS
from umer1.data.packing import cut_after_disc
from umer1.data.processor import MAX_FRAMES
from umer1.data.sampler import BlockSampler
from umer1.data.schema import EncodedPair, PromptPair
from umer1.data.vision import DecodeWork
from umer1.files import dispensable
from umer1.processes import end_with_parent
from umer1.rules import bound_problems, data_root_problems

_MOST = 1 << 20  # pairs of a step and tokens of a sequence: far above what any run has
_ATTEMPTS = 32  # replacements tried for one slot before the data set is given up


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is trained on, and how it is cut into batches"""

    data_path: list[str] | None = None
    """Training pairs (docs/data.md): PATH of a JSON list or JSONL file, PATH PATH ..., or WEIGHT PATH WEIGHT PATH ...
    for shares of every step; default: the generated mini-MMEB."""
    data_root: str | None = None
    """Folder that media paths start at and cannot leave; default: each data file's own folder."""
    seq_length: int = 12288
    """Most tokens of one side; longer reasoning is shortened, and what still does not fit is a bad sample."""
    global_batch_size: int = 32
    """Pairs of one step, over all ranks."""
    micro_batch_size: int = 4
    """Most pairs that go through the model together on one rank."""
    max_tokens_per_micro_batch: int | None = None
    """Most tokens of a micro-batch, both sides of its pairs together; default: only micro_batch_size counts."""
    max_patches_per_micro_batch: int | None = None
    """Most image patches of a micro-batch; default: only micro_batch_size counts."""
    balance_batch: bool = True
    """Share a step's work out by modelled FLOPs: over data-parallel ranks, and over SFT's micro-batches of a rank.
    What is trained on stays the same.  Not without cached_contrastive, which compares what stands in a micro-batch."""
    data_block_size: int = 64
    """Consecutive pairs of a batch that come from one data set."""
    num_workers: int = 0
    """Processes of each rank that decode ahead; 0 decodes in the training process."""
    prefetch_factor: int = 2
    """Steps that each worker holds ready."""
    max_bad_sample_fraction: float = 0.1
    """Share of bad samples (counted, listed, replaced) over which the run stops; 0 allows none."""
    min_pixels: int | None = None
    """Fewest pixels of an image after resizing; default: the model directory's, else 768."""
    max_pixels: int | None = None
    """Most pixels of an image after resizing; default: the model directory's, else 2359296."""
    video_min_pixels: int | None = None
    """Fewest pixels of a video frame after resizing; default: the model directory's, else 3136."""
    video_max_pixels: int | None = None
    """Most pixels of a video frame after resizing; default: the model directory's, else 25088."""
    num_frames: int | None = None
    """Frames that are taken from a video file, evenly spaced; lists of frames are taken as they are.  Default: what
    the model directory's training took, else 8."""
    max_frames: int = MAX_FRAMES
    """Most frames in a list of frames; a longer one is a bad sample."""
    max_source_pixels: int = MAX_SOURCE_PIXELS
    """Most pixels of an image file as it is stored, checked before it is decoded."""
    blank_image_for_text: bool | None = None
    """Give text-only sides a white 28 x 28 image, as the published UME-R1 code does.  Default: as in the training that
    the model directory comes from, else off."""

    def violations(self, dp_size: int | None = None) -> list[str]:
        """Every broken rule; with `dp_size` those of the layout too."""
        found = []
        at_least_one = ["seq_length", "global_batch_size", "micro_batch_size", "data_block_size", "prefetch_factor"]
        at_least_one += ["max_tokens_per_micro_batch", "max_patches_per_micro_batch", "max_frames", "num_frames"]
        at_least_one += ["max_source_pixels", "min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels"]
        found += bound_problems(self, 1, *at_least_one) + bound_problems(self, 0, "num_workers")
        for name in ("seq_length", "global_batch_size"):
            if getattr(self, name) > _MOST:
                found.append(f"{name}={getattr(self, name)} must be at most {_MOST:,}")
        if not 0 <= self.max_bad_sample_fraction <= 1:
            found.append(f"max_bad_sample_fraction={self.max_bad_sample_fraction} must be between 0 and 1")
        for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
            lower, upper = getattr(self, low), getattr(self, high)
            if lower is not None and upper is not None and lower > upper:
                found.append(f"{low}={lower} is above {high}={upper}")
        if self.data_path is not None:
            try:
                data_files(self.data_path)
            except ValueError as error:
                found += error.args
        found += data_root_problems(self.data_root)
        if self.data_root is not None and self.data_path is None:
            found.append("data_root is given without data_path; give both")
        if dp_size is not None and dp_size >= 1 and self.global_batch_size % dp_size:
            below = self.global_batch_size // dp_size * dp_size
            legal = f"{below} or {below + dp_size}" if below else f"{dp_size} or another multiple"
            found.append(
                f"global_batch_size={self.global_batch_size} is not a multiple of the {dp_size} data-parallel ranks; "
                f"use {legal}"
            )
        return found


@dataclass(slots=True)
class StepData:
    """What one rank reads of one step."""

    step: int
    slots: np.ndarray  # int64 [pairs of this rank]: places in the global batch
    indices: np.ndarray  # int64 [pairs of this rank]: what was used, replacements included; equal on TP and PP peers
    pairs: list[EncodedPair] | list[PromptPair] = field(default_factory=list)  # in the order of `slots`
    seen: int = 0  # samples tried
    work: DecodeWork = field(default_factory=DecodeWork)  # decoding that the share took, bad samples included
    bad: list[BadRecord] = field(default_factory=list)
    failure: str | None = None  # why the share could not be filled; `pairs` are then empty


class SlotFiller:
    """`filler[step]` is the StepData of one rank: a map-style dataset, so that workers can make steps ahead.

    Says which pair stands in which slot.  spread: the rank reads every dp_size-th slot, so that each rank has about the
    same of every data set (a batch is made of blocks of one data set each); otherwise consecutive slots.
    """

    spread = False

    def __init__(
        self,
        dataset: RecordFile | Blend,
        sampler: BlockSampler,
        config: DataConfig,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        self.dataset, self.sampler, self.config = dataset, sampler, config
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __getitem__(self, step: int) -> StepData:
        slots, indices = self.sampler.share(step, self.dp_rank, self.dp_size, spread=self.spread)
        data = StepData(step, slots, np.zeros(len(slots), dtype=np.int64))
        self.dataset.processor.vision.work = data.work
        pairs = []
        for place, (slot, index) in enumerate(zip(slots.tolist(), indices.tolist(), strict=True)):
            pair = self._usable(data, slot, index)
            if pair is None:
                return data
            data.indices[place], pair.slot = pair.index, slot
            pairs.append(self._finished(pair))
        data.pairs = pairs
        return data

    def _finished(self, pair: Any) -> Any:
        """A usable pair as the trainer takes it."""
        return pair

    def _usable(self, data: StepData, slot: int, index: int) -> Any | None:
        """The pair of a slot, or the first replacement that can be used; None, with the reason, when there is none."""
        tried = index
        for attempt in range(1, _ATTEMPTS + 2):
            data.seen += 1
            try:
                return self.dataset[tried]
            except BadSample as error:
                name = self.dataset.dataset_name(tried)
                data.bad.append(BadRecord(tried, name, error.cause, error.detail))
            tried = self.sampler.replacement(data.step, slot, attempt, index)
        last = data.bad[-1]
        data.failure = (
            f"data set {last.dataset or '(unnamed)'!r} gave no usable pair in {_ATTEMPTS} attempts; the last one, "
            f"record {last.index}: {last.cause}: {last.detail}"
        )
        return None


class StepMaker(SlotFiller):
    """SFT: the pairs of a PairDataset.  Which of them go together depends on what the other ranks have read.

    disc_only: leave out what follows `<disc_emb>` (L_disc alone).
    """

    spread = True

    def __init__(
        self,
        dataset: PairDataset | Blend,
        sampler: BlockSampler,
        config: DataConfig,
        *,
        disc_only: bool = False,
        **layout: int,
    ):
        super().__init__(dataset, sampler, config, **layout)
        self.disc_only = disc_only

    def _finished(self, pair: EncodedPair) -> EncodedPair:
        special = self.dataset.processor.special
        return cut_after_disc(pair, (special.image_pad, special.video_pad)) if self.disc_only else pair


class PromptStepMaker(SlotFiller):
    """RL: the pairs of a PromptDataset.  What is packed depends on the responses to come."""


class Loader:
    """Steps in order from `sampler.step` on; counts and lists bad samples as their step is handed out.

    bad_samples_path: where they are listed; give it to one rank of each tensor- and pipeline-parallel group alone.
    `next()` does not raise for bad data: `counts` tells all ranks together (BadSampleCounts.check).
    """

    def __init__(self, maker: SlotFiller, bad_samples_path: str | Path | None = None):
        self.maker, self.sampler, self.config = maker, maker.sampler, maker.config
        self.counts = BadSampleCounts(maker.dataset.names)
        self._log = None if bad_samples_path is None else BadSampleLog(bad_samples_path)
        self._steps = None
        self.work, self.waited = DecodeWork(), 0.0  # of the last step: its decoding, and seconds of waiting for it

    def next(self) -> StepData:
        """This rank's share of the next step."""
        if self._steps is None:
            self._steps = self._start()
        started = time.perf_counter()
        data = shipping.arrived(next(self._steps))
        self.work, self.waited = data.work, time.perf_counter() - started
        assert data.step == self.sampler.step
        self.sampler.step += 1
        self.counts.note(data.seen, data.bad, data.failure)
        if self._log is not None and data.bad:
            with dispensable(f"bad samples of step {data.step} ({data.bad})"):
                self._log.append(data.bad)
        return data

    def _start(self):
        steps = itertools.count(self.sampler.step)
        if self.config.num_workers == 0:
            return map(self.maker.__getitem__, steps)
        return iter(
            DataLoader(
                shipping.Sending(self.maker),
                batch_size=None,
                sampler=_Counting(self.sampler.step),
                num_workers=self.config.num_workers,
                prefetch_factor=self.config.prefetch_factor,
                collate_fn=shipping.as_it_is,
                worker_init_fn=_follow_the_trainer,
                generator=torch.Generator(),  # of its own: the global state must not depend on the number of workers
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON: the order's place and the counts.  Steps that workers made ahead are made again after a resume."""
        return {"sampler": self.sampler.state_dict(), "bad_samples": self.counts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, at any number of ranks and workers."""
        self.close()
        self.sampler.load_state_dict(state["sampler"])
        self.counts.load_state_dict(state["bad_samples"])

    def close(self) -> None:
        """End the workers."""
        self._steps = None


def _follow_the_trainer(worker: int) -> None:
    """Schedulers and terminals signal every process of a job; the trainer saves, leaves and ends its workers.

    A trainer that is killed cannot; torch's workers would notice after some seconds, and hold its memory until then.
    """
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Counting:
    """Steps from `start` on, without end."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self):
        return itertools.count(self.start)
