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
    patches = patchifier.video(pictures) if video else patchifier.image(pictures[0])
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
        Patchifier(ImageConfig()).video([noise(56, 56), noise(56, 57)])


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


def test_settings_that_change_pixels_are_refused_together():
    settings = {"do_resize": False, "resample": 2, "patch_size": 16, "rescale_factor": 0.5, "image_std": [1]}
    with pytest.raises(ConfigError) as caught:
        ImageConfig.from_settings(VisionConfig(), settings, {"do_normalize": False}, min_pixels=9, max_pixels=8)
    text = str(caught.value)
    names = ("do_resize", "resample", "patch_size", "rescale_factor", "image_std", "do_normalize", "min_pixels=9")
    assert all(name in text for name in names)
