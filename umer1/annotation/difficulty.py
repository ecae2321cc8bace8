"""How hard a pair is for the current model: where its query ranks its own positive among those of its data set.

RL learns from pairs that the model sometimes gets right.  A pair whose positive stands first already teaches nothing,
one whose positive stands no higher than chance would put it will hardly ever be hit.  The ranks are those of disc
embeddings: one pass over each side, no response, and equal positives count once.
"""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np

from umer1 import device as devices
from umer1.annotation.samples import Sample, side_key
from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.data.media import MediaRoot
from umer1.data.schema import Side
from umer1.distributed.parallel import init_distributed
from umer1.errors import UserError
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.inputs import Input
from umer1.inference.planning import plan_batches
from umer1.inference.runner import Runner, inspect_together
from umer1.progress import Progress

_MAX_INPUTS = 1024  # of a batch; tokens and patches bound it before
_NUM_WORKERS = 2  # threads that decode pictures ahead of the model
_BLOCK = 1024  # queries scored at once


@dataclass(frozen=True, slots=True)
class RankRule:
    """Which ranks are worth RL; a rank is 1 where no other positive scores higher."""

    min_rank: int
    max_share: float  # of the data set's distinct positives

    def verdict(self, rank: int, pool: int) -> str:
        """trivial, hopeless or kept; among fewer than `min_rank` positives every pair is trivial."""
        if rank < self.min_rank:
            return "trivial"
        return "hopeless" if rank > self.max_share * pool else "kept"


class Difficulty:
    """Keeps the pairs that are neither trivial nor hopeless, and counts the rest by modality."""

    def __init__(self, engine: EngineConfig, rule: RankRule, media: MediaRoot):
        self.engine = replace(engine, model=str(newest_model(engine.model)))
        self.rule, self.media = rule, media
        self.counts: dict[str, Counter[str]] = {}

    def keep(self, samples: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        """Of each modality's pairs those to choose from, in their order; equal contents are ranked alike."""
        flat = [sample for several in samples.values() for sample in several]
        ranks = dict(zip((sample.content() for sample in flat), self.ranks(flat), strict=True))
        found: dict[str, list[Sample]] = {}
        for modality, several in samples.items():
            verdicts = [self._verdict(ranks[sample.content()]) for sample in several]
            self.counts[modality] = Counter(verdicts)
            found[modality] = [s for s, verdict in zip(several, verdicts, strict=True) if verdict == "kept"]
        return found

    def manifest(self) -> dict:
        """What made the choice, and how many pairs of each modality got which verdict."""
        return {
            "model": self.engine.model,
            "model_sha256": model_fingerprint(self.engine.model),
            "rl_min_rank": self.rule.min_rank,
            "rl_max_rank_share": self.rule.max_share,
            "pairs": {modality: dict(counts) for modality, counts in self.counts.items()},
        }

    def ranks(self, samples: list[Sample]) -> list[tuple[int, int] | None]:
        """(rank of the own positive, distinct positives of its data set) of each pair; None where a side has no
        embedding, which media that cannot be decoded and over-long prompts have not."""
        sides = {side_key(side): side for sample in samples for _, side in sample.sides()}
        vectors = self._embed(list(sides.values()))
        devices.release_memory()  # of the model: a teacher of our own may be the next on this device
        vectors = {key: vector for key, vector in zip(sides, vectors, strict=True) if vector is not None}
        members: dict[str, list[int]] = defaultdict(list)
        for place, sample in enumerate(samples):
            if all(side_key(side) in vectors for _, side in sample.sides()):
                members[sample.dataset].append(place)
        found: list[tuple[int, int] | None] = [None] * len(samples)
        for places in members.values():
            queries = [side_key(samples[place].query) for place in places]
            positives = [side_key(samples[place].positive) for place in places]
            pool = {key: number for number, key in enumerate(dict.fromkeys(positives))}
            targets = np.stack([vectors[key] for key in pool])
            own = np.array([pool[key] for key in positives])
            ranks = own_ranks(np.stack([vectors[key] for key in queries]), targets, own)
            for place, rank in zip(places, ranks.tolist(), strict=True):
                found[place] = (rank, len(pool))
        return found

    def _verdict(self, rank: tuple[int, int] | None) -> str:
        return "not_embedded" if rank is None else self.rule.verdict(*rank)

    def _embed(self, sides: list[Side]) -> list[np.ndarray | None]:
        """Disc embeddings, float32 [H]; None for a side that has none."""
        inputs = [
            Input(str(number), side.text, side.images, side.videos[0] if side.videos else (), number + 1)
            for number, side in enumerate(sides)
        ]
        found: list[np.ndarray | None] = [None] * len(sides)
        directory = open_directory(self.engine)
        processor = make_processor(self.engine, directory)
        print(f"umer1 annotate: {len(sides):,} sides are ranked by {self.engine.model}", file=sys.stderr, flush=True)
        with init_distributed(self.engine.parallel()) as state:
            costs, _ = inspect_together(inputs, "disc", self.media, processor, state)
            batches = plan_batches(
                costs,
                max_tokens=self.engine.max_tokens_per_batch,
                max_patches=self.engine.max_patches_per_batch,
                max_inputs=_MAX_INPUTS,
                num_groups=state.dp_size,
            )
            model = load_engine(self.engine, directory, processor, state)
            progress = Progress("umer1 annotate", sum(map(len, batches)), unit="sides ranked")
            options = {"generation": None, "skip_bad": True, "num_workers": _NUM_WORKERS, "progress": progress}
            encoded, _ = Runner(model, inputs, self.media, **options).run(batches)
            progress.finish()
        for item in encoded:
            if not np.isfinite(item.embedding).all():
                raise UserError(f"{self.engine.model}: states are not finite; bf16 may be too narrow (try --fp32)")
            found[item.position] = item.embedding
        return found


def own_ranks(queries: np.ndarray, targets: np.ndarray, own: np.ndarray) -> np.ndarray:
    """int64 [Q]: 1 + how many of `targets` [P, H] score higher with the row of `queries` [Q, H] than its `own` [Q]."""
    ranks = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores = queries[block] @ targets.T
        mine = np.take_along_axis(scores, own[block, None], axis=1)
        ranks[block] = 1 + (scores > mine).sum(axis=1)
    return ranks
