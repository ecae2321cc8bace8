"""The plan for people, and the same as JSON."""

from dataclasses import asdict
from typing import Any

from umer1.configuration import to_yaml
from umer1.models.fp8 import FP8Config
from umer1.plan.predict import Plan
from umer1.plan.settings import PlanConfig
from umer1.plan.timeline import Timeline

GIB = 2**30
_MOST_RANKS = 16  # of which each is listed with its place


def as_json(plan: Plan) -> dict[str, Any]:
    """Numbers in bytes, FLOPs and seconds; memory one entry a pipeline stage."""
    setup, layout = plan.setup, plan.setup.layout
    return {
        "settings": asdict(setup.config),
        "hardware": asdict(setup.hardware),
        "layout": {
            "world_size": layout.world_size,
            "nodes": plan.settings.num_nodes,
            "tensor_parallel": layout.tp,
            "pipeline_parallel": layout.pp,
            "virtual_stages": layout.virtual,
            "data_parallel": layout.dp,
            "ranks": [asdict(layout.place(rank, plan.settings.gpus_per_node)) for rank in range(layout.world_size)],
        },
        "parameters": {"trained": plan.trained, "frozen": plan.frozen},
        "micro_batches": len(plan.expected_tokens),
        "micro_batch_tokens": {"expected": max(plan.expected_tokens), "fullest": plan.fullest_tokens},
        "negatives_per_query": plan.negatives,
        "memory": {"expected": [_memory(line) for line in plan.expected], "fullest": list(map(_memory, plan.fullest))},
        "usable_bytes": setup.hardware.usable_bytes,
        "flops": {"model": plan.work.model, "executed": plan.work.executed},
        "tokens_per_step": plan.work.tokens,
        "patches_per_step": plan.work.patches,
        "pipeline_bubble": plan.work.bubble,
        "seconds_per_step": {"training": plan.train_seconds, "all": plan.seconds},
        "rollouts": None if plan.rollouts is None else asdict(plan.rollouts),
        "host_bytes": plan.host,
        "largest_micro_batch": plan.largest_micro_batch,
        "least_recomputation": plan.least_recomputation,
        "global_batch_multiple_of": plan.batch_step,
        "assumptions": asdict(plan.settings),
        "problems": plan.problems(),
    }


def _memory(line: Timeline) -> dict[str, Any]:
    return {"peak_bytes": line.peak, "moment": line.moment, "parts": line.parts}


def as_text(plan: Plan) -> str:
    """A few tables.  Everything in them is computed or assumed, nothing was measured."""
    parts = [_run(plan), _ranks(plan), _memory_table(plan), _speed(plan)]
    if plan.rollouts is not None:
        parts.append(_rollouts(plan))
    verdict = plan.problems()
    parts.append("\n".join(f"PROBLEM: {problem}" for problem in verdict) if verdict else "No problem was found.")
    return "\n\n".join(parts)


def settings_text(plan: Plan) -> str:
    """The resolved configuration as YAML."""
    return to_yaml(plan.setup.config)


def _rows(title: str, rows: dict[str, str]) -> str:
    return title + "\n" + "\n".join(f"  {name:24s} {value}" for name, value in rows.items())


def _run(plan: Plan) -> str:
    setup, layout, data = plan.setup, plan.setup.layout, plan.setup.config.data
    parallel = setup.parallel
    recompute = parallel.recompute_granularity or "none"
    rows = {
        "model": f"{plan.trained / 1e9:.3f}B parameters trained, {plan.frozen / 1e9:.3f}B frozen",
        "device": f"{layout.world_size} x {setup.hardware.name}, {plan.settings.num_nodes} nodes of "
        f"{plan.settings.gpus_per_node}",
        "layout": f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"
        + (f", {layout.virtual} virtual stages" if layout.virtual > 1 else "")
        + (", sequence-parallel" if parallel.sequence_parallel else ""),
        "precision": ("bf16, fp32 main weights" if setup.itemsize == 2 else "fp32") + _fp8(setup.config.fp8),
        "recomputation": recompute,
        "overlapped": parallel.overlapped,
        "global batch": f"{data.global_batch_size} pairs, {data.global_batch_size // layout.dp} a data-parallel rank; "
        f"legal are multiples of {plan.batch_step}",
        "micro-batches": f"{len(plan.expected_tokens)} a step and rank, up to {max(plan.expected_tokens):,} tokens as "
        f"assumed, {plan.fullest_tokens:,} at the fullest",
    }
    if plan.negatives is not None:
        rows["negatives per query"] = f"{plan.negatives} + hard negatives of the data, if any"
    return _rows("Run", rows)


def _fp8(fp8: FP8Config) -> str:
    if fp8.fp8_format is None:
        return ""
    return f"; the decoder's products in FP8 ({fp8.fp8_recipe}), its memory never measured, its speed counted as bf16's"


def _ranks(plan: Plan) -> str:
    layout, per_node, notes = plan.setup.layout, plan.settings.gpus_per_node, []
    if layout.world_size > per_node and per_node % layout.tp:
        notes.append(f"  tensor-parallel groups of {layout.tp} cross nodes of {per_node}: their traffic leaves NVLink")
    if layout.world_size <= _MOST_RANKS:
        places = [layout.place(rank, per_node) for rank in range(layout.world_size)]
        lines = [f"  {p.rank:4d}  {p.node:4d}  {p.tp:3d}  {p.dp:3d}  {p.pp:3d}" for p in places]
        return "\n".join(["Ranks", "  rank  node   tp   dp   pp", *lines, *notes])
    size, rows = layout.tp * layout.dp, {}
    for stage in range(layout.pp):
        first = stage * size
        nodes = sorted({layout.place(rank, per_node).node for rank in range(first, first + size)})
        rows[f"stage {stage}"] = f"ranks {first}-{first + size - 1} on nodes {_span(nodes)}"
    rows["tensor-parallel groups"] = f"{layout.tp} neighbours: {_listed(range(layout.tp))}, ..."
    peers = [layout.rank_of(dp=dp) for dp in range(layout.dp)]
    rows["data-parallel groups"] = f"{layout.dp} ranks, {layout.tp} apart: {_listed(peers)}"
    if layout.pp > 1:
        peers = [layout.rank_of(pp=stage) for stage in range(layout.pp)]
        rows["pipeline groups"] = f"{layout.pp} ranks, {size} apart: {_listed(peers)}"
    return "\n".join([_rows("Ranks", rows), *notes])


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _listed(ranks: Any) -> str:
    ranks = list(ranks)
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def _memory_table(plan: Plan) -> str:
    names = list(dict.fromkeys(name for line in (*plan.expected, *plan.fullest) for name in line.parts))
    heads = [f"stage {stage}" for stage in range(len(plan.expected))]
    columns = [f"{head}, assumed" for head in heads] + [f"{head}, fullest" for head in heads]
    lines = plan.expected + plan.fullest
    size, unit = (GIB, "GiB") if min(line.peak for line in lines) >= GIB else (2**20, "MiB")
    table = [f"Memory of a rank at the peak of a training step, {unit}"]
    table.append("  " + " " * 28 + "".join(f"{column:>19s}" for column in columns))
    for name in names:
        table.append(f"  {name:28s}" + "".join(f"{line.parts.get(name, 0) / size:19.2f}" for line in lines))
    table.append(f"  {'all':28s}" + "".join(f"{line.peak / size:19.2f}" for line in lines))
    table.append("  at the peak: " + "; ".join(dict.fromkeys(line.moment for line in lines)))
    hardware = plan.setup.hardware
    if hardware.usable_bytes is not None:
        table.append(
            f"  of {hardware.usable_bytes / GIB:.1f} GiB: {hardware.memory_bytes / GIB:.0f} GiB less "
            f"{hardware.reserve_bytes / GIB:.0f} GiB for CUDA and NCCL and {100 * hardware.fragmentation:.0f}% for "
            "what the allocator holds beyond (assumed)"
        )
        what = "responses" if plan.rollouts is not None else "pairs"
        table.append(f"  largest micro-batch that fits: {plan.largest_micro_batch} {what} of the assumed size")
        table.append(f"  least recomputation that fits with the fullest: {_recomputation(plan)}")
    if plan.host:
        parts = ", ".join(f"{size / GIB:.1f} GiB of {what}" for what, size in plan.host.items())
        table.append(f"  in host memory for each rank: {parts}")
    return "\n".join(table)


def _recomputation(plan: Plan) -> str:
    count = plan.least_recomputation
    if count is None:
        return "all layers are too few"
    flags = f"--recompute-granularity full --recompute-method block --recompute-num-layers {count}"
    return f"{count} layers of a stage ({flags})" if count else "none"


def headline(plan: Plan) -> str:
    """Line 1 of a recipe: devices, memory, time, and where the figures come from."""
    setup, engine = plan.setup, ""
    if plan.rollouts is not None and plan.rollouts.engine == "vllm":
        engine = f" ({plan.rollout_bytes / GIB:.0f} GiB while vLLM generates)"
    host = sum(plan.host.values()) / GIB
    beside = f" and {host:.0f} GiB of the host's" if host else ""
    verdict = " It does not fit." if plan.problems() else ""
    time = "" if plan.seconds is None else f", {plan.seconds:.1f} s a step"
    return (
        f"{setup.world_size} x {setup.hardware.name}: {plan.peak_bytes / GIB:.0f} GiB of each{engine}{beside}"
        f"{time}; estimated by `umer1 plan`, not measured.{verdict}"
    )


def _speed(plan: Plan) -> str:
    work, settings = plan.work, plan.settings
    rows = {
        "tokens a step": f"{work.tokens:,}, and {work.patches:,} image patches",
        "model FLOPs a step": f"{work.model:.3e} (training/flops.py: backward twice the forward, nothing recomputed)",
        "executed FLOPs": f"{work.executed:.3e} (with recomputation and the first pass of cached contrastive)",
        "pipeline bubble": f"x {work.bubble:.3f}",
    }
    if plan.seconds is None:
        rows["time"] = f"not estimated: no data sheet for {plan.setup.hardware.name}"
        return _rows("Speed", rows)
    steps = plan.setup.config.optimizer.train_iters
    rate, flops = work.tokens / plan.seconds, work.model / plan.seconds / plan.setup.world_size
    rows |= {
        "seconds a step": f"{plan.seconds:.2f}" + _phases(plan),
        "tokens/s": f"{rate:,.0f} ({rate / plan.setup.world_size:,.0f} a device)",
        "model TFLOP/s a device": f"{flops / 1e12:.0f}" + _mfu(plan, flops),
        "days": f"{plan.seconds * steps / 86400:.2f} for {steps} steps",
    }
    rate = plan.setup.hardware.bf16_flops / 1e12
    rows |= {
        "assumed rate": f"{100 * settings.assumed_utilisation:.0f}% of {rate:.0f} TFLOP/s (bf16, data sheet) for all "
        "executed products",
        "assumed sides": f"{plan.side.text} tokens of text, {plan.side.response} of response, {plan.side.patches} "
        "patches",
        "not counted": "reading data, evaluation, checkpoints, collectives that nothing hides",
    }
    return _rows("Speed (estimated, not measured)", rows)


def _mfu(plan: Plan, flops: float) -> str:
    """As in the training log: FP8's products have another peak, and not all are in FP8."""
    if plan.setup.config.fp8.fp8_format is not None:
        return ", over the whole step"
    return f", MFU {100 * flops / plan.setup.hardware.bf16_flops:.0f}% over the whole step"


def _phases(plan: Plan) -> str:
    if plan.rollouts is None:
        return ""
    if plan.rollouts.seconds is None:
        return " without the rollouts, which servers make"
    return f": {plan.rollouts.seconds:.2f} of rollouts, {plan.train_seconds:.2f} of scoring and learning"


def _rollouts(plan: Plan) -> str:
    made = plan.rollouts
    rows = {"engine": made.engine, "responses a step": f"{made.responses} of each engine"}
    if made.engine != "server":
        rows |= {
            "device memory": f"{made.device_bytes / GIB:.1f} GiB, {made.weights_bytes / GIB:.1f} GiB of them weights",
            "keys and values": f"{made.cache_tokens:,} tokens at {made.cache_bytes_per_token / 1024:.1f} KiB: "
            f"{made.full_sequences} sequences of seq_length",
            "with the trainer's states": f"{plan.rollout_bytes / GIB:.1f} GiB while responses are made",
        }
    return _rows("Rollouts", rows)


def header(settings: PlanConfig, stage: str) -> str:
    """The first line."""
    return f"umer1 plan {stage}: {settings.world_size} processes, nothing loaded, nothing measured"
