"""The words all else uses: a pair as the file says it, a tokenised sequence, a prompt, and a packed micro-batch."""

from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
import torch

from umer1.models.qwen2_vl.frames import VisionFeatures


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a pair, as the data file says it (docs/data.md)."""

    text: str  # the human turn; `<image>` / `<video>` markers are still in place
    images: tuple[str, ...] = ()  # paths relative to the data root
    videos: tuple[tuple[str, ...], ...] = ()  # per video its frame paths, in order, relative to the data root
    response: str | None = None  # the assistant turn; None for a prompt alone


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, its positive and, optionally, hard negatives of its own."""

    dataset: str
    query: Side
    positive: Side
    negatives: tuple[Side, ...] = ()
    index: int = -1  # position in the data file


@dataclass(slots=True)
class Sequence:
    """One tokenised side; L tokens, P vision patches, V vision spans (images or videos)."""

    input_ids: torch.Tensor  # int64 [L]
    labels: torch.Tensor  # int64 [L]: the NEXT token where it is supervised, -100 elsewhere
    position_ids: torch.Tensor  # int64 [3, L]: temporal, height, width (M-RoPE)
    pixel_values: torch.Tensor  # float32 [P, channels * temporal_patch * patch * patch]; P may be 0
    grid_thw: torch.Tensor  # int64 [V, 3] in the order of appearance in input_ids, in patches
    disc_index: int  # position of the last <disc_emb> of the prompt
    gen_index: int  # position of the last <gen_emb> of the response; -1 when there is no response
    prompt_length: int  # tokens before the response
    target_id: int = 0  # int64 hash of the content (text and media names): equal targets have equal ids

    def __len__(self) -> int:
        return self.input_ids.numel()


@dataclass(slots=True)
class EncodedPair:
    """The tokenised sides of one pair and where it came from."""

    query: Sequence
    positive: Sequence
    negatives: tuple[Sequence, ...] = ()
    dataset: str = ""
    index: int = -1
    slot: int = -1  # place in the global batch, the same at any number of ranks


@dataclass(slots=True)
class Prompt:
    """One side of an RL pair: what the trainer's model takes, and the pictures as a rollout engine takes them.

    The pictures are uint8 RGB and have the processor's resize behind them, so that the engine's patches are ours.
    """

    sequence: Sequence  # vision blocks expanded, no response
    images: tuple[np.ndarray, ...] = ()  # [height, width, 3] each
    videos: tuple[np.ndarray, ...] = ()  # [frames, height, width, 3] each; an incomplete last step is filled up


@dataclass(slots=True)
class PromptPair:
    """Both prompts of an RL record and where it came from."""

    query: Prompt
    positive: Prompt
    dataset: str = ""
    index: int = -1  # position in the data file
    slot: int = -1  # place in the global batch, the same at any number of ranks


class Movable:
    """A dataclass of tensors and other things."""

    __slots__ = ()

    def to(self, device: torch.device) -> Self:
        """Move every tensor; in place, and returns itself."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                setattr(self, item.name, value.to(device, non_blocking=True))
        return self


@dataclass(slots=True)
class PackedBatch(Movable):
    """S sequences one after the other in T token slots (padding, if any, is a last segment of its own).

    `cu_seqlens` bounds the segments, the padding segment included.  B pairs: sequences are ordered
    query, positive, negatives of pair 0, then pair 1, and so on; the row fields below give token rows in that flat
    layout, so that nothing downstream depends on the order.
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [3, T]
    cu_seqlens: torch.Tensor  # int32 [segments + 1]
    max_seqlen: int
    pixel_values: torch.Tensor  # float32 [P, patch_dim]; of fewer rows where a rank sees a share of the pictures
    grid_thw: torch.Tensor  # int64 [V, 3]
    disc_rows: torch.Tensor  # int64 [S]: B queries, then B positives, then all negatives
    gen_rows: torch.Tensor  # int64 [S] in the same order; -1 where there is no response
    num_pairs: int  # B
    num_negatives: int  # S - 2B
    target_ids: torch.Tensor  # int64 [B + num_negatives]: positives, then negatives
    supervised_rows: torch.Tensor  # int64 [R]
    supervised_labels: torch.Tensor  # int64 [R]
    supervised_sides: torch.Tensor  # int64 [R]: 0 query, 1 positive
    num_real_tokens: int  # T less padding
    vision_features: VisionFeatures | None = field(default=None)  # kept from the frozen ViT's one run
