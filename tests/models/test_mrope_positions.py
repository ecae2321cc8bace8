"""M-RoPE positions against transformers' get_rope_index where releases agree, and against the rule of 4.57 beyond."""

import random

import pytest
import qwen2_vl_reference as reference
import torch

from umer1.models.qwen2_vl.positions import mrope_positions, next_position

IMAGE, VIDEO, START, END = reference.IMAGE, reference.VIDEO, reference.START, reference.END

# (kind, grid) of each span, with some text before, between and after.
CASES = {
    "text": [],
    "image": [(IMAGE, (1, 4, 6))],
    "tall_and_wide_images": [(IMAGE, (1, 8, 2)), (IMAGE, (1, 2, 10)), (IMAGE, (1, 4, 4))],
    "video": [(VIDEO, (2, 4, 4))],
    "image_then_video": [(IMAGE, (1, 4, 2)), (VIDEO, (2, 2, 6))],
}


def build(spans) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [1, 2, 3]
    for token, (t, h, w) in spans:
        ids += [START] + [token] * (t * h * w // 4) + [END, 4, 5]
    grid = torch.tensor([grid for _, grid in spans], dtype=torch.long).reshape(-1, 3)
    return torch.tensor(ids), grid


@pytest.mark.parametrize("case", list(CASES))
def test_equals_transformers(case):
    theirs, config = reference.reference_model("tied_gqa"), reference.our_config("tied_gqa")
    ids, grid = build(CASES[case])
    positions = mrope_positions(ids, grid, config)
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    grids = {token: grid[[i for i, (kind, _) in enumerate(CASES[case]) if kind == token]] for token in (IMAGE, VIDEO)}
    want, delta = theirs.model.get_rope_index(
        ids[None], kinds[None], image_grid_thw=grids[IMAGE], video_grid_thw=grids[VIDEO]
    )
    assert torch.equal(positions, want[:, 0])
    assert next_position(positions) == ids.numel() + int(delta)


def by_the_rule_of_4_57(kinds: list[str | tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Positions token by token: what follows anything is one past the largest position so far, on any axis."""
    found: list[tuple[int, int, int]] = []
    for kind in kinds:
        begin = 1 + max((max(place) for place in found), default=-1)
        if kind == "text":
            found.append((begin, begin, begin))
        else:
            t, h, w = kind
            found += [(begin + i, begin + j, begin + k) for i in range(t) for j in range(h // 2) for k in range(w // 2)]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_text_after_a_long_video_goes_on_behind_all_of_it(seed):
    """Random layouts with videos of up to 300 frames (150 time steps)."""
    draw = random.Random(seed)
    spans = []
    for _ in range(draw.randint(1, 4)):
        sides = 2 * draw.randint(1, 5), 2 * draw.randint(1, 5)
        spans.append((VIDEO, (draw.randint(1, 150), *sides)) if draw.random() < 0.7 else (IMAGE, (1, *sides)))
    ids, grid = build(spans)
    kinds = ["text"] * 3
    for _, shape in spans:
        kinds += ["text", shape, "text", "text", "text"]
    want = torch.tensor(by_the_rule_of_4_57(kinds)).T
    positions = mrope_positions(ids, grid, reference.our_config("tied_gqa"))
    assert torch.equal(positions, want)
    assert next_position(positions) == int(want.max()) + 1 == int(want[0, -1]) + 1


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 4, 8)])
def test_spans_and_grids_that_do_not_match_are_errors(grid):
    config = reference.our_config("tied_gqa")
    ids, _ = build([(IMAGE, (1, 4, 6))])
    with pytest.raises(ValueError, match="vision tokens"):
        mrope_positions(ids, torch.tensor([grid]), config)
