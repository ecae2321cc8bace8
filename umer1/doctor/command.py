"""`umer1 doctor`: try everything that umer1 can use, each in a process of its own.

    umer1 doctor          a line for each piece: what it is used for, whether it works, how to mend it
    umer1 doctor --json   the same for scripts

Status 1 only when something that is needed does not work; what is optional may be missing.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from umer1.doctor.machine import notes
from umer1.doctor.probe import Finding, Probe, run
from umer1.doctor.probes import PROBES

_WORDS = {"ok": "ok", "missing": "not there", "unsupported": "UNSUPPORTED", "failed": "FAILED"}
_WORDS |= {"crashed": "CRASHED", "hung": "HUNG"}


def main(argv: list[str], probes: Sequence[Probe] = PROBES) -> None:
    parser = argparse.ArgumentParser(
        prog="umer1 doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args(argv)
    found: list[Finding] = []
    # Imports read many files and wait for them: a few at once.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for finding in pool.map(run, probes):
            found.append(finding)
            if not given.json:
                print(_text(finding), flush=True)
    machine = notes()
    if given.json:
        print(json.dumps({"probes": [finding.as_json() for finding in found], "machine": machine}, indent=2))
    else:
        print("\nThis machine\n" + "\n".join(f"  {line}" for line in machine))
        print("\n" + _verdict(found))
    sys.exit(1 if any(finding.is_fatal for finding in found) else 0)


def _text(finding: Finding) -> str:
    probe = finding.probe
    kind = "needed" if probe.needed else "optional"
    lines = [f"{_WORDS[finding.status]:12s}{probe.name} {finding.version}".rstrip() + f"  ({kind}: {probe.purpose})"]
    if finding.detail:
        lines.append(f"{'':12s}{finding.detail}")
    if finding.status != "ok":
        lines.append(f"{'':12s}to mend it: {probe.fix}")
    return "\n".join(lines)


def _verdict(found: list[Finding]) -> str:
    fatal = [finding.probe.name for finding in found if finding.is_fatal]
    if fatal:
        return f"Needed and not working: {', '.join(fatal)}. Nothing trains until that is mended."
    absent = [finding.probe.name for finding in found if finding.status != "ok"]
    if absent:
        return f"All that is needed works. Optional and not in use: {', '.join(absent)}."
    return "Everything works."
