"""`umer1 ckpt`: list, verify, prune and export the checkpoints of a training run.

    umer1 ckpt list runs/sft                       what is there, and what a resumed run would go on from
    umer1 ckpt verify runs/sft                     read every byte; status 1 when a checkpoint is damaged
    umer1 ckpt prune runs/sft --keep-latest-checkpoints 2 --keep-every 1000 --dry-run
    umer1 ckpt export runs/sft --to-hf exported    the newest valid one for transformers, vLLM and sharing

PATH is a --save directory or one iter_* directory of it.  Nothing here needs a GPU or the ranks of the run.
"""

import argparse
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from umer1.atomic_directory import remove
from umer1.checkpoints import layout
from umer1.checkpoints.administration import Entry, entry, verify
from umer1.errors import UserError
from umer1.progress import Progress


def main(argv: list[str]) -> None:
    """Parse and run one of the four; exits with status 1 when `verify` finds damage."""
    given = _parse(argv)
    if given.action == "export":
        from umer1.conversion import main as convert  # torch and megatron, which the others do without

        convert(["--from-checkpoint", str(given.path), "--to-hf", given.to_hf])
        return
    try:
        _look_at(given)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _look_at(given: argparse.Namespace) -> None:
    paths = layout.newest_first(given.path)
    if not paths:
        raise UserError(f"{given.path} is no checkpoint and holds none (an iter_* directory with {layout.MANIFEST})")
    if given.action == "list":
        _list(given.path, paths, given.json)
    elif given.action == "verify":
        sys.exit(_verify(paths, given.json))
    else:
        _prune(given.path, paths, given.keep_latest_checkpoints, given.keep_every, dry_run=given.dry_run)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="umer1 ckpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True)
    texts = {
        "list": "what is there; files are looked at, not read",
        "verify": "check every byte against the manifest",
        "prune": "remove all but the latest and every n-th",
        "export": "write the newest valid one as a Hugging Face directory (umer1 convert has more settings)",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument("path", type=Path, metavar="PATH", help="a --save directory or one iter_* in it")
        if name in ("list", "verify"):
            action.add_argument("--json", action="store_true", help="one JSON list on standard output")
        if name == "prune":
            action.add_argument(
                "--keep-latest-checkpoints", type=int, required=True, metavar="N", help="how many whole ones stay"
            )
            action.add_argument(
                "--keep-every", type=int, default=0, metavar="N", help="multiples of N stay, too (0: none)"
            )
            action.add_argument("--dry-run", action="store_true", help="say what would be removed")
        if name == "export":
            action.add_argument("--to-hf", required=True, metavar="DIR", help="directory to write")
    return parser.parse_args(argv)


def _list(place: Path, paths: list[Path], as_json: bool) -> None:
    entries = [found for found in map(entry, paths) if not _is_gone(found.path, found.problem)]
    if as_json:
        print(json.dumps([found.summary() for found in entries], indent=2))
        return
    for found in entries:
        print(f"{found.path.name:16s} {_size(found.bytes):>10s}  {_words(found)}")
    whole = [found.path.name for found in entries if found.problem is None]
    print(f"{_size(sum(found.bytes for found in entries))} in {len(entries)}; {_size(_free(place))} free on the disk")
    if whole:
        print(f"A resumed run goes on from {whole[0]} if its contents are whole: umer1 ckpt verify {place}")
    else:
        print("None can be resumed from.")


def _words(found: Entry) -> str:
    if found.problem:
        return f"DAMAGED: {found.problem}"
    manifest = found.manifest
    held = "weights and optimizer" if manifest.get("optimizer") else "weights alone"
    ranks = manifest.get("layout", {})
    made = ", ".join(f"{name.upper()} {ranks[name]}" for name in ("tp", "pp", "dp") if ranks.get(name, 1) > 1)
    return f"{held}, {manifest.get('dtype')}, written by {made or 'one rank'}"


def _verify(paths: list[Path], as_json: bool) -> int:
    found = []
    for path in paths:
        progress = Progress(f"umer1 ckpt verify {path.name}", entry(path).bytes, unit="bytes", enabled=not as_json)
        problem = verify(path, progress.add)
        if _is_gone(path, problem):
            continue
        found.append({"checkpoint": str(path), "problem": problem})
        if not as_json:
            print(f"{path.name:16s} {'whole' if problem is None else 'DAMAGED: ' + problem}")
    if as_json:
        print(json.dumps(found, indent=2))
    return 1 if any(one["problem"] for one in found) else 0


def _is_gone(path: Path, problem: str | None) -> bool:
    """Not damaged: a run that goes on has removed it meanwhile, having saved a newer one."""
    return problem is not None and not path.exists()


def _prune(place: Path, paths: list[Path], keep_latest: int, keep_every: int, *, dry_run: bool) -> None:
    problems = []
    if keep_latest < 1:
        problems.append(f"--keep-latest-checkpoints {keep_latest} must be 1 or above")
    if keep_every < 0:
        problems.append(f"--keep-every {keep_every} must be 0 (none) or above")
    if paths == [place]:
        problems.append(f"{place} is one checkpoint; give the --save directory that holds it")
    if problems:
        raise UserError("; ".join(problems))
    removed = layout.removable(layout.sound_iterations(place), keep_latest, keep_every)
    # Those that are to stay are read first: what passes by its sizes may still be damaged, and then an older one is
    # the last that can be resumed from.
    for path in paths:
        if entry(path).problem is None and int(path.name.removeprefix("iter_")) not in removed:
            problem = verify(path)
            if problem and not _is_gone(path, problem):
                raise UserError(
                    f"nothing was removed: {path} is to stay and is damaged ({problem}); move it away first"
                )
    freed = 0
    for iteration in removed:
        path = layout.iteration_path(place, iteration)
        freed += entry(path).bytes
        print(f"{'would remove' if dry_run else 'removing'} {path.name}", flush=True)
        if not dry_run:
            with suppress(FileNotFoundError):  # a run that goes on was faster
                remove(path)
    print(f"{_size(freed)} {'would be ' if dry_run else ''}freed, {len(paths) - len(removed)} checkpoints stay")


def _size(count: int) -> str:
    for unit, factor in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << factor:
            return f"{count / (1 << factor):.1f} {unit}"
    return f"{count} bytes"


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free
