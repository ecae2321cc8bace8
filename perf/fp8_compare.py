"""FP8 against bf16: losses of the same steps from the same weights, embeddings at the end, speed.

    python perf/fp8_compare.py [--model Qwen2-VL-2B|small] [--steps 200] [--seconds N] [--results DIR]

With --seconds nearly half of them bound bf16's steps, and FP8 takes as many.  Without a GPU it compares bf16 with fp32
on the small model: that shows that the comparison runs and what a coarser type does to these numbers, and says nothing
of FP8.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from provenance import new_record, save_record
from step_sft import SIZES, FixedBatches, settings
from steps import timed
from synthetic import MODELS, directory_of, random_pairs

from umer1 import device
from umer1.data.packing import pack
from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelState, init_distributed
from umer1.training.build import build_training_model
from umer1.training.config import SFTConfig
from umer1.training.forward_step import SFTStep, embed_step
from umer1.training.schedule import run_schedule
from umer1.training.sft import SFTTrainer
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch

PAIRS = 8  # a step: fewer than a training's, so that 200 steps of a 2B model end in minutes
GLOBAL_BATCHES = 8  # taken in turn
LEARNING_RATE = 1e-4
WARM_UP = 5  # steps that the speed leaves out


class BatchesInTurn(FixedBatches):
    """Global batches one after the other, again and again."""

    def __init__(self, sources: list[FixedBatches]):
        super().__init__(sources[0].batches, sources[0].device)
        self.sources, self.taken = sources, 0

    def next(self) -> list[PackedBatch]:
        self.taken += 1
        return self.sources[(self.taken - 1) % len(self.sources)].next()


class CompareTrainer(SFTTrainer):
    """The trainer's step on random data, from weights that do not depend on the precision."""

    def __init__(self, config: SFTConfig, model_name: str, state: ParallelState):
        directory = directory_of(MODELS[model_name])
        _, micro_batch, sizes = SIZES[model_name]
        micro_batch = min(micro_batch, PAIRS // 2)
        # The multiple of every recipe, so that all precisions see the same slots.
        made = [random_pairs(directory, PAIRS, seed=seed, **sizes) for seed in range(GLOBAL_BATCHES)]
        self.fixed = [
            FixedBatches([pack(pairs[i : i + micro_batch], 32) for i in range(0, PAIRS, micro_batch)], state.device)
            for pairs in made
        ]
        models = build_training_model(
            config.model, config.parallel, directory, state, weights_follow=True, fp8=config.fp8
        )
        fill_equally(models)
        watch = Watch.of(config, state, self.own_phases)
        Trainer.__init__(self, config, directory, state, watch, BatchesInTurn(self.fixed), models)

    def embeddings(self) -> torch.Tensor:
        """Of every side of the first global batch: fp32 [K * S, H] on the CPU."""
        batches = self.fixed[0].next()
        totals, *_ = self.count(batches)
        step = SFTStep(self.config.loss, totals, self.state.groups.dp, self.config.model.train_vision)
        found = dict(run_schedule(self.models, batches, partial(embed_step, step=step), forward_only=True))
        return torch.cat([found[id(batch)].flatten(0, 1) for batch in batches]).float().cpu()


@torch.no_grad()
def fill_equally(models: list[torch.nn.Module]) -> None:
    """Norms 1, biases 0, all else normal with 0.02 and rounded to bf16, drawn in fp32: equal in every precision."""
    place = device.device()
    generator = torch.Generator(place).manual_seed(0)
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=generator, device=place)
                parameter.copy_((drawn * 0.02).bfloat16())
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def train(
    model_name: str, precision: str, steps: int, until: float = float("inf")
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """(a row of the record, embeddings of the final model); no step begins after `until` of time.monotonic()."""
    config = settings(model_name, precision)
    if lacking := config.fp8.machine_violations():
        return {"not_measured": "; ".join(lacking)}, None
    optimizer = replace(config.optimizer, train_iters=steps, lr=LEARNING_RATE, lr_decay_style="constant")
    config = replace(config, optimizer=optimizer, data=replace(config.data, global_batch_size=PAIRS))
    with init_distributed(config.parallel, seed=config.run.seed) as state:
        trainer = CompareTrainer(config, model_name, state)
        records = []
        while len(records) < steps and (not records or time.monotonic() < until):
            records.append(timed(trainer.train_step))
        embeddings = trainer.embeddings()
        row = {
            "steps": len(records),
            "seconds": statistics.median(record["seconds"] for record in records[WARM_UP:] or records),
            "skipped": trainer.skipped,
            "losses": [record["loss"] for record in records],
        }
    return row, embeddings


def compare(coarse: dict[str, Any], fine: dict[str, Any], coarse_rows: torch.Tensor, fine_rows: torch.Tensor) -> dict:
    """Relative differences of losses, cosines between both models' embeddings, steps per second against the finer's."""
    differences = [abs(a - b) / abs(b) for a, b in zip(coarse["losses"], fine["losses"], strict=True)]
    cosines = torch.nn.functional.cosine_similarity(coarse_rows.double(), fine_rows.double())
    return {
        "largest_relative_difference": max(differences),
        "mean_relative_difference": statistics.fmean(differences),
        "smallest_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "speed_ratio": fine["seconds"] / coarse["seconds"],
    }


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen2-VL-2B" if device.has_cuda() else "small")
    parser.add_argument("--steps", type=int, default=200, help="at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of it, from its start on")
    parser.add_argument("--results", help="folder for the JSON record; default: perf/results")
    options = parser.parse_args()
    fine, coarse = ("bf16", "fp8") if device.has_cuda() else ("fp32", "bf16")
    about = f"{coarse} against {fine}, random weights and data, {PAIRS} pairs a step."
    if coarse != "fp8":
        about += " No FP8: this machine has no GPU."
    record = new_record("fp8_compare") | {"about": about}
    rows, embeddings, steps = {}, {}, options.steps
    for precision, until in ((fine, started + 0.45 * options.seconds), (coarse, float("inf"))):
        rows[precision], embeddings[precision] = train(options.model, precision, steps, until)
        steps = rows[precision].get("steps", steps)
        record["rows"].append({"model": options.model, "precision": precision, **rows[precision]})
        save_record(record, options.results)
    if embeddings[coarse] is not None and embeddings[fine] is not None:
        record["comparison"] = compare(rows[coarse], rows[fine], embeddings[coarse], embeddings[fine])
    path = save_record(record, options.results)
    told = record.get("comparison") or rows[coarse].get("not_measured")
    print(f"fp8_compare {options.model} {coarse} against {fine}: {told} ({path.name})", flush=True)


if __name__ == "__main__":
    main()
