"""Pair files in the published layouts, on disk, and the command line that annotates them."""

import json
from pathlib import Path

import yaml
from data_tools import tiny_directory, write_picture, write_records


def write_world(root: Path, *, mmeb: int = 4, hound: int = 2, pages: int = 2) -> list[dict]:
    """Pair files and media below `root`; the inputs as `--inputs` takes them."""
    for number in range(8):
        write_picture(root, f"images/Toy/{number}.png", seed=number)
    for number in range(max(1, hound)):
        for frame in range(11):
            write_picture(root, f"frames/v{number}/c_{frame}.png", 28, 28, seed=frame)
    rows = [
        {
            "qry": f"<|image_1|>\nmmeb query {i}",
            "qry_image_path": f"Toy/{i % 8}.png",
            "pos_text": f"mmeb target {i}",
            "pos_image_path": "",
        }
        for i in range(mmeb)
    ]
    write_records(root / "mmeb.jsonl", rows, lines=True)
    rows = [
        {
            "id": i,
            "video": f"v{i}",
            "conversations": [
                {"from": "human", "value": f"<video>\nhound question {i}"},
                {"from": "gpt", "value": f"hound answer {i}"},
            ],
        }
        for i in range(hound)
    ]
    write_records(root / "hound.json", rows)
    rows = [
        {"query": f"page query {i}", "image": f"images/Toy/{i % 8}.png", "answer": f"page {i}"} for i in range(pages)
    ]
    write_records(root / "pages.jsonl", rows, lines=True)
    return [
        {"layout": "mmeb", "path": str(root / "mmeb.jsonl"), "dataset": "toy", "media_folder": "images"},
        {"layout": "llavahound-caption", "path": str(root / "hound.json"), "media_folder": "frames"},
        {"layout": "vidore", "path": str(root / "pages.jsonl"), "dataset": "pages"},
    ]


def flags(root: Path, inputs: list[dict], url: str, *more: str) -> list[str]:
    """The command line, less its name; quick retries."""
    return [
        *("--inputs", yaml.safe_dump(inputs, default_flow_style=True, width=10**6)),
        *("--data-root", str(root), "--output", str(root / "out"), "--tokenizer", str(tiny_directory())),
        *("--endpoint", url, "--teacher-model", "toy", "--backoff-seconds", "0.02", "--max-backoff-seconds", "0.2"),
        *("--request-timeout-seconds", "10", "--concurrency", "4", "--strip-box-markers", *more),
    ]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dataset(root: Path) -> tuple[list[dict], list[dict], dict]:
    """SFT records of all shards, filtered records, manifest."""
    folder = root / "out" / "dataset"
    sft = [record for path in sorted(folder.glob("sft-*.jsonl")) for record in read_lines(path)]
    return sft, read_lines(folder / "filtered.jsonl"), json.loads((folder / "manifest.json").read_text())
