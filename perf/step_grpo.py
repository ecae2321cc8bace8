"""One GRPO step with random weights on given rollouts: scoring, reference, rewards, update; tokens/s, MFU, memory.

    python perf/step_grpo.py [--model Qwen2-VL-2B|small] [--steps 4] [--results DIR]

The step is the trainer's own, with random responses in the place of an engine's: generation and the way of the weights
to the engine are left out, and tokens are those of prompts and responses that the trainer runs over.  FLOPs are the
model's: one forward to score, one for the reference, forward and backward to learn; recomputation is not counted.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from steps import command_line, median_of, model_settings, run, time_steps, utilisation
from synthetic import MODELS, directory_of, fill_randomly, random_prompts

from umer1 import device
from umer1.data.loader import DataConfig
from umer1.data.schema import PromptPair
from umer1.distributed.parallel import ParallelState, init_distributed
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.rl.config import RolloutConfig
from umer1.rl.types import Completion
from umer1.training.build import build_training_model
from umer1.training.flops import forward_flops
from umer1.training.grpo import GRPOTrainer
from umer1.training.optimizer import OptimizerConfig
from umer1.training.policy_balance import RolloutBalance
from umer1.training.policy_batches import Round, SpecialIds
from umer1.training.policy_config import GRPOConfig
from umer1.training.reference import Reference
from umer1.training.scoring import Scorer
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch

# Pairs, responses of each prompt, responses a micro-batch, tokens of a response, and the prompts' sizes.
SIZES = {
    "Qwen2-VL-2B": (4, 8, 8, 512, {"text": 128, "grid": (32, 32)}),
    "small": (2, 2, 4, 12, {"text": 16, "grid": (4, 4)}),
}
ABOUT = (
    "One process. Both sides of each pair have 8 given responses of 512 tokens to a prompt of 256 picture and 128 text "
    "tokens for the 2B shape; scoring, the reference's log-probs, rewards and one update, without generation. Tokens "
    "are those of prompts and responses."
)


class FixedPrompts:
    """The same pairs every step."""

    is_source = True

    def __init__(self, pairs: list[PromptPair]):
        self.pairs = pairs

    def next(self) -> list[PromptPair]:
        return self.pairs

    def take_drawn(self) -> list:
        """No samples of a file to name."""
        return []

    def state_dict(self) -> None:
        return None


class StepTrainer(GRPOTrainer):
    """The trainer's step without its program: no engine, no files, no logs, no checkpoints."""

    def __init__(self, config: GRPOConfig, model: Qwen2VLConfig, prompts: list[PromptPair], state: ParallelState):
        directory = directory_of(model)
        models = build_training_model(config.model, config.parallel, directory, state, weights_follow=True)
        fill_randomly(models)
        watch = Watch.of(config, state, self.own_phases)
        Trainer.__init__(self, config, directory, state, watch, FixedPrompts(prompts), models)
        special = directory.special
        ids = SpecialIds(special.im_end, special.gen_emb, (special.image_pad, special.video_pad))
        self.scorer = Scorer(config, ids, directory.tokenizer, state)
        self.balance = RolloutBalance(config, directory.config, state)
        self.reference = Reference(self.models)
        self.heldout, self.seconds = None, {}
        length = config.rollout.max_completion_length
        self.completions = random_responses(len(prompts) * 2 * self.group, length, model, ids, config.run.seed)

    def engine_at_work(self):
        return nullcontext()

    def rollout(self, pairs: list[PromptPair], number: int) -> list[Completion]:
        return self.completions

    def check_parity(self, record: dict[str, Any]) -> None:
        """Nothing to compare: no engine gave these log-probs."""


def random_responses(count: int, length: int, config: Qwen2VLConfig, ids: SpecialIds, seed: int) -> list[Completion]:
    """Responses of between half of `length` and `length` tokens that end in <gen_emb> and <|im_end|>."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = draw.integers(1, config.vocab_size // 2, int(draw.integers(length // 2, length + 1)) - 2).tolist()
        tokens = [*words, ids.gen_emb, ids.im_end]
        logprobs = np.full(len(tokens), -np.log(config.vocab_size), dtype=np.float32)
        found.append(Completion(tokens, logprobs, "stop"))
    return found


def settings(model_name: str, fp32: bool) -> GRPOConfig:
    pairs, group, micro_batch, length, _ = SIZES[model_name]
    model, parallel = model_settings(fp32)
    return GRPOConfig(
        model=model,
        parallel=parallel,
        data=DataConfig(global_batch_size=pairs, micro_batch_size=micro_batch),
        rollout=RolloutConfig(num_generations=group, max_completion_length=length, log_rollouts=0),
        optimizer=OptimizerConfig(train_iters=1000, lr=1e-6, lr_warmup_iters=0, lr_decay_style="linear"),
    )


def work_of(trainer: StepTrainer) -> tuple[int, float]:
    """(tokens that one pass runs over, model FLOPs of a step)."""
    round_ = Round(trainer.source.pairs, trainer.completions, trainer.group)
    tokens, passes, vision = 0, 0.0, 0.0
    seen: set[int] = set()
    for part in trainer.scorer.parts(round_):
        for batch in part:
            grids = [round_.prompt(number * trainer.group).sequence.grid_thw for number in batch.vision_prompts]
            as_sft = SimpleNamespace(
                input_ids=batch.input_ids,
                cu_seqlens=batch.cu_seqlens,
                grid_thw=torch.cat(grids),
                supervised_rows=batch.rows,
            )
            decoder, vit, logits = forward_flops(as_sft, trainer.directory.config)
            tokens += len(batch.input_ids)
            passes += decoder + logits
            # The frozen ViT runs once a prompt; prompts of a step are of one size.
            new = set(batch.vision_prompts) - seen
            vision += vit * len(new) / len(batch.vision_prompts)
            seen |= new
    return tokens, 5 * passes + vision


def measure(model_name: str, precision: str, steps: int) -> dict[str, Any]:
    """A row of the record."""
    config = settings(model_name, fp32=precision == "fp32")
    with init_distributed(config.parallel, seed=config.run.seed) as state:
        model, (pairs, *_, sizes) = MODELS[model_name], SIZES[model_name]
        prompts = random_prompts(directory_of(model), pairs, seed=config.run.seed, **sizes)
        trainer = StepTrainer(config, model, prompts, state)
        tokens, flops = work_of(trainer)
        records, peak = time_steps(trainer.train_step, steps)
        seconds = median_of(records, "seconds")
        return {
            "pairs": config.data.global_batch_size,
            "tokens": tokens,
            "seconds": seconds,
            "phases": {name: median_of(records, f"seconds_{name}") for name in ("score", "update")},
            "flops": flops,
            "mfu": utilisation(flops, seconds),
            "peak_bytes": peak,
            "skipped": trainer.skipped,
        }


def main() -> None:
    precision = "bf16" if device.has_cuda() else "fp32"
    run("step_grpo", ABOUT, command_line(__doc__), (precision,), measure)


if __name__ == "__main__":
    main()
