"""M-RoPE positions: text advances all three axes, a vision span counts frames, rows and columns of merged patches."""

import torch

from umer1.models.qwen2_vl.config import Qwen2VLConfig


def mrope_positions(input_ids: torch.Tensor, grid_thw: torch.Tensor, config: Qwen2VLConfig) -> tuple[torch.Tensor, int]:
    """(position_ids int64 [3, L], the position of the token that would come next) of one sequence.

    `input_ids` int64 [L]; `grid_thw` int64 [V, 3] in patches, one row per vision span in order of appearance.  A span
    is a run of `image_token_id` or of `video_token_id`, t * h * w / merge^2 tokens long.  Text after a span goes on
    from the span's start plus the larger of its merged height and width (transformers' get_rope_index).
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
        position += max(h, w) // merge
        row, used = start + count, used + count
    if used != len(vision_rows):
        raise ValueError(f"{len(vision_rows)} vision tokens, but the grids account for {used}")
    parts.append(torch.arange(position, position + length - row).expand(3, -1))
    positions = torch.cat(parts, dim=1)
    # A long video's frame positions may pass the text that follows; what comes next is one past the largest.
    return positions, int(positions.max()) + 1 if length else 0
