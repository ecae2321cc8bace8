"""InfoNCE over ranks, gathered and in a ring, against the formula on the gathered batch in fp64."""

import pytest
import torch
import torch.distributed as dist
from infonce_reference import loss_and_gradients, reference_loss

from umer1.ops import infonce_distributed
from umer1.ops.infonce import infonce
from umer1.testing import assert_close, run_distributed

WIDTH = 6
RAGGED = {  # by number of ranks: (queries, keys, negatives) of each
    1: [(7, 9, 4)],
    2: [(5, 6, 0), (3, 3, 4)],
    4: [(4, 4, 3), (0, 0, 0), (6, 7, 0), (1, 2, 5)],
}
EVEN = {world: [(4, 4, 2)] * world for world in (1, 2, 4)}


def make_batch(counts, seed: int):
    """The global batch, rank after rank: tensors with gradient, then labels (own keys' rows by rank) and ids."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys, negatives = (sum(count[kind] for count in counts) for kind in range(3))
    tensors = {
        name: torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
        for name, size in (("query", queries), ("key", keys), ("negatives", negatives))
    } | {"temperature": torch.tensor(0.3, dtype=torch.float64)}
    labels = [torch.randint(0, max(n, 1), (b,), generator=generator) for b, n, _ in counts]
    ids = {
        "query_ids": torch.randint(0, 5, (queries,), generator=generator),
        "key_ids": torch.randint(0, 5, (keys + negatives,), generator=generator),
    }
    return tensors, labels, ids


def compare(counts, seed: int, with_ids: bool, columns: str) -> None:
    """This rank's loss and gradients of one batch are the slices of the formula's."""
    rank, group = dist.get_rank(), dist.group.WORLD
    tensors, labels, ids = make_batch(counts, seed)
    first = [sum(count[kind] for count in counts[:rank]) for kind in range(3)]
    own = {
        name: slice(first[kind], first[kind] + counts[rank][kind])
        for kind, name in enumerate(("query", "key", "negatives"))
    }
    before = torch.tensor([sum(n for _, n, _ in counts[:r]) for r in range(len(counts))])
    whole = torch.cat([part + before[r] for r, part in enumerate(labels)])
    want = loss_and_gradients(reference_loss, tensors, labels=whole, **(ids if with_ids else {}))
    own_ids = {}
    if with_ids:
        keys, extra = ids["key_ids"].split([len(tensors["key"]), len(tensors["negatives"])])
        key_ids = torch.cat([keys[own["key"]], extra[own["negatives"]]])
        own_ids = {"query_ids": ids["query_ids"][own["query"]], "key_ids": key_ids}
    mine = {name: value[own[name]] if name in own else value for name, value in tensors.items()}
    got = loss_and_gradients(infonce, mine, labels=labels[rank], group=group, columns=columns, **own_ids)
    dist.all_reduce(got["d temperature"])
    case = f"{columns} seed={seed} ids={with_ids} counts={counts}"
    for name in ("loss", "d temperature"):
        assert_close(f"{name} {case}", got[name], want[name], rtol=1e-10)
    for name, part in own.items():
        assert_close(f"d {name} {case}", got[f"d {name}"], want[f"d {name}"][part], rtol=1e-10, atol=1e-14)


def compare_all(world: int, seed: int) -> bool:
    infonce_distributed.GATHER_CHUNK = 3 * world * WIDTH * 8  # three rows of each rank: several chunks
    without_negatives = [(queries, keys, 0) for queries, keys, _ in RAGGED[world]]
    for columns in ("gather", "ring"):
        for counts in (RAGGED[world], EVEN[world], without_negatives):
            for with_ids in (False, True):
                compare(counts, seed, with_ids, columns)
    return True


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_equal_the_gathered_batch(world):
    seed = int(torch.randint(2**31, ()))  # a failure names it
    assert run_distributed(compare_all, world, world, seed) == [True] * world
