"""Which candidates become negatives, against a plain search in fp64: ties, duplicates, margins."""

import math
import random

import numpy as np
from data_tools import record, write_records

from umer1.data.dataset import PairDataset
from umer1.mining.config import MineConfig
from umer1.mining.corpus import Corpus, Sides, read_corpus
from umer1.mining.select import Mined, select
from umer1.mining.write import write_mined


def draw(rng: np.random.Generator, across: bool):
    """A corpus whose sides repeat, few data sets, and vectors of few directions, so that scores tie."""
    count, groups = int(rng.integers(2, 40)), 1 if across else int(rng.integers(1, 4))
    queries, candidates = Sides(), Sides()
    rows = []
    for pair in range(count):
        group = int(rng.integers(groups))
        places = []
        for sides, kinds in ((queries, 12), (candidates, 15)):
            content = int(rng.integers(kinds))
            known = list(zip(sides.groups, sides.contents, strict=True))
            if (group, content) not in known:
                sides.groups.append(group)
                sides.contents.append(content)
                sides.pairs.append(pair)
                known.append((group, content))
            places.append(known.index((group, content)))
        rows.append((pair, *places))
    columns = np.array(rows).T
    table = rng.standard_normal((6, 4))

    def vectors(size: int) -> np.ndarray:
        rough = table[rng.integers(6, size=size)]
        found = (rough / np.linalg.norm(rough, axis=1, keepdims=True)).astype(np.float32)
        found[rng.random(size) < 0.05] = np.nan
        return found

    corpus = Corpus(queries, candidates, *columns, {})
    return corpus, vectors(len(queries.pairs)), vectors(len(candidates.pairs))


def plain(corpus: Corpus, queries, candidates, config: MineConfig, row: int) -> list[int]:
    """The negatives of one pair, looked for one by one."""
    query, own = corpus.query_of[row], corpus.positive_of[row]
    groups = corpus.candidates.groups
    positive = float(np.float32(queries[query].astype(np.float64) @ candidates[own].astype(np.float64)))
    if not np.isfinite(positive):
        return []
    right = {p for q, p in zip(corpus.query_of.tolist(), corpus.positive_of.tolist(), strict=True) if q == query}
    scores = candidates.astype(np.float64) @ queries[query].astype(np.float64)
    pool = [p for p in range(len(groups)) if groups[p] == groups[own] and p not in right and np.isfinite(scores[p])]
    pool.sort(key=lambda p: (-np.float32(scores[p]), p))
    bound = math.inf
    if config.relative_margin is not None:
        bound = positive - config.relative_margin * abs(positive)
    if config.absolute_margin is not None:
        bound = min(bound, positive - config.absolute_margin)
    allowed = [p for p in pool[: config.top_k] if float(np.float32(scores[p])) <= bound]
    return allowed[config.skip_top :][: config.num_negatives]


def test_five_hundred_random_corpora(monkeypatch):
    """Whatever of the lists is held at once: one query with ten thousand right answers made all lists that long."""
    for _ in range(500):
        seed = random.randrange(2**32)
        rng = np.random.default_rng(seed)
        monkeypatch.setattr("umer1.mining.select._LISTS_BYTES", int(rng.choice([1, 300, 1 << 30])))
        corpus, queries, candidates = draw(rng, across=bool(rng.integers(2)))
        config = MineConfig(
            num_negatives=int(rng.integers(1, 6)),
            top_k=int(rng.integers(3, 12)),
            skip_top=int(rng.integers(0, 3)),
            relative_margin=[None, 0.0, 0.05, 0.5][rng.integers(4)],
            absolute_margin=[None, None, 0.0, 0.3][rng.integers(4)],
        )
        mined = select(corpus, queries, candidates, config)
        for row in range(len(corpus.pairs)):
            want = plain(corpus, queries, candidates, config, row)
            got = [place for place in mined.negatives[row].tolist() if place >= 0]
            assert got == want, f"seed {seed}, pair {row}: {got}, not {want}"
            assert np.isfinite(mined.scores[row]).sum() == len(want), f"seed {seed}, pair {row}"


def test_responses_cost_something_in_gen_alone(tmp_path):
    """Batches are planned by what is read: with responses counted, those of disc mode were several times too small."""
    dataset = PairDataset(write_records(tmp_path / "pairs.json", [record(7)]), None)
    for mode in ("disc", "gen"):
        corpus = read_corpus(dataset, mode, across_data_sets=False)
        for sides, name in ((corpus.queries, "qry"), (corpus.candidates, "pos")):
            human, gpt = (turn["value"] for turn in record(7)[name]["conversations"])
            assert [item.text for item in sides.inputs] == [human + gpt if mode == "gen" else human]


def test_media_names_that_are_no_unicode_are_read_back(tmp_path):
    """Half a surrogate pair went into the file as bytes, and no JSON list with such bytes can be read."""
    records = [record(0), record(1)]
    records[1]["pos"]["image"] = "caf\udce9.png"
    for lines in (False, True):
        dataset = PairDataset(write_records(tmp_path / "pairs.json", records, lines=lines), None)
        corpus = read_corpus(dataset, "disc", across_data_sets=False)
        scores = np.zeros(2, dtype=np.float32)
        mined = Mined(np.array([[1], [0]]), scores[:, None], scores, np.zeros(2), np.zeros(2))
        config = MineConfig(input=str(dataset.path), output=str(tmp_path / "mined.json"))
        write_mined(config, dataset, corpus, mined, {})
        negatives = [pair.negatives[0].images for pair in map(PairDataset(config.output, None).read, range(2))]
        assert negatives == [("caf\udce9.png",), ()]
