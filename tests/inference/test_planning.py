"""Costs from headers against the real processor's counts, and batches under budgets."""

import pytest
from PIL import Image

from umer1.data.images import ImageConfig, Patchifier
from umer1.data.media import MediaRoot
from umer1.inference.inputs import Input
from umer1.inference.planning import Cost, input_cost, inspect, plan_batches

CONFIG = ImageConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 12, video_max_pixels=28 * 28 * 6)


@pytest.fixture
def root(tmp_path):
    for number, size in enumerate([(30, 30), (300, 40), (500, 700)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def test_patches_are_those_of_the_patchifier(root):
    media, patchifier = MediaRoot(root), Patchifier(CONFIG)
    for images in (("0.png",), ("1.png", "2.png")):
        want = sum(len(patchifier.image(media.open_image(path)).pixels) for path in images)
        assert input_cost(Input("a", "text", images, (), 1), "disc", media, patchifier).patches == want
    frames = ("2.png",) * 5
    want = len(patchifier.video([media.open_image(path) for path in frames], len(frames)).pixels)
    assert input_cost(Input("a", "", (), frames, 1), "gen", media, patchifier).patches == want


def test_inspect_finds_every_bad_file_before_decoding(root):
    inputs = [
        Input("a", "x", ("0.png",), (), 1),
        Input("b", "x", ("nothing.png",), (), 2),
        Input("c", "x", (), ("0.png", "broken.png"), 3),
        Input("d", "x", ("../outside.png",), (), 4),
    ]
    costs, bad = inspect(inputs, "disc", MediaRoot(root), Patchifier(CONFIG))
    assert [cost is None for cost in costs] == [False, True, True, True]
    assert [(entry.line, entry.id, entry.cause) for entry in bad] == [
        (2, "b", "missing_file"),
        (3, "c", "corrupt_image"),
        (4, "d", "path_escape"),
    ]
    _, bad = inspect(inputs[:1], "disc", None, Patchifier(CONFIG))
    assert "--data-root" in bad[0].detail


def test_batches_hold_every_input_once_within_the_budgets():
    costs = [Cost(10 * (i % 7) + 5, 4 * (i % 5)) if i % 11 else None for i in range(200)]
    batches = plan_batches(costs, max_tokens=120, max_patches=30, max_inputs=6, num_groups=2)
    assert sorted(i for batch in batches for i in batch) == [i for i in range(200) if i % 11]
    for batch in batches:
        assert len(batch) <= 6
        assert sum(costs[i].tokens for i in batch) <= 120
        assert sum(costs[i].patches for i in batch) <= 30
    largest = [max(costs[i].tokens for i in batch) for batch in batches]
    assert largest == sorted(largest, reverse=True)


def test_an_input_beyond_the_budget_is_alone_and_ranks_share_small_jobs():
    costs = [Cost(500, 0), Cost(10, 0), Cost(10, 0)]
    assert plan_batches(costs, max_tokens=100, max_patches=9, max_inputs=8, num_groups=1) == [[0], [1, 2]]
    assert len(plan_batches([Cost(1, 0)] * 8, max_tokens=100, max_patches=9, max_inputs=8, num_groups=4)) == 4
