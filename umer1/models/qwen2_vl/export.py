"""The writing side of an export: a Hugging Face directory that appears whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from umer1 import __version__
from umer1.atomic_directory import aside_path, publish
from umer1.files import write_json, write_text
from umer1.models.qwen2_vl.directory import HFDirectory, save_assets
from umer1.models.qwen2_vl.safetensors_index import INDEX_NAME, SINGLE_NAME
from umer1.models.qwen2_vl.weight_table import hf_shapes
from umer1.rules import cannot_be_looked_at

MARKER = "umer1_export.json"  # a directory that holds it was written here and may be replaced
MAX_SHARD_BYTES = 5 << 30


def destination_problem(destination: str | Path) -> str | None:
    """Why `destination` may not be written, or None; for checks before a long run, too."""
    path = Path(destination)
    try:
        if path.is_symlink():
            return f"{path} is a symbolic link, which the export cannot replace; name the directory that it leads to."
        if path.exists() and not path.is_dir():
            return f"{path} is a file; the export needs a directory."
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            return f"{path} cannot be written: {nearest} is not a directory that may be written to."
        if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
            return f"{path} is not empty and is no earlier export of umer1; name another directory or empty this one."
    except OSError as error:
        return cannot_be_looked_at(path, error)
    return None


class DirectoryWriter:
    """Rank 0's side of an export: shards of at most `max_shard_bytes`, the index, the assets, then the name.

    documents: relative path -> text of further files.
    A failure is kept until `finish`, so that the collective export goes on and no rank waits for one that has left.
    """

    def __init__(
        self,
        destination: Path,
        source: HFDirectory,
        dtype: torch.dtype,
        max_shard_bytes: int,
        documents: Mapping[str, str],
    ):
        self.destination, self.source, self.dtype, self.documents = destination, source, dtype, documents
        self.aside = aside_path(destination)
        self.plan = _plan_shards(hf_shapes(source.config), dtype.itemsize, max_shard_bytes)
        self.pending: dict[str, torch.Tensor] = {}
        self.problem: str | None = None
        self._guard(lambda: self.aside.mkdir(parents=True))

    def _guard(self, action) -> None:
        if self.problem is None:
            try:
                action()
            except OSError as error:
                self.problem = f"The export to {self.destination} failed: {error}."

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor by the plan, kept until its shard's last one has come."""
        self.pending[name] = tensor.to(self.dtype)
        shard = self.plan[name]
        if [other for other, file in self.plan.items() if file == shard][-1] == name:
            self._guard(lambda: _save_shard(self.pending, self.aside / shard))
            self.pending = {}

    def finish(self) -> str | None:
        """Publish; returns what went wrong, if anything, and then leaves nothing behind."""
        self._guard(self._publish)
        if self.problem:
            shutil.rmtree(self.aside, ignore_errors=True)
        return self.problem

    def _publish(self) -> None:
        if len(set(self.plan.values())) > 1:
            sizes = hf_shapes(self.source.config).values()
            total = sum(torch.Size(shape).numel() for shape in sizes) * self.dtype.itemsize
            write_json(self.aside / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": self.plan})
        save_assets(self.source, self.aside, dtype=str(self.dtype).removeprefix("torch."))
        for name, text in self.documents.items():
            write_text(self.aside / name, text)
        write_json(self.aside / MARKER, {"umer1": __version__, "dtype": str(self.dtype).removeprefix("torch.")})
        publish(self.aside, self.destination)


def _save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except Exception as error:  # safetensors wraps I/O errors in a type of its own
        raise OSError(f"{path.name}: {error}") from error
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes its files readable to their owner alone


def _plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> dict[str, str]:
    """Tensor -> file, in the table's order, no file above `max_bytes` unless one tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        length = torch.Size(shape).numel() * itemsize
        if groups[-1] and size + length > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += length
    if len(groups) == 1:
        return dict.fromkeys(groups[0], SINGLE_NAME)
    return {
        name: f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        for index, group in enumerate(groups, start=1)
        for name in group
    }
