"""M-RoPE positions: text advances all three axes, a vision span counts frames, rows and columns of merged patches.

Text after a span goes on one past the largest position of the span, time included: the rule that the published weights
were trained with (transformers up to 4.57, VLM2Vec's Qwen2-VL), and vLLM's.  transformers 5 goes on behind the larger
merged side alone, which differs for a video of more time steps than merged rows and columns.
"""

import numpy as np
import torch

from umer1.models.qwen2_vl.config import Qwen2VLConfig


def next_position(position_ids: torch.Tensor | np.ndarray) -> int:
    """The position, on all three axes, of the token that comes after `position_ids` int64 [3, L]; 0 where L is 0."""
    return int(position_ids.max()) + 1 if position_ids.shape[1] else 0


def mrope_positions(input_ids: torch.Tensor, grid_thw: torch.Tensor, config: Qwen2VLConfig) -> torch.Tensor:
    """position_ids int64 [3, L] of one sequence.

    `input_ids` int64 [L]; `grid_thw` int64 [V, 3] in patches, one row per vision span in order of appearance.  A span
    is a run of `image_token_id` or of `video_token_id`, t * h * w / merge^2 tokens long.
    Raises ValueError when the spans and the grids do not match.
    """
    merge = config.vision.spatial_merge_size
    is_vision = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    vision_rows = is_vision.nonzero().flatten().tolist()
    length = input_ids.numel()
    parts: list[torch.Tensor] = []
    row = position = used = 0
    for index, (t, h, w) in enumerate(grid_thw.tolist()):
        count = t * (h // merge) * (w // merge)
        if used + count > len(vision_rows) or vision_rows[used + count - 1] - vision_rows[used] != count - 1:
            raise ValueError(f"vision span {index} with grid {t} x {h} x {w} needs {count} vision tokens in a row")
        start = vision_rows[used]
        parts.append(torch.arange(position, position + start - row).expand(3, -1))
        position += start - row
        frames = torch.arange(t).repeat_interleave(count // t)
        rows = torch.arange(h // merge).repeat_interleave(w // merge).repeat(t)
        columns = torch.arange(w // merge).repeat(t * (h // merge))
        parts.append(torch.stack([frames, rows, columns]) + position)
        position += max(t, h // merge, w // merge)
        row, used = start + count, used + count
    if used != len(vision_rows):
        raise ValueError(f"{len(vision_rows)} vision tokens, but the grids account for {used}")
    parts.append(torch.arange(position, position + length - row).expand(3, -1))
    return torch.cat(parts, dim=1)
