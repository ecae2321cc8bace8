"""How evenly a global batch's modelled FLOPs lie on data-parallel ranks and micro-batches, before and after balancing.

    .venv/bin/python perf/batch_balance.py [--steps 50]

No model runs and no file is read: sizes of pairs are drawn for 25 data sets of the kinds that UME-R1's training data
has (KINDS says what is assumed of each), put in the training order (blocks of 64 pairs of one data set), costed for
Qwen2-VL-2B with a frozen ViT, and shared out by the functions that training uses.  Writes
perf/results/batch_balance.json.
"""

import argparse
import json
import time

import numpy as np
import torch
from provenance import new_record, save_record
from synthetic import MODELS

from umer1.data.balancing import assign, imbalance, rank_loads
from umer1.data.packing import plan_micro_batches
from umer1.data.sampler import BlockSampler
from umer1.training.flops import sequence_flops, training_flops

MODEL = MODELS["Qwen2-VL-2B"]
LAYOUTS = ((8, 256), (8, 1024), (64, 1024), (64, 2048))  # data-parallel ranks, pairs of the global batch
MICRO_BATCH = 4
PATCH, MOST_PATCHES = 14 * 14, 2359296 // (14 * 14)
PIXEL_BYTES = 4 * MODEL.vision.patch_dim
# name: (data sets, median pixels of the query's picture, of the positive's; 0 for none)
KINDS = {
    "photo to text": (10, 640 * 480, 0),
    "text to photo": (4, 0, 640 * 480),
    "photo to photo": (3, 500 * 500, 500 * 500),
    "page to text": (3, 1240 * 1600, 0),
    "text to page": (2, 0, 1240 * 1600),
    "video to text": (2, None, 0),
    "text to video": (1, 0, None),
}
VIDEO = (4, 8, 16)  # 8 frames of 25,088 pixels
PROMPT, RESPONSE = (130, 0.25), (200, 0.4)  # tokens of text: median and sigma of a log-normal
PICTURE_SIGMA = 0.35  # of a picture's pixels within a data set


def draw_side(rng: np.random.Generator, pixels: int | None) -> tuple[int, int, list]:
    """(tokens, supervised tokens, grids) of one side."""
    prompt, response = (int(median * rng.lognormal(0, sigma)) for median, sigma in (PROMPT, RESPONSE))
    grids = []
    if pixels is None:
        grids = [VIDEO]
    elif pixels:
        side = int(np.sqrt(min(pixels * rng.lognormal(0, PICTURE_SIGMA) / PATCH, MOST_PATCHES)) / 2) * 2
        grids = [(1, side, side)]
    pads = sum(int(np.prod(grid)) for grid in grids) // MODEL.vision.spatial_merge_size**2
    return prompt + response + pads, response, grids


def draw_pairs(pairs_a_set: int) -> dict[str, np.ndarray]:
    """Of all pairs: data set, FLOPs, tokens, patches."""
    rng, rows, number = np.random.default_rng(0), [], 0
    for sets, *pictures in KINDS.values():
        for _ in range(sets):
            for _ in range(pairs_a_set):
                lengths, supervised, grids = zip(*(draw_side(rng, pixels) for pixels in pictures), strict=True)
                grids = [grid for side in grids for grid in side]
                grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
                forward = sequence_flops(torch.tensor(lengths), grid_thw, sum(supervised), MODEL)
                patches = sum(int(np.prod(grid)) for grid in grids)
                rows.append((number, training_flops(forward, False), sum(lengths), patches))
            number += 1
    names = ("data_set", "flops", "tokens", "patches")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def micro_batch_imbalance(pairs: dict[str, np.ndarray], balanced: bool) -> float:
    """Of one rank."""
    costs = pairs["flops"].tolist()
    lengths, patches = pairs["tokens"].tolist(), pairs["patches"].tolist()
    plan = plan_micro_batches(lengths, patches, MICRO_BATCH, costs=costs if balanced else None)
    return imbalance(np.array([sum(costs[place] for place in places) for places in plan]))


def measure(pairs: dict[str, np.ndarray], ranks: int, size: int, steps: int) -> dict:
    """Means over steps."""
    names = tuple(str(number) for number in range(int(pairs["data_set"].max()) + 1))
    sampler = BlockSampler(pairs["data_set"], names, size)
    rows = []
    for step in range(steps):
        batch = {name: values[sampler.batch(step)] for name, values in pairs.items()}
        costs = batch["flops"]
        in_order, in_turn = np.repeat(np.arange(ranks), size // ranks), np.tile(np.arange(ranks), size // ranks)
        started = time.perf_counter()
        owners = assign(costs, in_turn, ranks)
        seconds = time.perf_counter() - started
        moved = owners != in_turn
        bins = {rank: {name: values[owners == rank] for name, values in batch.items()} for rank in range(ranks)}
        plain, even = (
            float(np.mean([micro_batch_imbalance(one, balanced) for one in bins.values()]))
            for balanced in (False, True)
        )
        rows.append(
            {
                "consecutive_slots": imbalance(rank_loads(costs, in_order, ranks)),
                "slots_in_turn": imbalance(rank_loads(costs, in_turn, ranks)),
                "balanced": imbalance(rank_loads(costs, owners, ranks)),
                "pairs_moved": float(moved.mean()),
                "pixel_mib_moved_a_rank": float(batch["patches"][moved].sum()) * PIXEL_BYTES / ranks / 2**20,
                "milliseconds_to_decide": 1000 * seconds,
                "micro_batches_consecutive": plain,
                "micro_batches_balanced": even,
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs-a-set", type=int, default=2000)
    options = parser.parse_args()
    pairs = draw_pairs(options.pairs_a_set)
    found = [
        {"ranks": ranks, "pairs": size, "steps": options.steps, **measure(pairs, ranks, size, options.steps)}
        for ranks, size in LAYOUTS
    ]
    for row in found:
        print(json.dumps({key: round(value, 3) for key, value in row.items()}))
    save_record({**new_record("batch_balance"), "micro_batch": MICRO_BATCH, "measured": found})


if __name__ == "__main__":
    main()
