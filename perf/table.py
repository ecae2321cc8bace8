"""perf/README.md and its plots, from the JSON records in perf/results alone.

    .venv/bin/python perf/table.py [--results perf/results] [--output perf]

A record with a `suite` is shown; others (perf/results/mini_*.json) belong to the README of the project.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("step_sft", "step_grpo")
TITLES = {
    "infonce": "Symmetric InfoNCE, forward and backward",
    "rank_margin": "Ranking x margin rewards, both sides",
    "gather_hidden": "Hidden-state gather with RMSNorm and L2 normalisation",
    "linear_cross_entropy": "Cross-entropy of supervised rows through the head, forward and backward",
    "topk": "The k best candidates of each query",
}
COUNTED = {
    "infonce": "Work: 4 matrix products of 2 B N D, whoever makes more or fewer (eager makes 3 and keeps the logits).",
    "rank_margin": "Work: one matrix product of 2 (P G)^2 D, which serves both sides.",
    "gather_hidden": "Work: the bytes of the rows that are read and of what comes out.",
    "linear_cross_entropy": "Work: 3 matrix products of 2 R H V, whoever makes more.",
    "topk": "Work: one matrix product of 2 Q N D.",
}
INTRODUCTION = """# Measurements

This file is made by `perf/table.py` from the records in `perf/results`; nothing in it is written by hand.

```
make perf        # the suites at sizes for a CPU, about five minutes on two idle cores; then this file
make gpu-check   # on a machine with a GPU, no network needed: builds the extension, tests, suites, steps; ten minutes
pytest perf/bench_infonce.py                       # one suite at the sizes of this machine
pytest perf/bench_*.py --sizes tiny --benchmark-disable   # each provider once, checked against fp64
```

Time: median of several calls, and the best of them (on a CPU that others use too, the better guide); on a GPU by events
with a cold L2 cache, elsewhere wall time. Memory: what a call takes at its peak above its inputs, results included; on
a GPU from the allocator, elsewhere from the process's resident memory.
Error: the largest relative error (Frobenius norm) of the results against fp64 on the same inputs. Floor: the larger of
arithmetic at the measured rate of a large matrix product, bytes at that of a large copy, and the time of an empty
call; "of floor" is floor / median. TFLOP/s and GB/s count the least work, the same for every provider.
"""
NOT_MEASURED = "not measured"


# ------------------------------------------------------------------------------------------------------------ records


def load_records(folder: Path) -> list[dict[str, Any]]:
    """The records of suites and steps, CPU first, then by machine and suite."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [record for record in found if isinstance(record, dict) and "suite" in record]
    order = [*TITLES, *STEPS]
    found = [record for record in found if record["suite"] in order]
    return sorted(
        found, key=lambda r: (r["machine"]["device"] != "CPU", r["machine"]["device"], order.index(r["suite"]))
    )


def key_of(row: dict[str, Any]) -> tuple:
    """What the rows of one block of a table have in common."""
    return tuple(row["shape"].items()), row["dtype"], row["mode"]


def blocks(record: dict[str, Any]) -> dict[tuple, list[dict[str, Any]]]:
    """Rows by size, in the record's order."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(key_of(row), []).append(row)
    return found


def size_text(key: tuple, mode: bool = True) -> str:
    shape, dtype, what = key
    words = [", ".join(f"{name} {value:,}" for name, value in shape), dtype]
    return "; ".join([*words, what] if mode else words)


# ------------------------------------------------------------------------------------------------------------ numbers


def seconds_text(seconds: float) -> str:
    """In the unit that leaves the fewest digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_three(seconds * factor)} {unit}"
    return f"{_three(seconds * 1e6)} µs"


def bytes_text(size: float | None) -> str:
    if size is None:
        return NOT_MEASURED
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= factor:
            return f"{_three(size / factor)} {unit}"
    return f"{_three(size / 1024)} KiB"


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 3)}f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.1f}%"


def median(row: dict[str, Any]) -> float:
    return row["seconds"]["median"]


# ------------------------------------------------------------------------------------------------------------- tables


def suite_section(record: dict[str, Any]) -> str:
    """Markdown of one suite on one machine."""
    suite = record["suite"]
    columns = ("provider", "time", "best", "speed", "memory", "error", "TFLOP/s", "GB/s", "of floor")
    lines = [f"### {TITLES[suite]}", "", COUNTED[suite], ""]
    missing: dict[str, set[str]] = {}
    for key, rows in blocks(record).items():
        done = [row for row in rows if "seconds" in row]
        for row in rows:
            if "not_measured" in row:
                missing.setdefault(f"{row['provider']}: {row['not_measured']}", set()).add(size_text(key))
        if not done:
            continue
        lines += [f"**{size_text(key)}** (floor {seconds_text(done[0]['floor_seconds'])})", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
        lines += [_row_text(row, done[0]) for row in done] + [""]
    everywhere = len(blocks(record))
    for reason, sizes in missing.items():
        where = "" if len(sizes) == everywhere else f" ({' / '.join(sorted(sizes))})"
        lines.append(f"- {reason}{where}")
    return "\n".join(lines).rstrip() + "\n"


def _row_text(row: dict[str, Any], first: dict[str, Any]) -> str:
    """The first provider of a suite (torch eager for most) is what the others' speed is told by."""
    name = f"**{row['provider']}**" if row["ours"] else row["provider"]
    rate = row["flops"] / median(row) / 1e12
    cells = [
        name,
        seconds_text(median(row)),
        seconds_text(row["seconds"]["best"]),
        f"{median(first) / median(row):.2f}x",
        bytes_text(row["peak_bytes"]),
        f"{row['error']:.1e}" if "error" in row else NOT_MEASURED,
        f"{rate:.3g}" if row["flops"] else "-",
        f"{row['bytes'] / median(row) / 1e9:.3g}",
        percent(row["floor_seconds"] / median(row)),
    ]
    return "| " + " | ".join(cells) + " |"


def step_section(record: dict[str, Any]) -> str:
    """Markdown of the step benchmarks of one stage on one machine."""
    title = "SFT step" if record["suite"] == "step_sft" else "GRPO step, rollouts given"
    lines = [f"### {title}", "", record["about"], ""]
    lines += ["| model | precision | pairs | tokens | step | tokens/s | pairs/s | TFLOP/s | MFU | memory |"]
    lines += ["|---|---|" + "---:|" * 8]
    for row in record["rows"]:
        if "not_measured" in row:
            lines.append(f"| {row['model']} | {row['precision']} | {row['not_measured']} |" + " |" * 7)
            continue
        cells = [row["model"], row["precision"], str(row["pairs"]), f"{row['tokens']:,.0f}"]
        cells += [seconds_text(row["seconds"]), f"{row['tokens'] / row['seconds']:,.0f}"]
        cells += [f"{row['pairs'] / row['seconds']:.3g}", f"{row['flops'] / row['seconds'] / 1e12:.3g}"]
        cells += [percent(row["mfu"]) if row["mfu"] is not None else "-", bytes_text(row["peak_bytes"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine_section(records: list[dict[str, Any]], plots: str) -> str:
    """Everything of one machine."""
    first = records[0]
    machine = first["machine"]
    lines = [f"## {machine['device']}", ""]
    lines += [_described(machine) + ".", ""]
    lines += ["Versions: " + ", ".join(f"{name} {value}" for name, value in first["versions"].items()) + ".", ""]
    for record in records:
        if record["suite"] in STEPS:
            lines += [step_section(record)]
        else:
            lines += [suite_section(record)]
            name = plot_name(record)
            lines += [f"![{TITLES[record['suite']]}: time and memory]({plots}/{name})", ""]
        changes = {True: ", files changed since", False: "", None: ", state of the files unknown"}
        changed = changes[record["uncommitted_changes"]]
        ceilings = record.get("ceilings", {})
        rates = [f"copy {ceilings['copy_bytes_per_second'] / 1e9:,.3g} GB/s"] if ceilings else []
        rates += [
            f"{name.removeprefix('matmul_').removesuffix('_flops')} product {value / 1e12:.3g} TFLOP/s"
            for name, value in sorted(ceilings.items())
            if name.startswith("matmul_")
        ]
        measured = f" Load average at the start: {record['load_average']}."
        measured += f" Ceilings measured in this run: {', '.join(rates)}." if rates else ""
        measured += "" if record["machine"] == machine else f" On another machine: {_described(record['machine'])}."
        lines += [f"`{record['command']}` at {record['commit'][:12]}{changed}, {record['date']}.{measured}", ""]
    return "\n".join(lines)


def _described(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device")


# ------------------------------------------------------------------------------------------------------------ targets


TARGET_GPUS = ("H200", "H100")  # the targets hold for one of either; ratios are never of two machines


def find(
    records: list[dict[str, Any]],
    suite: str,
    provider: Callable[[str], bool],
    mode: str = "forward + backward",
    **shape: int,
) -> dict | None:
    """The fastest measured row on a GPU of the targets, of the providers that are asked for."""
    rows = [
        row
        for record in records
        if record["suite"] == suite and any(gpu in record["machine"]["device"] for gpu in TARGET_GPUS)
        for row in record["rows"]
        if "seconds" in row and row["mode"] == mode and provider(row["provider"])
        if shape.items() <= row["shape"].items()
    ]
    return min(rows, key=median, default=None)


def ours(name: str) -> bool:
    return name.startswith("umer1")


def named(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


def _ratio(above: dict | None, below: dict | None, value: Callable[[dict], float]) -> str:
    if above is None or below is None:
        return NOT_MEASURED
    return f"{value(above) / value(below):.2f}x"


def targets_table(records: list[dict[str, Any]]) -> str:
    """The targets on one H200, or on one H100 where no H200 was measured, and what was measured there."""
    there = {gpu: [record for record in records if gpu in record["machine"]["device"]] for gpu in TARGET_GPUS}
    records = next((found for found in there.values() if found), [])

    def nce(provider: Callable[[str], bool], rows: int = 16384) -> dict | None:
        return find(records, "infonce", provider, B=rows, D=1536)

    def memory(row: dict) -> float:
        return row["peak_bytes"]

    def share(row: dict | None) -> str:
        return NOT_MEASURED if row is None else percent(row["floor_seconds"] / median(row))

    eager = named("torch eager", "torch eager, fp32 logits")
    fp32 = named("torch eager, fp32 logits", "torch.compile, fp32 logits")
    large, small = nce(ours), [rows for rows in (256, 1024) if nce(ours, rows) and nce(eager, rows)]
    reward = {"P": 256, "G": 8, "D": 1536}
    gather = {"T": 32768, "H": 3584, "N": 512}
    loss = {"R": 8192, "H": 1536, "V": 151936}
    peers = lambda name: name in ("CCE", "CCE, exact", "Liger fused linear CE") or name.startswith("megatron")  # noqa: E731
    mine = find(records, "gather_hidden", ours, "forward", **gather)
    at_limit = nce(ours, 262144)
    worst_small = min((median(nce(eager, rows)) / median(nce(ours, rows)) for rows in small), default=None)
    lines = [
        ("InfoNCE, B = N = 16,384, D = 1,536, bf16: share of the matmul ceiling, 4 products", "50%", share(large)),
        ("- against the faster of eager and compile with fp32 logits", "2x", _ratio(nce(fp32), large, median)),
        ("- against Inf-CL", "3x", _ratio(nce(named("Inf-CL")), large, median)),
        (
            "- memory against eager with fp32 logits",
            "20x",
            _ratio(nce(named("torch eager, fp32 logits")), large, memory),
        ),
        ("- B = 262,144", "runs", NOT_MEASURED if at_limit is None else f"runs, {seconds_text(median(at_limit))}"),
        (
            "- B = 256 and 1,024, against the faster eager",
            "1x",
            NOT_MEASURED if worst_small is None else f"{worst_small:.2f}x at the worse",
        ),
        (
            "Reward, 256 x 8 rollouts, D = 1,536: against eager",
            "3x",
            _ratio(
                find(records, "rank_margin", named("torch eager"), "both sides", **reward),
                find(records, "rank_margin", ours, "both sides", **reward),
                median,
            ),
        ),
        (
            "Gather with norms, 512 rows of [32,768, 3,584]: time over floor",
            "at most 1.5x",
            NOT_MEASURED if mine is None else f"{median(mine) / mine['floor_seconds']:.2f}x",
        ),
        (
            "- against norm everything, then index",
            "3x",
            _ratio(
                find(records, "gather_hidden", named("torch eager, norm everything"), "forward", **gather), mine, median
            ),
        ),
        (
            "Cross-entropy, V = 151,936, 8,192 rows: memory against eager with fp32 logits",
            "10x",
            _ratio(
                find(records, "linear_cross_entropy", named("torch eager, fp32 logits"), **loss),
                find(records, "linear_cross_entropy", named("umer1"), **loss),
                memory,
            ),
        ),
        (
            "- time against the best peer",
            "1x",
            _ratio(
                find(records, "linear_cross_entropy", peers, **loss),
                find(records, "linear_cross_entropy", named("umer1"), **loss),
                median,
            ),
        ),
    ]
    rows = [f"| {name} | {target} | {found} |" for name, target, found in lines]
    return "\n".join(["| on one H200 | target | measured |", "|---|---|---|", *rows]) + "\n"


# -------------------------------------------------------------------------------------------------------------- plots


def plot_name(record: dict[str, Any]) -> str:
    machine = "".join(letter if letter.isalnum() else "-" for letter in record["machine"]["device"].lower())
    return f"{record['suite']}_{machine}.png"


def draw(record: dict[str, Any], path: Path) -> None:
    """Time and memory of every provider at every size, a dot each on a logarithmic axis."""
    sizes = {key: [row for row in rows if "seconds" in row] for key, rows in blocks(record).items()}
    sizes = {key: rows for key, rows in sizes.items() if rows}
    figure = Figure(figsize=(11, 1.2 + sum(0.22 * len(rows) + 0.3 for rows in sizes.values())), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    ticks, labels, place = [], [], 0
    for key, rows in sizes.items():
        ticks, labels, place = [*ticks, place], [*labels, size_text(key)], place + 1
        for row in rows:
            style = {"marker": "o", "color": "tab:blue" if row["ours"] else "0.45"}
            panels[0].plot(1e3 * median(row), place, **style)
            if row["peak_bytes"]:
                panels[1].plot(row["peak_bytes"] / 2**20, place, **style)
            ticks, labels, place = [*ticks, place], [*labels, row["provider"]], place + 1
    for panel, title in zip(panels, ("median time, ms", "peak memory above the inputs, MiB"), strict=True):
        panel.set(xscale="log", title=title)
        panel.grid(alpha=0.3)
    panels[0].set_yticks(ticks, labels, fontsize=8)
    panels[0].set_ylim(place - 0.5, -0.5)
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if ";" in label.get_text() else "normal")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


# --------------------------------------------------------------------------------------------------------------- main


def readme(records: list[dict[str, Any]], plots: str = "plots") -> str:
    """The whole file."""
    parts = [INTRODUCTION, "## Targets on a GPU\n", targets_table(records)]
    if not any(record["machine"]["device"] != "CPU" for record in records):
        parts.append("No kernel has run on a GPU yet: `make gpu-check` on one fills this table.\n")
    machines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        machines.setdefault(record["machine"]["device"], []).append(record)
    parts += [machine_section(group, plots) for group in machines.values()]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "perf" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "perf", help="folder of README.md and plots/")
    options = parser.parse_args()
    records = load_records(options.results)
    for record in records:
        if record["suite"] in TITLES and any("seconds" in row for row in record["rows"]):
            draw(record, options.output / "plots" / plot_name(record))
    (options.output / "README.md").write_text(readme(records), encoding="utf-8")


if __name__ == "__main__":
    main()
