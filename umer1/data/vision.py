"""Media of one sequence, decoded one after the other under a bound on its length."""

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from umer1.data.bad_samples import BadSample
from umer1.data.images import ImageConfig, Patches, Patchifier
from umer1.data.media import MediaRoot
from umer1.data.video_files import is_video_file, sample_frames, video_shape
from umer1.errors import UserError

_BLANK_SIZE = (28, 28)  # the white image that upstream adds to text-only inputs
# Small pictures are kept, since small data sets come round often; large ones pass through.
_KEPT_BYTES, _KEPT_PICTURE_BYTES, _KEPT_FRAMES = 64 * 2**20, 64 * 2**10, 16


@dataclass(frozen=True, slots=True)
class Vision:
    """One image or video, ready to stand in a prompt."""

    patches: Patches
    pixels: torch.Tensor  # float32 [P, patch_dim], normalised
    ids: list[int]  # start, pads, end
    is_video: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.patches.grid


@dataclass(slots=True)
class DecodeWork:
    """Pictures and frames that were decoded, resized and cut, and the seconds of one process that it took."""

    images: int = 0
    frames: int = 0
    seconds: float = 0.0


def too_long(length: int, limit: int) -> BadSample:
    return BadSample("over_length", f"{length} tokens, more than {limit}")


class VisionLoader:
    """Opens ("image", path), ("video", paths) and ("blank", None) parts; a video's only path may be a video file's.

    special: the ids of the vision tokens.  max_length: most tokens of the sequence that they stand in, or None.
    `work` counts what was decoded.
    """

    def __init__(self, special: Any, config: ImageConfig, max_length: int | None, max_frames: int):
        self.special, self.config = special, config
        self.max_length, self.max_frames = max_length, max_frames
        self.patchifier = Patchifier(config)
        self.work = DecodeWork()
        self._pictures: dict[tuple, Patches] = {}
        self._kept_bytes = 0

    def load(self, parts: list[Any], media: MediaRoot | None, num_tokens: int) -> list[Vision]:
        """Decode media in order, stopping as soon as the prompt cannot fit: memory is bounded by max_length."""
        visions = []
        for part in parts:
            if isinstance(part, str):
                continue
            kind, source = part
            if media is None and kind != "blank":
                raise UserError("the input names media, but no data root was given; pass --data-root DIR")
            if kind == "blank":
                patches = self.patchifier.image(Image.new("RGB", _BLANK_SIZE, (255, 255, 255)))
            else:
                patches = self._patches(kind, source, media, num_tokens)
            pad = self.special.video_pad if kind == "video" else self.special.image_pad
            count = len(patches.pixels) // self.config.merge_size**2
            num_tokens += count + 2
            if self.max_length is not None and num_tokens > self.max_length:
                raise too_long(num_tokens, self.max_length)
            ids = [self.special.vision_start, *[pad] * count, self.special.vision_end]
            visions.append(Vision(patches, self.patchifier.normalised(patches), ids, kind == "video"))
        return visions

    def _patches(self, kind: str, source: Any, media: MediaRoot, num_tokens: int) -> Patches:
        """Decode, resize and cut; small pictures are kept, so that a small data set is decoded once."""
        paths = (source,) if kind == "image" else source
        if not paths:
            raise BadSample("bad_record", "a video has no frames")
        if len(paths) > self.max_frames:
            raise BadSample("too_many_frames", f"a video has {len(paths)} frames, more than {self.max_frames}")
        started = time.perf_counter()
        key = (kind, *map(media.signature, paths)) if len(paths) <= _KEPT_FRAMES else None
        kept = self._pictures.get(key)
        if kept is not None:
            return kept
        if kind == "image":
            patches = self.patchifier.image(media.open_image(paths[0]))
            self.work.images += 1
        elif len(paths) == 1 and is_video_file(paths[0]):
            patches = self._file(paths[0], media, num_tokens)
        else:
            first = media.open_image(paths[0])
            self._check_video_fits(first.size, len(paths), num_tokens)
            rest = (media.open_image(path) for path in paths[1:])
            patches = self.patchifier.video(itertools.chain([first], rest), len(paths))
            self.work.frames += len(paths)
        self.work.seconds += time.perf_counter() - started
        if key is not None and None not in key and patches.pixels.nbytes <= _KEPT_PICTURE_BYTES:
            self._kept_bytes += patches.pixels.nbytes
            if self._kept_bytes > _KEPT_BYTES:
                self._pictures.clear()
                self._kept_bytes = patches.pixels.nbytes
            self._pictures[key] = patches
        return patches

    def _file(self, path: str, media: MediaRoot, num_tokens: int) -> Patches:
        """Evenly spaced frames of a video file."""
        wanted = self.config.num_frames
        if self.max_length is not None:
            *size, count = video_shape(media, path, wanted)
            self._check_video_fits(tuple(size), count, num_tokens)
        frames = sample_frames(media, path, wanted)
        self.work.frames += len(frames)
        return self.patchifier.video(frames, len(frames))

    def _check_video_fits(self, size: tuple[int, int], num_frames: int, num_tokens: int) -> None:
        """Refuse a video by the width and height of its first frame, before the others are decoded."""
        height, width = self.patchifier.frame_size(*size, num_frames)
        steps = -(-num_frames // self.config.temporal_patch_size)
        num_tokens += steps * height * width // self.config.factor**2 + 2
        if self.max_length is not None and num_tokens > self.max_length:
            raise too_long(num_tokens, self.max_length)
