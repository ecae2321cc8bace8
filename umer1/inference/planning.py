"""What each input will cost, from text lengths and image headers alone, and batches of about equal cost.

Nothing is decoded here.  Missing files, paths out of the root and oversized images are found for all inputs before any
work starts; pixels that turn out corrupt are found later, when they are decoded.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from umer1.data.bad_samples import BadSample
from umer1.data.images import Patchifier
from umer1.data.media import MediaRoot
from umer1.data.prompts import ASSISTANT_OPENING, SUFFIX, USER_OPENING
from umer1.data.video_files import is_video_file, video_shape
from umer1.inference.inputs import BadInput, Input

# Estimates only: batches are cut to the exact budgets once they are tokenised.
_BYTES_PER_TOKEN = 4
_FIXED_TOKENS = {
    "disc": len(USER_OPENING) // _BYTES_PER_TOKEN,
    "gen": len(USER_OPENING + SUFFIX + ASSISTANT_OPENING) // _BYTES_PER_TOKEN,
}
_HEADER_READERS = 8  # threads; on network file systems the wait is latency


@dataclass(frozen=True, slots=True)
class Cost:
    """What one input takes in a batch."""

    tokens: int  # prompt tokens, estimated
    patches: int  # ViT patches, exact


def input_cost(item: Input, mode: str, media: MediaRoot | None, patchifier: Patchifier) -> Cost:
    """Cost of one input; raises BadSample for media that cannot be used."""
    config = patchifier.config
    patches = 0
    if (item.images or item.video) and media is None:
        raise BadSample("missing_file", "the input names media, but no data root was given; pass --data-root DIR")
    for path in item.images:
        height, width = patchifier.image_size(*media.image_size(path))
        patches += (height // config.patch_size) * (width // config.patch_size)
    for width, height, count in video_shapes(item.video, media, config.num_frames):
        height, width = patchifier.frame_size(width, height, count)
        steps = -(-count // config.temporal_patch_size)
        patches += steps * (height // config.patch_size) * (width // config.patch_size)
    text = len(item.text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN
    return Cost(_FIXED_TOKENS[mode] + text + patches // config.merge_size**2, patches)


def video_shapes(paths: tuple[str, ...], media: MediaRoot | None, num_frames: int) -> list[tuple[int, int, int]]:
    """(width, height, frames) of each video file among the paths, and of the others, which are frames of one video."""
    found = [video_shape(media, path, num_frames) for path in paths if is_video_file(path)]
    sizes = [media.image_size(path) for path in paths if not is_video_file(path)]
    return found + ([(*sizes[0], len(sizes))] if sizes else [])


def inspect(
    inputs: list[Input], mode: str, media: MediaRoot | None, patchifier: Patchifier
) -> tuple[list[Cost | None], list[BadInput]]:
    """Cost of each input (None where it is bad) and what is wrong with the bad ones."""

    def look(item: Input) -> Cost | BadInput:
        try:
            return input_cost(item, mode, media, patchifier)
        except BadSample as error:
            return BadInput(item.line, item.id, error.cause, error.detail)

    with ThreadPoolExecutor(_HEADER_READERS) as readers:
        found = list(readers.map(look, inputs))
    costs = [entry if isinstance(entry, Cost) else None for entry in found]
    return costs, [entry for entry in found if isinstance(entry, BadInput)]


def plan_batches(
    costs: list[Cost | None], *, max_tokens: int, max_patches: int, max_inputs: int, num_groups: int
) -> list[list[int]]:
    """Positions of the inputs in batches, costliest first, each within the budgets (or a single input beyond them).

    Batch i belongs to data-parallel rank i % num_groups: neighbours cost about the same, so ranks stay together.
    When there would be fewer batches than ranks, batches are made smaller.
    """
    order = sorted((i for i, cost in enumerate(costs) if cost), key=lambda i: (-costs[i].tokens, i))
    max_inputs = min(max_inputs, max(1, -(-len(order) // num_groups)))
    batches: list[list[int]] = []
    tokens = patches = 0
    for index in order:
        cost = costs[index]
        full = batches and (
            tokens + cost.tokens > max_tokens or patches + cost.patches > max_patches or len(batches[-1]) == max_inputs
        )
        if full or not batches:
            batches.append([])
            tokens = patches = 0
        batches[-1].append(index)
        tokens += cost.tokens
        patches += cost.patches
    return batches
