"""Weights between Hugging Face tensors and Qwen2VL modules, bit for bit, at any TP / PP / VPP.

Import: from a directory, of which every rank reads only its own slices, or from a stream of whole tensors.
Export: collective, one row of the weight table at a time; rank 0 gets each tensor whole, of a stream every rank.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from umer1.distributed.fp8_weights import is_fp8
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.fp8 import fill
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.export import MAX_SHARD_BYTES, DirectoryWriter, destination_problem
from umer1.models.qwen2_vl.safetensors_index import DTYPE_BYTES
from umer1.models.qwen2_vl.weight_shards import Assembler, cut, exported_rows, join, shares
from umer1.models.qwen2_vl.weight_table import Row, first_name, hf_shapes, hub_name, rows

logger = logging.getLogger(__name__)

_NO_FP8: Mapping[torch.nn.Parameter, torch.Tensor] = MappingProxyType({})
# Parameters that a trainer hangs on the model and that are no part of Qwen2-VL.
_NOT_OF_THE_MODEL = ("log_scale",)


def stored_dtype(directory: HFDirectory) -> torch.dtype:
    """The type that holds every tensor of the directory exactly: bfloat16 if all are, else float32."""
    kinds = {entry.dtype for entry in directory.tensors.values()}
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def load_hf(
    models: list[torch.nn.Module],
    directory: HFDirectory,
    parallel: ParallelState,
    working: Callable[[], None] = lambda: None,
) -> None:
    """Fill this rank's chunks; values are cast to each parameter's dtype.  Raises one UserError with all that is wrong.

    Rows of added embedding tokens start from the rows that docs/method.md, 1 names; padding rows are zero.  working:
    called after each parameter.
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
                fill(parameter, value)
                working()
    if by_name:
        raise AssertionError(f"parameters without a row in the weight table: {sorted(by_name)}")


def export_hf(
    models: list[torch.nn.Module], parallel: ParallelState, of_fp8: Mapping[torch.nn.Parameter, torch.Tensor] = _NO_FP8
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hub name, whole CPU tensor) on rank 0, in the table's order and the parameters' dtype.

    Collective over the first data-parallel replica: every rank must exhaust the iterator, the others yield nothing.
    Rank 0 holds one tensor (and its pieces) at a time.  of_fp8: weight in FP8 -> what stands for it, on any device.
    """
    if parallel.dp_rank != 0:
        return
    config = unwrap(models[0]).model_config
    assembler = Assembler(_outgoing(models, of_fp8), config, parallel)
    for row in exported_rows(config):
        for name, tensor in zip(row.hf, assembler.assemble(row), strict=parallel.rank == 0):
            yield name, tensor.cpu()


def stream_hf(models: list[torch.nn.Module], parallel: ParallelState) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hub name, whole tensor on `parallel.device`) on EVERY rank; order and dtype as `export_hf`'s.

    Collective over the world: every rank must exhaust the iterator, one that leaves early leaves the others waiting.
    A rank holds one row of the table at a time.  What is yielded may be a parameter itself: copy it, don't write to it.
    """
    config = unwrap(models[0]).model_config
    weights = _outgoing(models, _NO_FP8)
    dtype = next(iter(weights.values())).dtype
    assembler = Assembler(weights, config, parallel) if parallel.dp_rank == 0 else None
    shapes = hf_shapes(config)
    for row in exported_rows(config):
        whole = assembler.assemble(row) if assembler else []
        for index, name in enumerate(row.hf):
            first = parallel.rank == 0
            tensor = whole[index] if first else torch.empty(shapes[name], dtype=dtype, device=parallel.device)
            if parallel.world_size > 1:
                dist.broadcast(tensor, src=0)
            yield name, tensor


def whole_here(models: list[torch.nn.Module], parallel: ParallelState) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hub name, whole tensor) of what this rank holds without its neighbours; not collective.

    Without tensor parallelism that is all of its pipeline stage, with it what is not cut over the ranks (norms,
    biases of rows, a ViT that is whole on each).
    """
    config = unwrap(models[0]).model_config
    weights = named_weights(models)
    for row in rows(config):
        if row.name in weights and shares(row, parallel)[0] == 1:
            yield from zip(row.hf, join([weights[row.name].detach()], row, config), strict=True)


def load_stream(
    models: list[torch.nn.Module],
    stream: Iterable[tuple[str, torch.Tensor]],
    config: Qwen2VLConfig,
    parallel: ParallelState,
) -> None:
    """Fill this rank's chunks from (Hub name, whole tensor) in any order; values are cast to each parameter's dtype.

    Not collective: each rank cuts its share out of its own stream.  Only the tensors of rows that are not yet complete
    are held (with the table's order, of one row).  Raises ValueError for a name that is unexpected, doubled or missing
    and for a wrong shape; parameters that were filled before stay filled.
    """
    by_name, shapes = named_weights(models), hf_shapes(config)
    wanted: dict[str, list[Row]] = {}
    for row in rows(config):
        for name in row.hf if row.name in by_name else ():
            wanted.setdefault(name, []).append(row)
    seen: set[str] = set()
    shares: dict[str, dict[str, list[torch.Tensor]]] = {}  # row -> Hugging Face name -> this rank's share
    with torch.no_grad():
        for name, tensor in stream:
            if name not in shapes or name in seen:
                raise ValueError(f"{name} {'came twice' if name in seen else 'is not a tensor of this model'}")
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shapes[name])}")
            seen.add(name)
            for row in wanted.get(name, ()):
                parameter, held = by_name[row.name], shares.setdefault(row.name, {})
                held[name] = cut(tensor, shapes[name], row, parameter.shape[0], parallel)
                if len(held) == len(row.hf):
                    parameter.copy_(row.layout.fuse([part for n in row.hf for part in held[n]], config))
                    del shares[row.name]
    missing = [name for name in shapes if name not in seen]
    if missing:
        raise ValueError(f"{len(missing)} tensors did not come: {', '.join(missing[:10])}")


def save_hf(
    models: list[torch.nn.Module],
    source: HFDirectory,
    destination: str | Path,
    parallel: ParallelState,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    documents: Mapping[str, str] | None = None,
    of_fp8: Mapping[torch.nn.Parameter, torch.Tensor] = _NO_FP8,
) -> None:
    """Write weights (Hub names, `dtype` or the parameters' own) and `source`'s assets to `destination`; collective.

    documents: relative path -> text of further files; those of rank 0 count.  of_fp8: as in `export_hf`.
    An earlier export there is replaced in one step.  Raises UserError on every rank when rank 0 could not write.
    """
    destination = Path(destination).absolute()
    agree(destination_problem(destination) if parallel.rank == 0 else None, parallel)
    dtype = dtype or next(iter(named_weights(models).values())).dtype
    writer = None
    if parallel.rank == 0:
        writer = DirectoryWriter(destination, source, dtype, max_shard_bytes, documents or {})
    for name, tensor in export_hf(models, parallel, of_fp8):
        writer.add(name, tensor)
    agree(writer.finish() if writer else None, parallel)


def agree(problem: str | None, parallel: ParallelState, group: dist.ProcessGroup | None = None) -> None:
    """Raise rank 0's problem as a UserError on every rank.  group: of all ranks; default: the default group."""
    message = [problem]
    if parallel.world_size > 1:
        dist.broadcast_object_list(message, src=0, group=group)
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


def _outgoing(
    models: list[torch.nn.Module], of_fp8: Mapping[torch.nn.Parameter, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`named_weights` as they leave the run: none in FP8, whose 3 bits of mantissa are no weight to hand on."""
    found = {name: of_fp8.get(parameter, parameter) for name, parameter in named_weights(models).items()}
    if in_fp8 := [name for name, tensor in found.items() if is_fp8(tensor)]:
        raise ValueError(f"nothing stands for {len(in_fp8)} weights in FP8, e.g. {in_fp8[0]}")
    return found


class _Reader:
    """Reads this rank's share of the Hugging Face tensors of a row."""

    def __init__(self, directory: HFDirectory, parallel: ParallelState, stack: ExitStack):
        self.directory, self.parallel, self.stack = directory, parallel, stack
        self.stored = {hub_name(name): (name, entry) for name, entry in directory.tensors.items()}
        self.handles: dict[Path, Any] = {}

    def read(self, row: Row, local_rows: int) -> torch.Tensor:
        parts = []
        for name in row.hf:
            source, shape = self._slice(name)
            parts += cut(source, shape, row, local_rows, self.parallel)
            if row.layout.vocabulary:
                self._add_tokens(parts[0], source, shape[0], is_head=row.name == "output_layer.weight")
        return row.layout.fuse(parts, self.directory.config)

    def _slice(self, name: str):
        stored_name, entry = self.stored[name]
        if entry.file not in self.handles:
            self.handles[entry.file] = self.stack.enter_context(safe_open(str(entry.file), framework="pt"))
        return self.handles[entry.file].get_slice(stored_name), entry.shape

    def _add_tokens(self, table: torch.Tensor, source: Any, file_rows: int, *, is_head: bool) -> None:
        """Start the rows of added tokens in this rank's part of a table."""
        local_rows = table.shape[0]
        begin = self.parallel.tp_rank * local_rows
        # An untied head keeps its spare rows as they are; only rows that it never had need a start.
        untied_head = is_head and not self.directory.config.tie_word_embeddings
        for row, start in self.directory.initial_rows.items():
            if begin <= row < begin + local_rows and not (untied_head and row < file_rows):
                table[row - begin] = source[start : start + 1][0]


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
