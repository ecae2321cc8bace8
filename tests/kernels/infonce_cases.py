"""Random blocks of InfoNCE, and what they should give, in fp64 by plain torch."""

import math
from dataclasses import dataclass

import torch


@dataclass(kw_only=True)
class Case:
    """A batch of rows against keys (both directions) and negatives (rows only); see umer1.ops.infonce_torch."""

    query: torch.Tensor  # [B, D]
    key: torch.Tensor  # [N, D]
    negative: torch.Tensor  # [M, D]
    labels: torch.Tensor  # int64 [B]
    temperature: float | torch.Tensor
    row_ids: torch.Tensor | None  # int64 [B]
    column_ids: torch.Tensor | None  # int64 [N + M]

    def logits(self) -> torch.Tensor:
        """fp64 [B, N + M], -inf where an entry takes no part."""
        columns = torch.cat([self.key, self.negative]).double()
        logits = self.query.double() @ columns.T / float(self.temperature)
        if self.row_ids is not None:
            equal = self.row_ids[:, None] == self.column_ids[None]
            logits = logits.masked_fill(equal & ~self.is_label(), -math.inf)
        return logits

    def is_label(self) -> torch.Tensor:
        """bool [B, N + M]."""
        place = torch.arange(len(self.key) + len(self.negative))
        return self.labels[:, None] == place[None]

    def slopes(self) -> torch.Tensor:
        """d (sum of both directions' losses) / d logits, fp64 [B, N + M], by the formula entry by entry."""
        logits, keys = self.logits(), len(self.key)
        slopes = logits.softmax(1) - self.is_label().double()
        weight = torch.bincount(self.labels, minlength=keys).double()
        by_column = torch.where(weight > 0, logits[:, :keys].softmax(0) * weight, 0.0)
        slopes[:, :keys] += by_column - self.is_label()[:, :keys].double()
        return slopes


def random_case(seed: int, *, largest: int = 70, dtype: torch.dtype | None = None) -> Case:
    """Everything is drawn from the seed: sizes, dtype, options, strides, how alike the embeddings are."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def rows(number: int, width: int, center: torch.Tensor) -> torch.Tensor:
        """Unit rows around a center; one in four cases has them as a slice of wider rows."""
        drawn = torch.nn.functional.normalize(center + torch.randn(number, width, generator=draw), dim=1).to(dtype)
        if integer(0, 3):
            return drawn
        wide = torch.full((number, width + integer(1, 9)), math.nan, dtype=dtype)
        wide[:, :width] = drawn
        return wide[:, :width]

    sizes, width = [integer(1, largest) for _ in range(2)], integer(1, largest)
    if integer(0, 1):
        width = width // 8 * 8 + 8  # rows that bulk copies take
    if dtype is None:
        dtype = (torch.float32, torch.float16, torch.bfloat16)[integer(0, 2)]
    center = torch.randn(width, generator=draw) * integer(0, 2)
    negatives = integer(0, largest) if integer(0, 1) else 0
    labels = torch.randint(0, sizes[1], (sizes[0],), generator=draw)
    row_ids = column_ids = None
    if integer(0, 1):
        kinds = integer(1, 20)
        row_ids = torch.randint(0, kinds, (sizes[0],), generator=draw) - 2**40
        column_ids = torch.randint(0, kinds, (sizes[1] + negatives,), generator=draw) - 2**40
    temperature = (0.02, 0.07, 1.0)[integer(0, 2)]
    return Case(
        query=rows(sizes[0], width, center),
        key=rows(sizes[1], width, center),
        negative=rows(negatives, width, center),
        labels=labels,
        temperature=torch.tensor(temperature) if integer(0, 1) else temperature,
        row_ids=row_ids,
        column_ids=column_ids,
    )
