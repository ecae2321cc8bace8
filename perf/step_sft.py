"""One optimizer step of cold-start SFT with random weights and data made on the fly: tokens/s, pairs/s, MFU, memory.

    python perf/step_sft.py [--model Qwen2-VL-2B|small] [--steps 4] [--results DIR]

The step is the trainer's own (cached contrastive over the micro-batches, both InfoNCE losses, cross-entropy, AdamW);
only reading of data is left out.  FLOPs are the model's, by umer1/training/flops.py: the first pass of cached
contrastive and the recomputation of layers take time and are not counted.
"""

from dataclasses import replace
from typing import Any

import torch
from steps import command_line, median_of, model_settings, run, time_steps, utilisation
from synthetic import MODELS, directory_of, fill_randomly, random_pairs

from umer1 import device
from umer1.data.loader import DataConfig
from umer1.data.packing import pack
from umer1.data.schema import PackedBatch
from umer1.distributed.parallel import ParallelState, init_distributed
from umer1.models.fp8 import FP8Config
from umer1.plan.hardware import HARDWARE
from umer1.plan.setup import Setup
from umer1.plan.sft_memory import sft_memory
from umer1.training.build import build_training_model
from umer1.training.config import SFTConfig
from umer1.training.optimizer import OptimizerConfig
from umer1.training.sft import SFTTrainer
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch

# Pairs a step and a micro-batch, and the sides' sizes: 256 picture tokens, 128 of text, 256 of reasoning.
SIZES = {
    "Qwen2-VL-2B": (64, 8, {"text": 128, "response": 256, "grid": (32, 32)}),
    "small": (4, 2, {"text": 16, "response": 24, "grid": (4, 4)}),
}
ABOUT = (
    "One process. Each side has a picture, a prompt and a response: 256 + 128 + 256 tokens for the 2B shape, micro-"
    "batches of 8 pairs, frozen ViT, every layer recomputed, random weights."
)


class FixedBatches:
    """The same micro-batches every step; the frozen ViT's features are made anew, as they would be."""

    is_source = True

    def __init__(self, batches: list[PackedBatch], device: torch.device):
        self.batches, self.device = batches, device

    def next(self) -> list[PackedBatch]:
        return [replace(batch, vision_features=None).to(self.device) for batch in self.batches]

    def take_drawn(self) -> list:
        """No samples of a file to name."""
        return []


class StepTrainer(SFTTrainer):
    """The trainer's step without its program: no files, no logs, no checkpoints."""

    def __init__(self, config: SFTConfig, model_name: str, state: ParallelState):
        directory = directory_of(MODELS[model_name])
        pairs, micro_batch, sizes = SIZES[model_name]
        made = random_pairs(directory, pairs, seed=config.run.seed, **sizes)
        multiple = config.fp8.token_multiple(1)
        batches = [pack(made[start : start + micro_batch], multiple) for start in range(0, pairs, micro_batch)]
        models = build_training_model(
            config.model, config.parallel, directory, state, weights_follow=True, fp8=config.fp8
        )
        fill_randomly(models)
        source = FixedBatches(batches, state.device)
        watch = Watch.of(config, state, self.own_phases)
        Trainer.__init__(self, config, directory, state, watch, source, models)


def settings(model_name: str, precision: str) -> SFTConfig:
    pairs, micro_batch, _ = SIZES[model_name]
    model, parallel = model_settings(precision == "fp32")
    return SFTConfig(
        model=model,
        fp8=FP8Config(fp8_format="hybrid" if precision == "fp8" else None),
        parallel=parallel,
        data=DataConfig(global_batch_size=pairs, micro_batch_size=micro_batch),
        optimizer=OptimizerConfig(train_iters=1000, lr=1e-6, lr_warmup_iters=0),
    )


def planned_bytes(model_name: str, config: SFTConfig, batches: list[PackedBatch]) -> int:
    """What `umer1 plan` says of the peak, to be held against `peak_bytes`; fp8's own copies are not in it."""
    hardware = HARDWARE["h100" if device.has_cuda() else "cpu"]  # which GPU does not matter to what tensors take
    setup = Setup(model=MODELS[model_name], config=config, world_size=1, hardware=hardware)
    return sft_memory(setup, 0, batches).peak


def measure(model_name: str, precision: str, steps: int) -> dict[str, Any]:
    """A row of the record."""
    config = settings(model_name, precision)
    if lacking := config.fp8.machine_violations():
        return {"not_measured": "; ".join(lacking)}
    with init_distributed(config.parallel, seed=config.run.seed) as state:
        trainer = StepTrainer(config, model_name, state)
        records, peak = time_steps(trainer.train_step, steps)
        seconds, flops = median_of(records, "seconds"), median_of(records, "flops")
        return {
            "pairs": config.data.global_batch_size,
            "tokens": median_of(records, "tokens"),
            "seconds": seconds,
            "flops": flops,
            "mfu": utilisation(flops, seconds),
            "peak_bytes": peak,
            "planned_bytes": planned_bytes(model_name, config, trainer.source.batches),
            "loss": records[-1]["loss"],
            "skipped": trainer.skipped,
        }


def main() -> None:
    precisions = ("bf16", "fp8") if device.has_cuda() else ("fp32",)
    run("step_sft", ABOUT, command_line(__doc__), precisions, measure)


if __name__ == "__main__":
    main()
