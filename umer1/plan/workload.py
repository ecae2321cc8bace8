"""Micro-batches that nobody has loaded: the shapes of a PackedBatch, with tensors that have no memory."""

from dataclasses import dataclass, replace

import torch

from umer1.data.loader import DataConfig
from umer1.data.packing import plan_micro_batches
from umer1.data.schema import PackedBatch
from umer1.models.qwen2_vl.config import Qwen2VLConfig

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side of a pair in numbers."""

    text: int
    """Tokens of the prompt, template and both embedding tokens included, pictures not."""
    response: int
    """Tokens of reasoning, summary and the end; 0 for a prompt alone."""
    patches: int
    """Patches of all pictures or frames (14 x 14 pixels each)."""

    def vision_tokens(self, config: Qwen2VLConfig) -> int:
        return self.patches // config.vision.spatial_merge_size**2

    def tokens(self, config: Qwen2VLConfig) -> int:
        return self.text + self.response + self.vision_tokens(config)


def imagine(config: Qwen2VLConfig, sides: list[Side], *, pad_to_multiple: int = 1) -> PackedBatch:
    """A micro-batch of these sides (query, positive, query, ...): lengths and grids are real, the rest has no memory.

    Without the responses' supervision where a side has none.  Patches become one picture of the side.
    """
    merge = config.vision.spatial_merge_size
    lengths = [side.tokens(config) for side in sides]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    real = bounds[-1]
    if padding := -real % pad_to_multiple:
        bounds.append(real + padding)
    grids = [[1, merge, side.patches // merge] for side in sides if side.patches]
    slots, patches = bounds[-1], sum(side.patches for side in sides)
    rows = sum(side.response for side in sides)

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int64, device=_META)

    return PackedBatch(
        input_ids=ids(slots),
        position_ids=ids(3, slots),
        # A real one has int32; what is beyond that is planned all the same, and fits no device.
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32 if bounds[-1] < 1 << 31 else torch.int64),
        max_seqlen=max(lengths),
        pixel_values=torch.empty(patches, config.vision.patch_dim, device=_META),
        grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        disc_rows=ids(len(sides)),
        gen_rows=ids(len(sides)),
        num_pairs=len(sides) // 2,
        num_negatives=0,
        target_ids=ids(len(sides) // 2),
        supervised_rows=ids(rows),
        supervised_labels=ids(rows),
        supervised_sides=ids(rows),
        num_real_tokens=real,
    )


@dataclass(slots=True)
class PolicyWork:
    """A micro-batch of rollouts, and the prompts in it whose pictures no earlier one had."""

    batch: PackedBatch
    new: PackedBatch | None


def imagine_pairs(
    config: Qwen2VLConfig, side: Side, pairs: int, data: DataConfig, *, pad_to_multiple: int = 1, multiple_of: int = 1
) -> list[PackedBatch]:
    """`pairs` equal pairs in micro-batches as full as they can be; balancing makes the last ones no fuller."""
    places = plan_micro_batches(
        [2 * side.tokens(config)] * pairs,
        [2 * side.patches] * pairs,
        data.micro_batch_size,
        data.max_tokens_per_micro_batch,
        data.max_patches_per_micro_batch,
        multiple_of=multiple_of,
    )
    return [imagine(config, [side] * (2 * len(batch)), pad_to_multiple=pad_to_multiple) for batch in places]


def imagine_rollouts(
    config: Qwen2VLConfig,
    prompts: list[Side],
    responses: list[list[int]],
    data: DataConfig,
    *,
    pad_to_multiple: int = 1,
    multiple_of: int = 1,
) -> list[PolicyWork]:
    """Rollouts in micro-batches, cut as the GRPO trainer cuts them; responses: lengths of each prompt's."""
    rollouts = [(number, length) for number, lengths in enumerate(responses) for length in lengths]
    sides = [replace(prompts[number], response=length) for number, length in rollouts]
    places = plan_micro_batches(
        [side.tokens(config) for side in sides],
        [side.patches for side in sides],
        data.micro_batch_size,
        data.max_tokens_per_micro_batch,
        data.max_patches_per_micro_batch,
        multiple_of=multiple_of,
    )
    found, seen = [], set()
    for batch in places:
        numbers = list(dict.fromkeys(rollouts[place][0] for place in batch))
        new = [prompts[number] for number in numbers if number not in seen]
        seen.update(numbers)
        made = imagine(config, [sides[place] for place in batch], pad_to_multiple=pad_to_multiple)
        found.append(PolicyWork(made, imagine(config, new) if new else None))
    while len(found) % multiple_of:  # fewer rollouts than stages: the trainer passes a prompt alone
        found.append(PolicyWork(imagine(config, prompts[:1], pad_to_multiple=pad_to_multiple), None))
    return found
