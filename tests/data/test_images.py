"""Patches and grids equal transformers' Qwen2-VL image processor, bit for bit."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from umer1.data.bad_samples import BadSample
from umer1.data.images import CLIP_MEAN, ImageConfig, Patchifier, smart_resize
from umer1.errors import ConfigError
from umer1.models.qwen2_vl.config import VisionConfig


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(config: ImageConfig, low: int, high: int) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        min_pixels=low, max_pixels=high, patch_size=config.patch_size, temporal_patch_size=config.temporal_patch_size
    )


def rows(patchifier: Patchifier, pictures: list, *, video: bool = False):
    patches = patchifier.video(iter(pictures), len(pictures)) if video else patchifier.image(pictures[0])
    return patchifier.normalised(patches), patches.grid


SIZES = [(56, 56), (48, 48), (1, 1), (7, 1400), (200, 1), (640, 480), (31, 333), (500, 499), (29, 2900)]


@pytest.mark.parametrize("patch_size", [14, 8])
@pytest.mark.parametrize("size", SIZES)
def test_image_patches_equal_transformers(size, patch_size):
    config = ImageConfig(patch_size=patch_size, min_pixels=3136, max_pixels=28 * 28 * 64)
    picture = noise(*size)
    want = reference(config, 3136, 28 * 28 * 64)(images=picture, return_tensors="np")
    pixels, grid = rows(Patchifier(config), [picture])
    assert list(grid) == want["image_grid_thw"][0].tolist()
    assert pixels.is_contiguous() and pixels.shape == want["pixel_values"].shape
    np.testing.assert_array_equal(pixels.numpy(), want["pixel_values"])


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_video_slots_hold_each_frame_as_an_image_would(frames):
    config = ImageConfig(video_min_pixels=3136, video_max_pixels=28 * 28 * 16)
    pictures = [noise(150, 70, seed) for seed in range(frames)]
    pixels, grid = rows(Patchifier(config), pictures, video=True)
    steps = (frames + 1) // 2
    single = reference(config, 3136, 28 * 28 * 16)
    images = [single(images=picture, return_tensors="np") for picture in pictures]
    high, wide = images[0]["image_grid_thw"][0, 1:]
    assert grid == (steps, high, wide)
    got = pixels.numpy().reshape(steps, high * wide, 3, 2, 14 * 14)
    for slot in range(2 * steps):
        source = images[min(slot, frames - 1)]["pixel_values"].reshape(high * wide, 3, 2, 14 * 14)
        np.testing.assert_array_equal(got[slot // 2, :, :, slot % 2], source[:, :, 0])


@pytest.mark.parametrize("patch_size", [14, 8])
@pytest.mark.parametrize("size", SIZES)
def test_frames_are_the_resized_pictures(size, patch_size):
    config = ImageConfig(patch_size=patch_size, min_pixels=3136, max_pixels=28 * 28 * 64, video_max_pixels=28 * 28 * 4)
    patchifier = Patchifier(config)
    pictures = [noise(*size, seed) for seed in range(3)]

    def resized(picture, shape):
        return np.asarray(picture.resize(shape[::-1], resample=Image.Resampling.BICUBIC))

    still = patchifier.frames(patchifier.image(pictures[0]))
    want = resized(pictures[0], patchifier.image_size(*size))
    assert still.dtype == np.uint8
    np.testing.assert_array_equal(still, want[None])
    clip = patchifier.frames(patchifier.video(iter(pictures), 3))
    want = [resized(picture, patchifier.frame_size(*size, 3)) for picture in pictures]
    np.testing.assert_array_equal(clip, np.stack([*want, want[-1]]))


def test_smart_resize_equals_transformers():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(value) for value in np.exp(rng.uniform(0, 8, 2)).astype(int))
        low = int(rng.integers(1, 5000))
        bounds = {
            "factor": int(rng.choice([16, 28])),
            "min_pixels": low,
            "max_pixels": low + int(rng.integers(1, 10**6)),
        }
        try:
            want = reference_resize(height, width, **bounds)
        except ValueError:
            with pytest.raises(BadSample, match="aspect_ratio"):
                smart_resize(height, width, **bounds)
        else:
            assert smart_resize(height, width, **bounds) == want


def test_frames_of_different_sizes_are_a_bad_sample():
    with pytest.raises(BadSample, match="frame_sizes"):
        Patchifier(ImageConfig()).video([noise(56, 56), noise(56, 57)], 2)


def test_bounds_explicit_then_directory_then_recipe():
    vision = VisionConfig()
    assert ImageConfig.from_settings(vision) == ImageConfig()
    old = {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.5, 0.5, 0.5], "resample": 3}
    new = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    config = ImageConfig.from_settings(vision, old, {"size": {"shortest_edge": 784, "longest_edge": 7840}})
    assert (config.min_pixels, config.max_pixels, config.mean) == (3136, 12845056, (0.5, 0.5, 0.5))
    assert (config.video_min_pixels, config.video_max_pixels) == (784, 7840)
    config = ImageConfig.from_settings(vision, new, max_pixels=5000)
    assert (config.min_pixels, config.max_pixels, config.mean) == (3136, 5000, CLIP_MEAN)


def test_long_videos_share_a_budget_when_the_directory_says_so():
    video = {"cap_pixels_per_frame": True, "max_video_tokens": 100, "min_pixels": 784, "max_pixels": 78400}
    config = ImageConfig.from_settings(VisionConfig(), {}, video)
    patchifier = Patchifier(config)
    assert patchifier.frame_size(280, 280, 1) == (280, 280)
    # 100 tokens * 784 pixels * 0.9 * 2 frames a token / 40 frames = 3528 pixels a frame
    assert patchifier.frame_size(280, 280, 40) == (56, 56)
    assert patchifier.frame_size(280, 280, 4000) == (28, 28)
    free = Patchifier(ImageConfig.from_settings(VisionConfig(), {}, {**video, "cap_pixels_per_frame": False}))
    assert free.frame_size(280, 280, 4000) == (280, 280)


@pytest.mark.parametrize(
    "image, video, words",
    [
        ({"min_pixels": 784.5}, {}, "an integer is needed"),
        ({"size": {"height": 224, "width": 224}}, {}, "shortest_edge and longest_edge"),
        ({"size": 224}, {}, "shortest_edge and longest_edge"),
        ({"image_mean": [0.1, 0.2, 0.3]}, {"image_mean": [0.3, 0.2, 0.1]}, "image_mean differs"),
        ({"min_pixels": 0}, {}, "min_pixels=0"),
        ({"max_pixels": 100}, {}, "less than one vision token"),
        ({"image_std": [1.0, 0.0, 1.0]}, {}, "image_std"),
        ({"image_std": [1.0, float("nan"), 1.0]}, {}, "image_std"),
        ({"image_mean": ["a", "b", "c"]}, {}, "image_mean"),
    ],
)
def test_settings_that_cannot_be_followed(image, video, words):
    with pytest.raises(ConfigError, match=words):
        ImageConfig.from_settings(VisionConfig(), image, video)


def test_settings_that_change_pixels_are_refused_together():
    settings = {"do_resize": False, "resample": 2, "patch_size": 16, "rescale_factor": 0.5, "image_std": [1]}
    with pytest.raises(ConfigError) as caught:
        ImageConfig.from_settings(VisionConfig(), settings, {"do_normalize": False}, min_pixels=9, max_pixels=8)
    text = str(caught.value)
    names = ("do_resize", "resample", "patch_size", "rescale_factor", "image_std", "do_normalize", "min_pixels=9")
    assert all(name in text for name in names)
