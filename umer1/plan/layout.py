"""Which rank does what: megatron's order of ranks (TP fastest, then DP, then PP), and the layers of each stage."""

from dataclasses import dataclass

from umer1.distributed.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where one process stands."""

    rank: int
    node: int
    tp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of a legal layout, and what follows from them."""

    world_size: int
    tp: int
    pp: int
    virtual: int
    """Virtual stages a pipeline rank has; 1 without interleaving."""

    @classmethod
    def of(cls, parallel: ParallelConfig, num_layers: int, world_size: int) -> "Layout":
        """Of settings that ParallelConfig.violations has nothing against."""
        return cls(
            world_size,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_size(num_layers) or 1,
        )

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp)

    def place(self, rank: int, gpus_per_node: int) -> RankPlace:
        """megatron's default order, tp-cp-ep-dp-pp: neighbours are tensor-parallel peers."""
        return RankPlace(
            rank,
            rank // gpus_per_node,
            rank % self.tp,
            rank // self.tp % self.dp,
            rank // (self.tp * self.dp),
        )

    def rank_of(self, *, tp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The inverse of `place`."""
        return (pp * self.dp + dp) * self.tp + tp


def stage_layers(parallel: ParallelConfig, num_layers: int, stage: int) -> list[range]:
    """Global numbers of the decoder layers of a pipeline stage, for each of its virtual stages in order.

    With v virtual stages of c layers each, virtual stage i of stage s starts at layer (i * stages + s) * c.
    """
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_size(num_layers)
    if virtual:
        count = num_layers // stages // virtual
        return [range((i * stages + stage) * count, (i * stages + stage + 1) * count) for i in range(virtual)]
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    given = [n for n in (first, last) if n is not None]
    others = stages - len(given)
    each = (num_layers - sum(given)) // others if others else 0
    sizes = [each] * stages
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1]))]
