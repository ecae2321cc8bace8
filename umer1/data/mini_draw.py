"""Pictures of mini-MMEB: boards of 16 x 16 pixel cells, drawn from 8 x 8 tiles with pixel noise.

A cell is four tiles (top left, top right, bottom left, bottom right).  With patch 8 and merge 2 one cell is one vision
token, so that a tiny model needs no more tokens than there are things to see.  Glyphs are drawn from bitmaps of our
own: a font library's version must not change the data.
"""

from pathlib import Path

import numpy as np
from PIL import Image

TILE_PIXELS = 8
CELL_PIXELS = 2 * TILE_PIXELS

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 40),
    "blue": (30, 60, 220),
    "yellow": (235, 225, 40),
    "cyan": (40, 215, 225),
    "magenta": (225, 40, 215),
    "orange": (245, 140, 20),
    "purple": (110, 30, 150),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "brown": (120, 70, 25),
    "pink": (250, 165, 190),
}
LETTERS = tuple("ABCDEFGHIJKL")
DIGITS = tuple("12345678")

# 5 x 7 bitmaps, one string of five columns per row.
_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10011 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
}
_PAPER = 170  # the grey behind glyphs, and of a blank tile

# Tile numbers: colours first, then letters, digits and the blank.
LETTER_TILE = len(COLOURS)
DIGIT_TILE = LETTER_TILE + len(LETTERS)
BLANK_TILE = DIGIT_TILE + len(DIGITS)


def _glyph_tile(name: str) -> np.ndarray:
    tile = np.full((TILE_PIXELS, TILE_PIXELS), _PAPER, np.float32)
    for row, line in enumerate(_GLYPHS[name].split()):
        for column, bit in enumerate(line):
            if bit == "1":
                tile[row, column + 1] = 0.0
    return np.repeat(tile[:, :, None], 3, axis=2)


def _all_tiles() -> np.ndarray:
    """float32 [tiles, 8, 8, 3], values 0 to 255."""
    flat = [np.broadcast_to(np.float32(rgb), (TILE_PIXELS, TILE_PIXELS, 3)) for rgb in COLOURS.values()]
    glyphs = [_glyph_tile(name) for name in LETTERS + DIGITS]
    blank = np.full((TILE_PIXELS, TILE_PIXELS, 3), _PAPER, np.float32)
    return np.stack([*flat, *glyphs, blank])


_TILES = _all_tiles()


def draw(cells: np.ndarray, columns: int, rng: np.random.Generator, noise: float = 0.06) -> np.ndarray:
    """uint8 [rows * 16, columns * 16, 3] from tile numbers [rows * columns, 4].

    `noise` is the standard deviation, as a share of 255, of a shift of each tile's colour and, again, of each pixel:
    two drawings of one board never have equal pixels.
    """
    rows = len(cells) // columns
    tiles = _TILES[cells]  # [cells, 4, 8, 8, 3]
    shift = rng.standard_normal((*cells.shape, 1, 1, 3), dtype=np.float32)
    grain = rng.standard_normal(tiles.shape, dtype=np.float32)
    tiles = tiles + (255 * noise) * (shift + grain)
    tiles = tiles.reshape(rows, columns, 2, 2, TILE_PIXELS, TILE_PIXELS, 3)
    picture = tiles.transpose(0, 2, 4, 1, 3, 5, 6).reshape(rows * CELL_PIXELS, columns * CELL_PIXELS, 3)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write one picture, stored: noise does not compress, and the bytes do not depend on a zlib's version."""
    Image.fromarray(picture).save(path, format="PNG", compress_level=0)
