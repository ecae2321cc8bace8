"""Dividing a micro-batch's frames over ranks: everything is seen once, costs are even, pieces keep their owners."""

import pytest
import torch

from umer1.models.qwen2_vl.config import VisionConfig
from umer1.models.qwen2_vl.frames import Frames, VisionFeatures, divide, frame_cost

VISION = VisionConfig(embed_dim=8, num_heads=2)
# A picture, a video of three frames, a picture of one window, another video.
GRIDS = torch.tensor([[1, 4, 6], [3, 4, 4], [1, 2, 2], [2, 8, 4]])


def shares(ranks: int) -> list[Frames]:
    return [Frames.of(GRIDS, VISION, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_every_patch_is_one_ranks(ranks):
    frames = shares(ranks)
    sizes = [24, 16, 16, 16, 4, 32, 32]
    assert frames[0].sizes.tolist() == sizes
    owned = torch.cat([each.patches_of(each.rank) for each in frames])
    assert torch.equal(owned.sort().values, torch.arange(sum(sizes)))
    patches = torch.randn(sum(sizes), 3)
    for each in frames:
        mine = each.own(patches)
        assert torch.equal(mine, patches[each.patches_of(each.rank)]) and len(mine) == each.patches[each.rank]
        assert torch.equal(each.own(mine), mine)
        assert each.grids_of(each.rank).prod(-1).sum() == len(mine)
    with pytest.raises(ValueError, match=r"7 patches, but the grids have 140"):
        frames[0].own(patches[:7])


def test_costs_are_even():
    """No rank has more than an even share and one item: what the rule of the dearest first guarantees."""
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 4, 8):
        costs = [frame_cost(int(n), VisionConfig()) for n in torch.randint(4, 3000, (60,), generator=generator)]
        loads = [0.0] * ranks
        for cost, owner in zip(costs, divide(costs, ranks), strict=True):
            loads[owner] += cost
        assert max(loads) <= sum(costs) / ranks + max(costs) * (1 - 1 / ranks)
        assert max(loads) < 1.1 * sum(costs) / ranks
    # A ViT-H's frame of 1,000 patches against four of 250: attention makes it dearer than all of them.
    assert divide([frame_cost(n, VisionConfig()) for n in (1000, 250, 250, 250, 250)], 2) == [0, 1, 1, 1, 1]


def test_pieces_of_pictures_and_back():
    for frames in shares(2):
        rows = torch.randn(frames.patches[frames.rank], 5)
        counts = GRIDS[:, 0].tolist()
        pieces = VisionFeatures(rows, frames).split(counts)
        assert [len(piece.frames.owners) for piece in pieces] == counts
        again = VisionFeatures.join(pieces)
        assert torch.equal(again.rows, rows) and torch.equal(again.frames.owners, frames.owners)
        twice = VisionFeatures.join([pieces[3], pieces[3]])
        assert torch.equal(twice.rows, pieces[3].rows.repeat(2, 1))
