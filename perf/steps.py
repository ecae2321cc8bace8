"""What the step benchmarks of both stages share: command line, settings, timing, and the record."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from provenance import new_record, save_record
from synthetic import MODELS

from umer1 import device
from umer1.distributed.parallel import ParallelConfig
from umer1.training.build import ModelConfig
from umer1.training.flops import peak_flops


def command_line(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = "Qwen2-VL-2B" if device.has_cuda() else "small"
    parser.add_argument("--model", choices=MODELS, default=model, help="default here: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed, after two that are not")
    parser.add_argument("--results", help="folder for the JSON record; default: perf/results")
    return parser.parse_args()


def model_settings(fp32: bool) -> tuple[ModelConfig, ParallelConfig]:
    """One process, frozen ViT, whole layers recomputed, to fit any GPU."""
    parallel = ParallelConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return ModelConfig(fp32=fp32, bf16=not fp32), parallel


def timed(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A step's record, its `seconds` until the device has done all of it: a step ends with the optimizer's launches."""
    device.synchronize()
    started = time.perf_counter()
    record = step()
    device.synchronize()
    return record | {"seconds": time.perf_counter() - started}


def time_steps(step: Callable[[], dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], int | None]:
    """(records of `count` steps after two that warm up, peak bytes on the GPU: everything that is allocated)."""
    for _ in range(2):
        step()
    if device.has_cuda():
        torch.cuda.reset_peak_memory_stats()
    records = [timed(step) for _ in range(count)]
    return records, torch.cuda.max_memory_allocated() if device.has_cuda() else None


def median_of(records: list[dict[str, Any]], name: str) -> float:
    return statistics.median(record[name] for record in records)


def utilisation(flops: float, seconds: float) -> float | None:
    """Share of the data sheet's dense bf16 rate (umer1.training.flops); None for devices that it does not list."""
    peak = peak_flops(device.device_name())
    return flops / seconds / peak if peak else None


def run(suite: str, about: str, options: argparse.Namespace, precisions: tuple[str, ...], measure: Callable) -> None:
    """Measure every precision; the record is written after each."""
    record = new_record(suite) | {"about": about}
    for precision in precisions:
        gc.collect()  # a trainer holds itself in circles; the one before would count in this one's peak
        row = {"model": options.model, "precision": precision, **measure(options.model, precision, options.steps)}
        record["rows"].append(row)
        path = save_record(record, options.results)
        told = (
            row.get("not_measured") or f"{row['seconds']:.3f} s a step, {row['tokens'] / row['seconds']:,.0f} tokens/s"
        )
        print(f"{suite} {options.model} {precision}: {told} ({path.name})", flush=True)
