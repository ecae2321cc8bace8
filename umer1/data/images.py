"""Pictures to patches, equal to transformers' Qwen2-VL image processor.

The ViT takes one row per patch of `temporal_patch_size` frames: an image counts as a video whose one frame stands in
all of them.  Rows are ordered so that the 2 x 2 patches that the merger joins are neighbours.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from umer1.data.bad_samples import BadSample
from umer1.data.input_settings import InputSettings
from umer1.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200  # the limit of the published processor


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Patch geometry, normalisation and pixel bounds; the paper's recipe where nothing else says otherwise."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    min_pixels: int = 768
    max_pixels: int = 2_359_296
    video_min_pixels: int = 3_136
    video_max_pixels: int = 25_088
    max_video_tokens: int | None = None  # of one video; bounds the pixels of a frame of a long one
    num_frames: int = 8  # taken from a video file, evenly spaced

    @property
    def factor(self) -> int:
        """Height and width of one vision token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Length of one row of pixel values."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def violations(self) -> list[str]:
        found = []
        for low_name, high_name in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
            low, high = getattr(self, low_name), getattr(self, high_name)
            if not 1 <= low <= high:
                found.append(f"{low_name}={low} and {high_name}={high}: needs 1 <= {low_name} <= {high_name}")
            if high < self.factor**2:
                found.append(f"{high_name}={high} is less than one vision token; use {self.factor**2} or more")
        if self.num_frames < 1:
            found.append(f"num_frames={self.num_frames} must be 1 or above")
        if any(value <= 0 for value in self.std):
            found.append(f"image_std={list(self.std)} must be positive")
        return found

    @staticmethod
    def of_directory(directory: Any, bounds: Any = None) -> "ImageConfig":
        """`from_settings` of an opened model directory.

        bounds: settings whose min_pixels, max_pixels, video_min_pixels, video_max_pixels and num_frames win where set.
            Then the directory's preprocessor files count, and for num_frames what training left there.
        """
        names = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "num_frames")
        wanted = {name: getattr(bounds, name, None) for name in names}
        if wanted["num_frames"] is None and (kept := InputSettings.read(directory)):
            wanted["num_frames"] = kept.num_frames
        return ImageConfig.from_settings(
            directory.config.vision,
            directory.image_settings,
            directory.video_settings,
            **wanted,
        )

    @staticmethod
    def from_settings(
        vision: Any,
        image_settings: dict | None = None,
        video_settings: dict | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        num_frames: int | None = None,
    ) -> "ImageConfig":
        """Explicit bounds win over the directory's preprocessor files, these over the paper's recipe.

        vision: the model's VisionConfig (patch_size, temporal_patch_size, spatial_merge_size), which the files must
        not contradict.  Raises ConfigError with every fault found.
        """
        image_settings, video_settings = image_settings or {}, video_settings or {}
        problems = _unsupported("image", image_settings, vision) + _unsupported("video", video_settings, vision)
        default = ImageConfig()
        low, high = _bounds(image_settings)
        video_low, video_high = _bounds(video_settings)
        config = ImageConfig(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            mean=_channels(image_settings.get("image_mean"), CLIP_MEAN),
            std=_channels(image_settings.get("image_std"), CLIP_STD),
            min_pixels=_first(min_pixels, low, default.min_pixels),
            max_pixels=_first(max_pixels, high, default.max_pixels),
            video_min_pixels=_first(video_min_pixels, video_low, default.video_min_pixels),
            video_max_pixels=_first(video_max_pixels, video_high, default.video_max_pixels),
            max_video_tokens=(
                _first(_integer(video_settings.get("max_video_tokens")), 128_000)
                if video_settings.get("cap_pixels_per_frame")
                else None
            ),
            num_frames=_first(num_frames, default.num_frames),
        )
        problems += config.violations()
        for name in ("image_mean", "image_std"):
            if name in video_settings and video_settings[name] != image_settings.get(name, video_settings[name]):
                problems.append(
                    f"{name} differs between the image and the video preprocessor settings; one is supported"
                )
        if problems:
            raise ConfigError(problems)
        return config


def _first(*values):
    return next(value for value in values if value is not None)


def _bounds(settings: dict) -> tuple[int | None, int | None]:
    """(fewest, most) pixels in either spelling of a preprocessor file."""
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    low = (settings.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"))
    high = (settings.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"))
    return tuple(next((value for value in map(_integer, values) if value is not None), None) for values in (low, high))


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _channels(value, default):
    return tuple(float(item) for item in value) if _three_numbers(value) else default


def _three_numbers(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 3 and all(type(item) in (int, float) for item in value)
    return numbers and all(math.isfinite(item) for item in value)


def _unsupported(kind: str, settings: dict, vision: Any) -> list[str]:
    """What a preprocessor file asks for that would change the pixels in a way this code does not follow."""
    found = []
    fixed = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": int(Image.Resampling.BICUBIC),
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for name, legal in fixed.items():
        if settings.get(name) is not None and settings[name] != legal:
            found.append(f"the {kind} preprocessor settings say {name}={settings[name]!r}; only {legal!r} is supported")
    factor = settings.get("rescale_factor")
    if factor is not None and not (isinstance(factor, float) and math.isclose(factor, 1 / 255)):
        found.append(f"the {kind} preprocessor settings say rescale_factor={factor!r}; only 1/255 is supported")
    for name in ("min_pixels", "max_pixels", "max_video_tokens"):
        if settings.get(name) is not None and _integer(settings[name]) is None:
            found.append(f"the {kind} preprocessor settings say {name}={settings[name]!r}; an integer is needed")
    if settings.get("size") is not None and None in _bounds(settings):
        found.append(
            f"the {kind} preprocessor settings say size={settings['size']!r}; shortest_edge and longest_edge, in "
            "pixels, are needed"
        )
    for name in ("image_mean", "image_std"):
        value = settings.get(name)
        if value is not None and not _three_numbers(value):
            found.append(f"the {kind} preprocessor settings say {name}={value!r}; three numbers are needed")
    return found


def check_aspect_ratio(width: int, height: int) -> None:
    """Raises BadSample("aspect_ratio") beyond 200 : 1."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise BadSample("aspect_ratio", f"{width} x {height} is longer than {MAX_ASPECT_RATIO} : 1")


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, near the aspect ratio, with the area inside the bounds.

    Raises BadSample("aspect_ratio") beyond 200 : 1.
    """
    check_aspect_ratio(width, height)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


class Patchifier:
    """Images and videos to rows of pixel values under one ImageConfig."""

    def __init__(self, config: ImageConfig):
        self.config = config
        # A byte has 256 values: rescaling and normalising are one look-up.  fp64, then fp32, then (x - mean) / std in
        # fp32 is the order of transformers' rounding steps, and gives the same bits.
        values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
        self._table = ((values[None, :] - mean[:, None]) / std[:, None]).astype(np.float32).reshape(-1)  # [3 * 256]

    def image_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) after resizing an image."""
        config = self.config
        return smart_resize(
            height, width, factor=config.factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels
        )

    def frame_size(self, width: int, height: int, num_frames: int) -> tuple[int, int]:
        """(height, width) after resizing each of a video's frames."""
        config, most = self.config, self.config.video_max_pixels
        if config.max_video_tokens is not None:
            # An even share of the whole video's budget, nine tenths of the tokens (transformers, qwen-vl-utils).
            budget = int(config.max_video_tokens * config.factor**2 * 0.9) * config.temporal_patch_size
            most = max(min(most, budget // num_frames), int(config.video_min_pixels * 1.05))
        return smart_resize(height, width, factor=config.factor, min_pixels=config.video_min_pixels, max_pixels=most)

    def image(self, image: Image.Image) -> "Patches":
        """RGB image -> its patches; the grid is (1, rows, columns)."""
        return self._arranged(_resized(image, self.image_size(*image.size))[None, None])

    def video(self, frames: Iterable[Image.Image], num_frames: int) -> "Patches":
        """RGB frames of one size -> their patches; the grid is (steps, rows, columns).

        Frames are taken one by one, so that only their resized form is held.  An incomplete last step repeats the last
        frame.  Raises BadSample("frame_sizes") when sizes differ.
        """
        arrays, first, size = [], None, None
        for frame in frames:
            if first is None:
                first, size = frame.size, self.frame_size(*frame.size, num_frames)
            if frame.size != first:
                raise BadSample(
                    "frame_sizes", f"frames of {first[0]} x {first[1]} and {frame.size[0]} x {frame.size[1]}"
                )
            arrays.append(_resized(frame, size))
        arrays += [arrays[-1]] * (-len(arrays) % self.config.temporal_patch_size)
        return self._arranged(np.stack(arrays).reshape(-1, self.config.temporal_patch_size, *size, 3))

    def _arranged(self, frames: np.ndarray) -> "Patches":
        """uint8 [steps, frames of a step (1 for a still), height, width, 3] in the order of the model's rows."""
        patch, merge = self.config.patch_size, self.config.merge_size
        steps, kept, height, width, _ = frames.shape
        rows, columns = height // patch, width // patch
        pixels = frames.reshape(steps, kept, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        # -> step, merged row, merged column, row and column inside, channel, frame of the step, y, x
        pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return Patches(pixels.reshape(steps * rows * columns, 3, kept, patch**2), (steps, rows, columns))

    def frames(self, patches: "Patches") -> np.ndarray:
        """uint8 [frames, height, width, 3]: the resized pictures that `patches` was cut from, bit for bit.

        A still is one frame; an incomplete last step of a video has its last frame twice.
        """
        patch, merge = self.config.patch_size, self.config.merge_size
        steps, rows, columns = patches.grid
        kept = patches.pixels.shape[2]
        pixels = patches.pixels.reshape(
            steps, rows // merge, columns // merge, merge, merge, 3, kept, patch, patch
        ).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
        return pixels.reshape(steps * kept, rows * patch, columns * patch, 3)

    def normalised(self, patches: "Patches") -> torch.Tensor:
        """float32 [P, patch_dim]: rescaled, normalised, a still repeated for each frame of the step."""
        values = self._table.take(patches.pixels + _CHANNEL_OFFSETS)
        if values.shape[2] != self.config.temporal_patch_size:
            values = values.repeat(self.config.temporal_patch_size, axis=2)
        return torch.from_numpy(values.reshape(len(values), self.config.patch_dim))


@dataclass(frozen=True, slots=True)
class Patches:
    """An image or video cut into patches, before normalisation: at most a fourth of the memory."""

    pixels: np.ndarray  # uint8 [P, 3, frames of a step (1 for a still), patch * patch]
    grid: tuple[int, int, int]  # steps, rows, columns in patches


_CHANNEL_OFFSETS = (np.arange(3, dtype=np.uint16) * 256).reshape(3, 1, 1)  # of the look-up table


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]."""
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(image)
