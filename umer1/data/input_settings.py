"""What a model's inputs were shaped by, kept beside its weights: a file of every checkpoint and export.

Other programs read the same bounds from the preprocessor files, which are written anew with them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import INPUTS_NAME, HFDirectory

_NUM_FRAMES = 8


@dataclass(frozen=True, slots=True)
class InputSettings:
    """Fewest and most pixels after resizing, frames of a video file, and what stands in for missing media."""

    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    num_frames: int
    blank_image_for_text: bool

    @staticmethod
    def of(pictures: Any, blank_image_for_text: bool) -> "InputSettings":
        """Those of an ImageConfig, and of whether a text-only input gets the white picture."""
        return InputSettings(
            image_min_pixels=pictures.min_pixels,
            image_max_pixels=pictures.max_pixels,
            video_min_pixels=pictures.video_min_pixels,
            video_max_pixels=pictures.video_max_pixels,
            num_frames=pictures.num_frames,
            blank_image_for_text=blank_image_for_text,
        )

    @staticmethod
    def read(directory: HFDirectory) -> "InputSettings | None":
        """Those that `directory` keeps; None where it keeps none.  Raises UserError."""
        found = directory.input_settings
        if not found:
            return None
        problems = []
        for field in _fields():
            value = found.get(field.name)
            legal = type(value) is field.type and (field.type is bool or value >= 1)
            if not legal:
                rule = "true or false" if field.type is bool else "a whole number of 1 or above"
                problems.append(f"{field.name}={value!r} must be {rule}")
        if problems:
            raise UserError(f"{directory.path / INPUTS_NAME}: {'; '.join(problems)}")
        return InputSettings(**{field.name: found[field.name] for field in _fields()})

    def differences(self, there: "InputSettings") -> list[str]:
        """Where `there` is not this, one clause each."""
        pairs = [(field.name, getattr(there, field.name), getattr(self, field.name)) for field in _fields()]
        return [f"{name} is {theirs} there and {ours} here" for name, theirs, ours in pairs if theirs != ours]

    def carried_by(self, directory: HFDirectory) -> HFDirectory:
        """`directory` with these settings in its files: its own ones are of another model from now on."""
        image = _bounded(directory, directory.image_settings, self.image_min_pixels, self.image_max_pixels)
        video = _bounded(directory, directory.video_settings, self.video_min_pixels, self.video_max_pixels)
        image.setdefault("image_processor_type", "Qwen2VLImageProcessor")
        video.setdefault("video_processor_type", "Qwen2VLVideoProcessor")
        for name in ("image_mean", "image_std"):
            if name in image:
                video.setdefault(name, image[name])
        return directory.with_settings(image, video, dataclasses.asdict(self))


def settle_inputs(config: Any, directory: HFDirectory) -> None:
    """Fill in `num_frames` and `blank_image_for_text` where `config` leaves them open: as the directory says, else 8
    and no picture."""
    kept = InputSettings.read(directory)
    if config.num_frames is None:
        config.num_frames = kept.num_frames if kept else _NUM_FRAMES
    if config.blank_image_for_text is None:
        config.blank_image_for_text = kept.blank_image_for_text if kept else False


def _fields() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(InputSettings)


def _bounded(directory: HFDirectory, settings: dict[str, Any], low: int, high: int) -> dict[str, Any]:
    """A preprocessor file's settings under other bounds, in every spelling that a reader may look for."""
    vision = directory.config.vision
    geometry = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    size = {"shortest_edge": low, "longest_edge": high}
    return geometry | settings | {"min_pixels": low, "max_pixels": high, "size": size}
