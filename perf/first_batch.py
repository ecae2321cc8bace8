"""How long a large SFT file takes to its first batch, and how much memory: 1.5M pairs as a JSON list and as JSONL.

    .venv/bin/python perf/first_batch.py --folder /tmp/first_batch [--records 1500000]

Writes each file (text pairs of 25 data sets, about 2.5 KB a record; 3.7 GB), drops it from the page cache, and measures
twice in fresh processes: imports, index, block order, 1,024 pairs read and tokenised in that one process; first without
an index, then with the one that the first process kept.  Writes perf/results/first_batch_cpu.json; files of pairs and
their indexes are deleted.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from provenance import new_record, save_record

from umer1.data.index_cache import index_path
from umer1.data.mini_mmeb import MINI_BASE
from umer1.data.prompts import assistant_text, user_text

NUM_SETS, PAIRS_A_BATCH, POOL = 25, 1024, 2000
FORMS = {"json": ("[\n", ",\n", "\n]\n"), "jsonl": ("", "\n", "\n")}  # ending -> start, between two records, end


def write_pairs(path: Path, records: int) -> None:
    """Pairs whose sides are drawn from a pool of texts; data sets stand one after another.  The ending is the form."""
    draw = random.Random(0)
    words = [f"w{number:05d}" for number in range(5000)]

    def side() -> dict:
        human = user_text(" ".join(draw.choices(words, k=12)))
        answer = assistant_text(" ".join(draw.choices(words, k=100)), " ".join(draw.choices(words, k=5)))
        return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]}

    sides = [json.dumps(side()) for _ in range(POOL)]
    start, between, end = FORMS[path.suffix[1:]]
    with open(path, "w", buffering=1 << 22) as file:
        file.write(start)
        for number in range(records):
            name, (query, positive) = f"set{number * NUM_SETS // records:02d}", draw.choices(sides, k=2)
            behind = between if number < records - 1 else end
            file.write(f'{{"dataset_name": "{name}", "qry": {query}, "pos": {positive}}}{behind}')


def measure(path: str) -> dict:
    """Seconds since this process began to import umer1's data path, by the clock and of a core, and its peak memory."""
    start, start_cpu = time.perf_counter(), time.process_time()
    from umer1.data.dataset import PairDataset
    from umer1.data.sampler import BlockSampler
    from umer1.inference.engine import EngineConfig, make_processor, open_directory

    config = EngineConfig(model=str(MINI_BASE))
    processor = make_processor(config, open_directory(config))
    ready = time.perf_counter()
    dataset = PairDataset(path, None, processor)
    indexed = time.perf_counter()
    pairs = [dataset[int(index)] for index in BlockSampler(dataset.name_ids, dataset.names, PAIRS_A_BATCH).batch(0)]
    return {
        "import_s": ready - start,
        "index_s": indexed - ready,
        "first_batch_s": time.perf_counter() - start,
        "first_batch_cpu_s": time.process_time() - start_cpu,
        "tokens": sum(len(pair.query) + len(pair.positive) for pair in pairs),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def drop_from_cache(path: Path) -> None:
    """Have the next reader read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_afresh(path: Path) -> dict:
    """`measure` in a process of its own, the file not in memory."""
    drop_from_cache(path)
    command = [sys.executable, __file__, "--folder", str(path.parent), "--measure", str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where files are written; needs 2.5 KB a record")
    parser.add_argument("--records", type=int, default=1_500_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found = []
    for form in FORMS:
        path = options.folder / f"pairs-{options.records}.{form}"
        try:
            write_pairs(path, options.records)
            about = {"form": form, "records": options.records, "bytes": path.stat().st_size}
            for kept in (False, True):
                found.append({**about, "index_kept": kept, **measure_afresh(path)})
                print(json.dumps(found[-1]), flush=True)
        finally:
            for left in (path, index_path(path)):
                left.unlink(missing_ok=True)
    save_record({**new_record("first_batch"), "measured": found})


if __name__ == "__main__":
    main()
