"""Weights between a Hugging Face directory and Qwen2VL modules, bit for bit, at any TP / PP / VPP.

Import: every rank reads only its own slices.  Export: collective, one tensor at a time; rank 0 gets each whole.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.export import MAX_SHARD_BYTES, DirectoryWriter, destination_problem
from umer1.models.qwen2_vl.safetensors_index import DTYPE_BYTES
from umer1.models.qwen2_vl.weight_table import Row, first_name, hf_shapes, hub_name, rows

logger = logging.getLogger(__name__)

# Parameters that a trainer hangs on the model and that are no part of Qwen2-VL.
_NOT_OF_THE_MODEL = ("log_scale",)


def stored_dtype(directory: HFDirectory) -> torch.dtype:
    """The type that holds every tensor of the directory exactly: bfloat16 if all are, else float32."""
    kinds = {entry.dtype for entry in directory.tensors.values()}
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def load_hf(models: list[torch.nn.Module], directory: HFDirectory, parallel: ParallelState) -> None:
    """Fill this rank's chunks; values are cast to each parameter's dtype.  Raises one UserError with all that is wrong.

    Rows of added embedding tokens start from the rows that METHOD section 1 names; padding rows are zero.
    """
    _check_tensors(directory)
    by_name = named_weights(models)
    with ExitStack() as stack, torch.no_grad():
        reader = _Reader(directory, parallel, stack)
        for row in rows(directory.config):
            if row.name in by_name:
                parameter = by_name.pop(row.name)
                value = reader.read(row, parameter.shape[0])
                if value.shape != parameter.shape:
                    raise AssertionError(f"{row.name}: {tuple(value.shape)} read for {tuple(parameter.shape)}")
                parameter.copy_(value)
    if by_name:
        raise AssertionError(f"parameters without a row in the weight table: {sorted(by_name)}")


def export_hf(models: list[torch.nn.Module], parallel: ParallelState) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hub name, whole CPU tensor) on rank 0, in the table's order and the parameters' dtype.

    Collective over the first data-parallel replica: every rank must exhaust the iterator, the others yield nothing.
    Rank 0 holds one tensor (and its pieces) at a time.
    """
    if parallel.dp_rank != 0:
        return
    config = unwrap(models[0]).model_config
    by_name = named_weights(models)
    owner = _owners(list(by_name), parallel)
    shapes = hf_shapes(config)
    for row in rows(config):
        if row.name == "output_layer.weight" and config.tie_word_embeddings:
            continue
        stage = owner[row.name]
        parts = _gather(by_name[row.name].detach(), row, config, parallel) if parallel.pp_rank == stage else None
        if parallel.tp_rank != 0 or parallel.pp_rank not in (0, stage):
            continue
        for index, name in enumerate(row.hf):
            tensor = parts[index] if parts else torch.empty(0)
            if stage != 0:
                tensor = _send_to_first_stage(tensor, shapes[name], stage, models, parallel)
            if parallel.rank == 0:
                if tuple(tensor.shape) != shapes[name]:
                    raise AssertionError(f"{name}: {tuple(tensor.shape)} exported, {shapes[name]} expected")
                yield name, tensor.cpu()


def save_hf(
    models: list[torch.nn.Module],
    source: HFDirectory,
    destination: str | Path,
    parallel: ParallelState,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights (Hub names, `dtype` or the parameters' own) and `source`'s assets to `destination`; collective.

    An earlier export there is replaced in one step.  Raises UserError on every rank when rank 0 could not write.
    """
    destination = Path(destination).absolute()
    agree(destination_problem(destination) if parallel.rank == 0 else None, parallel)
    dtype = dtype or next(iter(named_weights(models).values())).dtype
    writer = DirectoryWriter(destination, source, dtype, max_shard_bytes) if parallel.rank == 0 else None
    for name, tensor in export_hf(models, parallel):
        writer.add(name, tensor)
    agree(writer.finish() if writer else None, parallel)


def agree(problem: str | None, parallel: ParallelState) -> None:
    """Raise rank 0's problem as a UserError on every rank."""
    message = [problem]
    if parallel.world_size > 1:
        dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise UserError(message[0])


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The Qwen2VL inside megatron's wrappers."""
    while not hasattr(model, "model_config"):
        model = model.module
    return model


def named_weights(models: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Table name (global layer number) -> parameter, over this rank's chunks; DDP wrappers are looked through."""
    found: dict[str, torch.nn.Parameter] = {}
    for model in map(unwrap, models):
        for name, parameter in model.named_parameters():
            if name in _NOT_OF_THE_MODEL:
                continue
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
            found[first_name(name)] = parameter
    return found


class _Reader:
    """Reads this rank's share of the Hugging Face tensors of a row."""

    def __init__(self, directory: HFDirectory, parallel: ParallelState, stack: ExitStack):
        self.directory, self.parallel, self.stack = directory, parallel, stack
        self.stored = {hub_name(name): (name, entry) for name, entry in directory.tensors.items()}
        self.handles: dict[Path, Any] = {}

    def read(self, row: Row, local_rows: int) -> torch.Tensor:
        if row.layout.vocabulary:
            return self._vocabulary(row.hf[0], local_rows, is_head=row.name == "output_layer.weight")
        parts = [part for name in row.hf for part in self._share(name, row.layout.axis, row.layout.sections)]
        return row.layout.fuse(parts, self.directory.config)

    def _slice(self, name: str):
        stored_name, entry = self.stored[name]
        if entry.file not in self.handles:
            self.handles[entry.file] = self.stack.enter_context(safe_open(str(entry.file), framework="pt"))
        return self.handles[entry.file].get_slice(stored_name), entry.shape

    def _share(self, name: str, axis: int | None, sections: int) -> list[torch.Tensor]:
        """This rank's even share along `axis` of each of `sections` blocks of rows."""
        source, shape = self._slice(name)
        if axis is None:
            return [source[:]]
        size, rank = self.parallel.tp_size, self.parallel.tp_rank
        block = shape[axis] // sections
        share = block // size
        begins = [section * block + rank * share for section in range(sections)]
        return [source[b : b + share] if axis == 0 else source[:, b : b + share] for b in begins]

    def _vocabulary(self, name: str, local_rows: int, *, is_head: bool) -> torch.Tensor:
        """Rows [rank * local_rows, ...): the file's, then those of added tokens, then zeros."""
        source, (file_rows, hidden) = self._slice(name)
        begin = self.parallel.tp_rank * local_rows
        end = min(begin + local_rows, file_rows)
        table = source[begin:end] if begin < end else source[0:0]
        table = torch.cat([table, table.new_zeros(local_rows - table.shape[0], hidden)])
        # An untied head keeps its spare rows as they are; only rows that it never had need a start.
        untied_head = is_head and not self.directory.config.tie_word_embeddings
        for row, start in self.directory.initial_rows.items():
            if begin <= row < begin + local_rows and not (untied_head and row < file_rows):
                table[row - begin] = source[start : start + 1][0]
        return table


def _check_tensors(directory: HFDirectory) -> None:
    """Every missing, unexpected, doubled or mis-shaped tensor of the directory in one UserError."""
    config = directory.config
    expected = hf_shapes(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in expected:
            expected[name] = (directory.file_vocab_size, config.hidden_size)
    problems, seen = [], set()
    for stored_name, entry in sorted(directory.tensors.items()):
        name = hub_name(stored_name)
        if name in seen:
            problems.append(f"{name} is there twice, under an older and a newer name")
        seen.add(name)
        if name not in expected:
            # Buffers that are computed, and the second copy of a tied head, are known not to be needed.
            if not name.endswith("rotary_emb.inv_freq") and not (
                name == "lm_head.weight" and config.tie_word_embeddings
            ):
                problems.append(f"{stored_name} is not a tensor of this model")
        elif entry.shape != expected[name]:
            problems.append(f"{stored_name} has shape {list(entry.shape)}, expected {list(expected[name])}")
        elif entry.dtype not in DTYPE_BYTES:
            problems.append(f"{stored_name} has dtype {entry.dtype}, expected one of {', '.join(DTYPE_BYTES)}")
    problems += [f"{name} is missing" for name in expected if name not in seen]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:50])
        more = f"\n  - and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise UserError(f"{directory.path}: the weights do not fit config.json:\n{shown}{more}")


def _owners(names: list[str], parallel: ParallelState) -> dict[str, int]:
    """Table name -> first pipeline stage that holds it (the tied table is on the first and the last)."""
    stages: list[list[str]] = [names]
    if parallel.pp_size > 1:
        stages = [[] for _ in range(parallel.pp_size)]
        dist.all_gather_object(stages, names, group=parallel.groups.pp)
    return {name: stage for stage in reversed(range(len(stages))) for name in stages[stage]}


def _gather(local: torch.Tensor, row: Row, config: Qwen2VLConfig, parallel: ParallelState) -> list[torch.Tensor] | None:
    """The row's Hugging Face tensors, whole, on tensor-parallel rank 0; None on the others."""
    shards = [local]
    if parallel.tp_size > 1 and row.layout.axis is not None:
        first = parallel.tp_rank == 0
        shards = [torch.empty_like(local) for _ in range(parallel.tp_size)] if first else None
        dist.gather(local.contiguous(), shards, group=parallel.groups.tp, group_dst=0)
    if parallel.tp_rank != 0:
        return None
    pieces = [row.layout.split(shard, config) for shard in shards]
    parts = [
        torch.cat(same, dim=row.layout.axis or 0) if len(same) > 1 else same[0] for same in zip(*pieces, strict=True)
    ]
    if row.layout.sections > 1:
        parts = [torch.cat(parts)]
    if row.layout.vocabulary:
        parts = [part[: config.vocab_size] for part in parts]
    return [part.contiguous() for part in parts]


def _send_to_first_stage(
    tensor: torch.Tensor, shape: tuple[int, ...], stage: int, models: list[torch.nn.Module], parallel: ParallelState
) -> torch.Tensor:
    """From stage `stage` to stage 0 of this pipeline; returns what arrived (on the sender: what was sent)."""
    if parallel.pp_rank == stage:
        dist.send(tensor, group=parallel.groups.pp, group_dst=0)
        return tensor
    dtype = next(iter(named_weights(models).values())).dtype
    received = torch.empty(shape, dtype=dtype, device=parallel.device)
    dist.recv(received, group=parallel.groups.pp, group_src=stage)
    return received
