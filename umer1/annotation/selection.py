"""Which pairs are kept apart for RL: as many of image, video and document, drawn before anybody is asked.

By chance alone, or, where there is a model, by chance from those that are neither trivial nor hopeless to it.
"""

import hashlib
import heapq
from collections.abc import Iterable

from umer1.annotation.config import MODALITIES
from umer1.annotation.difficulty import Difficulty
from umer1.annotation.samples import Broken, Sample, pair_key
from umer1.data.bad_samples import BadSample
from umer1.data.images import check_aspect_ratio
from umer1.data.media import MediaRoot
from umer1.data.rl_dataset import PromptDataset
from umer1.errors import UserError


class Selection:
    """Draws `count` pairs by the hash of seed and content, so that neither order nor resumes matter.

    Pairs of equal content are one: they all stay out of the SFT files when it is chosen, and stand once in the RL file.
    among: contents of the pairs that may be drawn; None: all.
    difficulty: what of `drawn` pairs of each modality may be chosen; None: all, and no more than `count` are drawn.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        media: MediaRoot,
        *,
        among: set[str] | None = None,
        difficulty: Difficulty | None = None,
        drawn: int | None = None,
    ):
        self.count, self.seed, self.media, self.among = count, seed, media, among
        self.difficulty, self.drawn = difficulty, count if drawn is None else drawn
        # per modality the smallest hashes seen, as a heap with the largest on top: (-hash, content, sample)
        self._heaps: dict[str, list[tuple[int, str, Sample]]] = {modality: [] for modality in MODALITIES}
        self._held: dict[str, set[str]] = {modality: set() for modality in MODALITIES}

    def scan(self, samples: Iterable[Sample | Broken]) -> int:
        """Look at every pair once; how many there are, broken ones not counted."""
        total = 0
        for sample in samples:
            if isinstance(sample, Sample):
                total += 1
                if self.count:
                    self._offer(sample)
        return total

    def chosen(self) -> list[Sample]:
        """The pairs, fewer where there are not enough; those whose media cannot be opened are left out."""
        usable: dict[str, list[Sample]] = {}
        taken: set[str] = set()  # a pair that two inputs have as different modalities is of the first
        for modality, heap in self._heaps.items():
            drawn = [entry for entry in sorted(heap, reverse=True) if entry[1] not in taken]
            taken |= {content for _, content, _ in drawn}
            usable[modality] = [sample for *_, sample in drawn if _has_media(sample, self.media)]
        if self.difficulty is not None:
            usable = self.difficulty.keep(usable)
        quotas = balanced_quotas({modality: len(found) for modality, found in usable.items()}, self.count)
        return [sample for modality in MODALITIES for sample in usable[modality][: quotas[modality]]]

    def _offer(self, sample: Sample) -> None:
        content = sample.content()
        heap, held = self._heaps[sample.modality], self._held[sample.modality]
        if content in held or (self.among is not None and content not in self.among):
            return
        rank = int.from_bytes(hashlib.blake2b(f"{self.seed}:{content}".encode(), digest_size=8).digest(), "big")
        # the whole number of each: another modality may have too few
        if len(heap) < self.drawn:
            heapq.heappush(heap, (-rank, content, sample))
        elif -rank > heap[0][0]:
            held.discard(heapq.heapreplace(heap, (-rank, content, sample))[1])
        else:
            return
        held.add(content)


def read_contents(path: str, data_root: str) -> set[str]:
    """Contents of the pairs of an RL file; UserError where it is none."""
    pairs = PromptDataset(path, data_root)
    found = set()
    for index in range(len(pairs)):
        try:
            pair = pairs.read(index)
        except BadSample as error:
            raise UserError(f"rl_from={path}: record {index} is no pair of an RL file ({error})") from None
        found.add(pair_key(pair.query, pair.positive))
    pairs.close()
    return found


def balanced_quotas(there: dict[str, int], count: int) -> dict[str, int]:
    """How many of each, as equal as what is there allows, `count` in all or everything."""
    quotas = dict.fromkeys(there, 0)
    left = min(count, sum(there.values()))
    while left:
        open_ones = [name for name in there if quotas[name] < there[name]]
        for place, name in enumerate(open_ones):
            share = -(-left // (len(open_ones) - place))
            taken = min(share, there[name] - quotas[name])
            quotas[name] += taken
            left -= taken
    return quotas


def _has_media(sample: Sample, media: MediaRoot) -> bool:
    try:
        for _, side in sample.sides():
            for path in (*side.images, *(path for frames in side.videos for path in frames)):
                check_aspect_ratio(*media.image_size(path))
    except BadSample:
        return False
    return True
