"""Tiles of the InfoNCE kernels, by size of an element and of the block."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from umer1_kernels.variants import INTERPRETED


@dataclass(frozen=True)
class Tile:
    """How a tile of similarities is worked on: its shape, how much of D at a time, warps and pipeline stages."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# Largest first, by bytes of an element.  Registers set the limit: the epilogue needs the accumulator and what it makes
# of it at once, and 128 x 256 spills in both kernels with every number of warps tried.  Chosen by what compiles without
# spills for the chip, not by a clock.
HOPPER_TILES = {
    2: (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 32, 64, 4, 4)),
    4: (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
}
OTHER_TILES = {
    2: (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 32, 64, 4, 3)),
    4: (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
}
INTERPRETED_TILES = (Tile(32, 64, 32, 4, 1), Tile(16, 16, 16, 4, 1))
INTERPRETED_PROCESSORS = 3  # so that one program works on several tiles


def tiles_of(arch: int) -> dict[int, tuple[Tile, ...]]:
    """arch: compute capability, e.g. 80, 90, 100."""
    return HOPPER_TILES if arch // 10 == 9 else OTHER_TILES


@cache
def architecture(device: torch.device) -> int:
    """Compute capability of a GPU, e.g. 90; the interpreter does what Hopper can."""
    major, minor = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: programs of a persistent grid."""
    return INTERPRETED_PROCESSORS if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def tile_for(rows: torch.Tensor, num_rows: int, num_columns: int) -> Tile:
    """The largest tile that still gives every multiprocessor one, else the smallest."""
    tiles = INTERPRETED_TILES if INTERPRETED else tiles_of(architecture(rows.device))[rows.element_size()]
    for tile in tiles[:-1]:
        if triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns) >= processors(rows.device):
            return tile
    return tiles[-1]
