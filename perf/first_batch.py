"""How long a large SFT file takes to its first batch, and how much memory: 1.5M pairs in one JSON list by default.

    .venv/bin/python perf/first_batch.py --folder /tmp/first_batch [--records 1500000] [--keep]

Writes the file (text pairs of 25 data sets, about 2.5 KB a record; 3.7 GB), then measures in a fresh process: imports,
index, block order, 1,024 pairs read and tokenised in that one process.  Writes perf/results/first_batch_cpu.json; the
file of pairs is deleted.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from provenance import new_record, save_record

from umer1.data.prompts import assistant_text, user_text

BASE = Path(__file__).resolve().parents[1] / "umer1/assets/mini_base"
NUM_SETS, PAIRS_A_BATCH, POOL = 25, 1024, 2000


def write_pairs(path: Path, records: int) -> None:
    """A JSON list of pairs whose sides are drawn from a pool of texts; data sets stand one after another."""
    draw = random.Random(0)
    words = [f"w{number:05d}" for number in range(5000)]

    def side() -> dict:
        human = user_text(" ".join(draw.choices(words, k=12)))
        answer = assistant_text(" ".join(draw.choices(words, k=100)), " ".join(draw.choices(words, k=5)))
        return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]}

    sides = [json.dumps(side()) for _ in range(POOL)]
    with open(path, "w", buffering=1 << 22) as file:
        file.write("[\n")
        for number in range(records):
            name, (query, positive) = f"set{number * NUM_SETS // records:02d}", draw.choices(sides, k=2)
            end = ",\n" if number < records - 1 else "\n]\n"
            file.write(f'{{"dataset_name": "{name}", "qry": {query}, "pos": {positive}}}{end}')


def measure(path: str) -> dict:
    """Seconds since this process began to import umer1's data path, and its peak resident memory."""
    start = time.perf_counter()
    from umer1.data.dataset import PairDataset
    from umer1.data.sampler import BlockSampler
    from umer1.inference.engine import EngineConfig, make_processor, open_directory

    config = EngineConfig(model=str(BASE))
    processor = make_processor(config, open_directory(config))
    ready = time.perf_counter()
    dataset = PairDataset(path, None, processor)
    indexed = time.perf_counter()
    pairs = [dataset[int(index)] for index in BlockSampler(dataset.name_ids, dataset.names, PAIRS_A_BATCH).batch(0)]
    return {
        "import_s": ready - start,
        "index_s": indexed - ready,
        "first_batch_s": time.perf_counter() - start,
        "tokens": sum(len(pair.query) + len(pair.positive) for pair in pairs),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the file is written; needs 2.5 KB a record")
    parser.add_argument("--records", type=int, default=1_500_000)
    parser.add_argument("--keep", action="store_true", help="leave the file there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"pairs-{options.records}.json"
    write_pairs(path, options.records)
    size = path.stat().st_size
    command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", str(path)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if not options.keep:
        path.unlink()
    found = {"records": options.records, "bytes": size, **found}
    print(json.dumps(found))
    save_record({**new_record("first_batch"), "measured": found})


if __name__ == "__main__":
    main()
