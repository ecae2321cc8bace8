"""Each step's micro-batches on every rank: loaded once for a data-parallel rank, then sent to its TP and PP peers.

One rank of each tensor- and pipeline-parallel group reads files, so that a picture is decoded once and peers can never
disagree about a bad sample.  Everything that can be wrong with the data raises on all ranks together.
"""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from umer1.data.bad_samples import BadSampleCounts
from umer1.data.blend import Blend
from umer1.data.data_path import data_files
from umer1.data.dataset import PairDataset, RecordFile
from umer1.data.images import ImageConfig
from umer1.data.input_settings import settle_inputs
from umer1.data.loader import DataConfig, Loader, StepData, StepMaker
from umer1.data.packing import pack, pair_cost, plan_micro_batches
from umer1.data.processor import Processor
from umer1.data.sampler import BlockSampler
from umer1.data.schema import EncodedPair, PackedBatch
from umer1.data.weighted_sampler import WeightedBlockSampler
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.frames import Frames
from umer1.training.config import SFTConfig
from umer1.training.exchange import costs_of_all_ranks, exchange, shared_out
from umer1.training.flops import pair_flops

_TICKS = 1_000_000  # of a second, in reductions of whole numbers
R = TypeVar("R", bound=RecordFile)


def make_processor(data: DataConfig, directory: HFDirectory, max_length: int | None) -> Processor:
    """The processor that training uses, `max_length` in tokens of one side; open settings of `data` are filled in."""
    settle_inputs(data, directory)
    return Processor(
        directory.tokenizer,
        directory.special,
        directory.config,
        ImageConfig.of_directory(directory, data),
        max_length,
        max_frames=data.max_frames,
        blank_image_for_text=data.blank_image_for_text,
    )


def open_data(kind: type[R], data: DataConfig, processor: Processor) -> R | Blend:
    """The files of --data-path as one data set; UserError when one of them is none."""
    bounds = {"max_source_pixels": data.max_source_pixels}
    files = [kind(file.path, data.data_root, processor, **bounds) for file in data_files(data.data_path)]
    return files[0] if len(files) == 1 else Blend(files)


def make_sampler(data: DataConfig, dataset: RecordFile | Blend, seed: int) -> BlockSampler:
    """The order of `dataset`."""
    files = data_files(data.data_path)
    sizes = data.global_batch_size, data.data_block_size, seed
    try:
        if isinstance(dataset, Blend) and files[0].weight is not None:
            paths, weights = [str(file.path) for file in files], [file.weight for file in files]
            sampler = WeightedBlockSampler(dataset.name_ids, dataset.names, dataset.file_ids, paths, weights, *sizes)
        else:
            sampler = BlockSampler(dataset.name_ids, dataset.names, *sizes)
    except UserError as error:
        raise UserError(f"{' '.join(data.data_path)}: {error}") from None
    sampler.contents = dataset.contents
    return sampler


def make_loader(config: SFTConfig, directory: HFDirectory, state: ParallelState) -> Loader:
    """The loader of a data-parallel rank's source."""
    data = config.data
    processor = make_processor(data, directory, data.seq_length)
    dataset = open_data(PairDataset, data, processor)
    maker = StepMaker(
        dataset,
        make_sampler(data, dataset, config.run.seed),
        data,
        dp_rank=state.dp_rank,
        dp_size=state.dp_size,
        disc_only=config.loss.weights()[1:] == (0.0, 0.0),
    )
    return Loader(maker, bad_samples_path(config.checkpoint.save))


def bad_samples_path(save: str | None) -> str | None:
    """Where bad samples are listed."""
    return None if save is None else f"{save}/bad_samples.jsonl"


def raise_together(failure: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise UserError on every rank when any rank has a failure; the first rank's text."""
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    found = [text for text in failures if text is not None]
    if found:
        raise UserError(found[0])


def unlike_first(contents: list[tuple[str, str]], state: ParallelState) -> str | None:
    """Which of a source's files, (path, digest) each, are not those of rank 0; collective over sources."""
    of_ranks: list[list[str]] = [[]] * state.dp_size
    dist.all_gather_object(of_ranks, [digest for _, digest in contents], group=state.groups.dp)
    other = [path for path, digest in contents if digest not in of_ranks[0]]
    if not other:
        return None
    return (
        f"rank {state.rank} on {socket.gethostname()} reads another {', '.join(other)} than rank 0; give all machines "
        "the same files, and start when nobody writes them any more"
    )


class DataSource:
    """Data of one rank of each tensor- and pipeline-parallel group, and what all ranks have to agree on about it.

    make: gives that rank's loader; UserErrors of it are raised on all ranks.  State and counts go into the checkpoint.
    """

    def __init__(self, make: Callable[[], Loader], data: DataConfig, save: str | None, state: ParallelState):
        self.data, self.state, self.listed_in = data, state, bad_samples_path(save)
        self.is_source = state.tp_rank == 0 and state.pp_rank == 0
        self.loader: Loader | None = None
        self.work = [0, 0, 0, 0]  # see _work
        self.drawn: list[tuple[np.ndarray, np.ndarray]] = []  # slots and pairs of steps, until they are taken
        self.waiting: Callable[[str], None] = lambda name: None  # called when this rank's share is there
        failure = None
        if self.is_source:
            try:
                self.loader = make()
            except UserError as error:
                failure = str(error)
        raise_together(failure)
        # ranks of other files would have another order each, and a pair could stand in a batch twice
        raise_together(unlike_first(self.loader.sampler.contents, state) if self.is_source else None)

    def draw(self) -> StepData:
        """On sources: this rank's share of the next step."""
        step = self.loader.next()
        self.drawn.append((step.slots, step.indices))
        self.waiting("waiting for the other ranks' data")
        return step

    def take_drawn(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """int64 (slots, indices) of the steps that were drawn since the last call; none but on sources."""
        drawn, self.drawn = self.drawn, []
        return drawn

    @property
    def counts(self) -> BadSampleCounts:
        """On sources: samples seen and bad ones, over all data-parallel ranks and resumes."""
        return self.loader.counts

    def agree(self, own_failure: str | None) -> str | None:
        """Sum the counts over data-parallel sources; why the run has to stop, if so."""
        group, device = self.state.groups.dp, self.state.device
        counted, work, failed = self.counts.take_delta(), self._work(), torch.tensor([own_failure is not None])
        delta = torch.cat([counted, work, failed]).to(device)
        dist.all_reduce(delta, group=group)
        self.counts.add(delta[: len(counted)])
        self.work = [mine + new for mine, new in zip(self.work, delta[len(counted) : -1].tolist(), strict=True)]
        failure = None
        if delta[-1]:
            texts: list[str | None] = [None] * self.state.dp_size
            dist.all_gather_object(texts, own_failure, group=group)
            first = next(text for text in texts if text is not None)
            failure = f"{first}. {self.counts.report()}. {self._listed()}Check --data-root and the data file"
        else:
            try:
                self.counts.check(self.data.max_bad_sample_fraction, self.listed_in)
            except UserError as error:
                failure = str(error)
        return failure

    def _work(self) -> torch.Tensor:
        """int64 [4] of the loader's last step: images, frames, microseconds of decoding and of waiting for it."""
        work, ticks = self.loader.work, _TICKS
        return torch.tensor([work.images, work.frames, round(work.seconds * ticks), round(self.loader.waited * ticks)])

    def take_work(self) -> dict[str, float]:
        """On sources, since the last call: what all data-parallel ranks decoded, and their mean wait in seconds."""
        images, frames, decoding, waiting = self.work
        self.work = [0, 0, 0, 0]
        seconds = {"seconds_decoding": decoding / _TICKS, "seconds_waiting": waiting / _TICKS / self.state.dp_size}
        return {"images": images, "frames": frames, **seconds}

    def _listed(self) -> str:
        return f"They are listed in {self.listed_in}. " if self.listed_in else ""

    def describe(self) -> str:
        """On sources: what is trained on."""
        dataset = self.loader.maker.dataset
        notes = "".join(f"; {note}" for note in self.loader.sampler.notes())
        return f"{' '.join(self.data.data_path)}: {len(dataset)} pairs of {len(dataset.names)} data sets{notes}"

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


class BatchSource(DataSource):
    """SFT: `next()` gives this rank's micro-batches on its device."""

    def __init__(self, config: SFTConfig, directory: HFDirectory, state: ParallelState):
        super().__init__(lambda: make_loader(config, directory, state), config.data, config.checkpoint.save, state)
        self.config, self.model = config, directory.config
        interleaved = config.parallel.num_layers_per_virtual_pipeline_stage is not None
        self.multiple_of = state.pp_size if interleaved else 1  # of micro-batches, for the interleaved schedule
        self.pad_to_multiple = config.fp8.token_multiple(state.tp_size if config.parallel.sequence_parallel else 1)
        self.balances = config.data.balance_batch and config.loss.cached_contrastive

    def next(self) -> list[PackedBatch]:
        """The micro-batches; their number may differ by data-parallel rank."""
        batches, failure = [], None
        if self.is_source:
            step = self.draw()
            failure = self.agree(step.failure)
            if failure is None:
                batches = self.packed(step.pairs)
        if self.state.tp_size * self.state.pp_size > 1:
            pixels = [batch.pixel_values for batch in batches]
            for batch in batches:
                batch.pixel_values = emptied(batch.pixel_values)
            batches, failure = send_to_peers((batches, failure), self.state)
            shares = [Frames.of(batch.grid_thw, self.model.vision, *divided(self.state)) for batch in batches]
            for batch, values in zip(batches, send_pixels(pixels, self.state, shares), strict=True):
                batch.pixel_values = values
        if failure is not None:
            raise UserError(failure)
        return [batch.to(self.state.device) for batch in batches]

    def packed(self, pairs: list[EncodedPair]) -> list[PackedBatch]:
        """On sources: micro-batches of the pairs that this rank shall compute.  Collective where ranks are balanced."""
        data = self.data
        if self.balances and self.state.dp_size > 1:
            pairs = balanced(pairs, self.costs(pairs), self.state)
        sizes = [pair_cost(pair) for pair in pairs]
        plan = plan_micro_batches(
            [tokens for tokens, _ in sizes],
            [patches for _, patches in sizes],
            data.micro_batch_size,
            data.max_tokens_per_micro_batch,
            data.max_patches_per_micro_batch,
            multiple_of=self.multiple_of,
            costs=self.costs(pairs) if self.balances else None,
        )
        return [pack([pairs[place] for place in places], self.pad_to_multiple) for places in plan]

    def costs(self, pairs: list[EncodedPair]) -> list[float]:
        return [pair_flops(pair, self.model, self.config.model.train_vision) for pair in pairs]


def balanced(pairs: list[EncodedPair], costs: list[float], state: ParallelState) -> list[EncodedPair]:
    """The pairs that this rank shall compute, of those that all data-parallel ranks have read; as many as it gave."""
    owners = shared_out(costs_of_all_ranks(costs, state.groups.dp, state.device))
    items = exchange([(pair, None) for pair in pairs], owners, state.groups.dp, state.device)
    return [pair for pair, _ in items]


def send_to_peers(value: Any, state: ParallelState) -> Any:
    """The source's `value`, on all ranks of its tensor- and pipeline-parallel group; for all but pixels."""
    group = state.groups.mp
    message = [value]
    dist.broadcast_object_list(message, dist.get_process_group_ranks(group)[0], group=group)
    return message[0]


def emptied(pixels: torch.Tensor) -> torch.Tensor:
    """[0, patch_dim] that travels light: a slice of no rows would be pickled with all that it is a slice of.

    On the CPU, as a pickled CUDA tensor goes to the device that it came from.
    """
    return torch.empty(0, *pixels.shape[1:], dtype=pixels.dtype)


def divided(state: ParallelState) -> tuple[int, int]:
    """(this rank, ranks) that divide a micro-batch's pictures."""
    return (state.tp_rank, state.tp_size) if state.vision_data_parallel else (0, 1)


def send_pixels(
    pixels: list[torch.Tensor], state: ParallelState, shares: list[Frames] | None = None
) -> list[torch.Tensor]:
    """The source's fp32 [P, patch_dim] tensors on the ranks of the first stage, which has the ViT; empty elsewhere.

    shares: who sees what of each tensor; without it the ranks of that stage get all of it.
    """
    shapes = send_to_peers([tuple(tensor.shape) for tensor in pixels], state)
    if state.pp_rank != 0:
        return [torch.empty(0, *shape[1:]) for shape in shapes]
    source = dist.get_process_group_ranks(state.groups.mp)[0]
    arrived = []
    for position, shape in enumerate(shapes):
        whole = pixels[position].to(state.device).contiguous() if state.rank == source else None
        if shares is not None and shares[position].ranks > 1:
            arrived.append(_scatter(whole, shape, shares[position], source, state))
            continue
        mine = torch.empty(shape, device=state.device) if whole is None else whole
        if mine.numel() and state.tp_size > 1:
            dist.broadcast(mine, source, group=state.groups.tp)
        arrived.append(mine)
    return arrived


def _scatter(
    whole: torch.Tensor | None, shape: tuple[int, int], share: Frames, source: int, state: ParallelState
) -> torch.Tensor:
    """Each rank's share of `whole`, which the source has; filled up to the longest on the way, as a collective asks."""
    counts = share.patches
    arriving = torch.empty(max(counts), shape[1], device=state.device)
    parts = None
    if whole is not None:
        places = [share.patches_of(rank).to(state.device) for rank in range(share.ranks)]
        parts = [F.pad(whole.index_select(0, own), (0, 0, 0, len(arriving) - len(own))) for own in places]
    if len(arriving):
        dist.scatter(arriving, parts, src=source, group=state.groups.tp)
    return arriving[: counts[share.rank]].clone()
