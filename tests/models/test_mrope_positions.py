"""M-RoPE positions against transformers' get_rope_index."""

import pytest
import qwen2_vl_reference as reference
import torch

from umer1.models.qwen2_vl.positions import mrope_positions

IMAGE, VIDEO, START, END = reference.IMAGE, reference.VIDEO, reference.START, reference.END

# (kind, grid) of each span, with some text before, between and after.
CASES = {
    "text": [],
    "image": [(IMAGE, (1, 4, 6))],
    "tall_and_wide_images": [(IMAGE, (1, 8, 2)), (IMAGE, (1, 2, 10)), (IMAGE, (1, 4, 4))],
    "video": [(VIDEO, (3, 4, 4))],
    "long_video": [(VIDEO, (12, 2, 2))],
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
    positions, following = mrope_positions(ids, grid, config)
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    grids = {token: grid[[i for i, (kind, _) in enumerate(CASES[case]) if kind == token]] for token in (IMAGE, VIDEO)}
    want, delta = theirs.model.get_rope_index(
        ids[None], kinds[None], image_grid_thw=grids[IMAGE], video_grid_thw=grids[VIDEO]
    )
    assert torch.equal(positions, want[:, 0])
    assert following == ids.numel() + int(delta)


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 4, 8)])
def test_spans_and_grids_that_do_not_match_are_errors(grid):
    config = reference.our_config("tied_gqa")
    ids, _ = build([(IMAGE, (1, 4, 6))])
    with pytest.raises(ValueError, match="vision tokens"):
        mrope_positions(ids, torch.tensor([grid]), config)
