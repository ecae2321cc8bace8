"""One tensor of the weight table between its whole form and what tensor- and pipeline-parallel ranks hold of it."""

from typing import Any

import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelState
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.weight_table import Row, hf_shapes, rows


def shares(row: Row, parallel: ParallelState) -> tuple[int, int]:
    """(ranks that a row's megatron tensor is cut over, which of them this is)"""
    whole = row.layout.axis is None or (parallel.vision_data_parallel and row.name.startswith("vision."))
    return (1, 0) if whole else (parallel.tp_size, parallel.tp_rank)


def cut(source: Any, shape: tuple[int, ...], row: Row, local_rows: int, parallel: ParallelState) -> list[torch.Tensor]:
    """This rank's share of one whole Hugging Face tensor of `row`, in the parts that `row.layout.fuse` takes.

    `source` is a tensor or whatever is sliced like one (a safetensors slice), `shape` its shape.  `local_rows`: rows of
    the megatron tensor on this rank; those of a vocabulary beyond the file's are zeros.
    """
    axis, (size, rank) = row.layout.axis, shares(row, parallel)
    if row.layout.vocabulary:
        begin = rank * local_rows
        end = min(begin + local_rows, shape[0])
        table = source[begin:end] if begin < end else source[0:0]
        return [torch.cat([table, table.new_zeros(local_rows - table.shape[0], shape[1])])]
    if axis is None:
        return [source[:]]
    block = shape[axis] // row.layout.sections
    share = block // size
    begins = [section * block + rank * share for section in range(row.layout.sections)]
    return [source[b : b + share] if axis == 0 else source[:, b : b + share] for b in begins]


def join(shards: list[torch.Tensor], row: Row, config: Qwen2VLConfig) -> list[torch.Tensor]:
    """The row's whole Hugging Face tensors from its megatron tensor on each rank that has a share of it."""
    pieces = [row.layout.split(shard, config) for shard in shards]
    parts = [
        torch.cat(same, dim=row.layout.axis or 0) if len(same) > 1 else same[0] for same in zip(*pieces, strict=True)
    ]
    if row.layout.sections > 1:
        parts = [torch.cat(parts)]
    if row.layout.vocabulary:
        parts = [part[: config.vocab_size] for part in parts]
    return [part.contiguous() for part in parts]


class Assembler:
    """Brings rows of the table, whole, to rank 0; collective over the first data-parallel replica, one row at a time.

    `weights`: table name -> this rank's parameter, or what stands for it, in host memory perhaps.
    """

    def __init__(self, weights: dict[str, torch.Tensor], config: Qwen2VLConfig, parallel: ParallelState):
        self.weights, self.config, self.parallel = weights, config, parallel
        self.shapes = hf_shapes(config)
        self.dtype = next(iter(weights.values())).dtype
        self.owner = _owners(list(weights), parallel)

    def assemble(self, row: Row) -> list[torch.Tensor]:
        """The row's Hugging Face tensors on rank 0, on its device (perhaps the parameter itself); [] on the others."""
        parallel, stage = self.parallel, self.owner[row.name]
        parts = self._gather(row) if parallel.pp_rank == stage else None
        if parallel.tp_rank != 0 or parallel.pp_rank not in (0, stage):
            return []
        whole = []
        for index, name in enumerate(row.hf):
            tensor = parts[index] if parts else torch.empty(0)
            if stage != 0:
                tensor = self._send_to_first_stage(tensor, self.shapes[name], stage)
            if parallel.rank == 0:
                if tuple(tensor.shape) != self.shapes[name]:
                    raise AssertionError(f"{name}: {tuple(tensor.shape)} exported, {self.shapes[name]} expected")
                whole.append(tensor)
        return whole

    def _gather(self, row: Row) -> list[torch.Tensor] | None:
        """The row's Hugging Face tensors, whole, on tensor-parallel rank 0; None on the others."""
        config, parallel = self.config, self.parallel
        local = self.weights[row.name].detach().to(parallel.device)
        shards = [local]
        size, rank = shares(row, parallel)
        if size > 1:
            shards = [torch.empty_like(local) for _ in range(size)] if rank == 0 else None
            dist.gather(local.contiguous(), shards, group=parallel.groups.tp, group_dst=0)
        if parallel.tp_rank != 0:
            return None
        return join(shards, row, config)

    def _send_to_first_stage(self, tensor: torch.Tensor, shape: tuple[int, ...], stage: int) -> torch.Tensor:
        """From stage `stage` to stage 0 of this pipeline; returns what arrived (on the sender: what was sent)."""
        parallel = self.parallel
        if parallel.pp_rank == stage:
            dist.send(tensor, group=parallel.groups.pp, group_dst=0)
            return tensor
        received = torch.empty(shape, dtype=self.dtype, device=parallel.device)
        dist.recv(received, group=parallel.groups.pp, group_src=stage)
        return received


def exported_rows(config: Qwen2VLConfig) -> list[Row]:
    """The rows of an export, in its order: a tied head has none of its own."""
    return [row for row in rows(config) if row.name != "output_layer.weight" or not config.tie_word_embeddings]


def _owners(names: list[str], parallel: ParallelState) -> dict[str, int]:
    """Table name -> first pipeline stage that holds it (the tied table is on the first and the last)."""
    stages: list[list[str]] = [names]
    if parallel.pp_size > 1:
        stages = [[] for _ in range(parallel.pp_size)]
        dist.all_gather_object(stages, names, group=parallel.groups.pp)
    return {name: stage for stage in reversed(range(len(stages))) for name in stages[stage]}
