"""Training runs whose memory is predicted and measured: models, settings and data of different shapes, synthetic."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from memory_meter import Peak, allocations
from step_sft import FixedBatches
from synthetic import directory_of, fill_randomly, random_pairs

from umer1.data.loader import DataConfig
from umer1.data.packing import pack
from umer1.data.schema import EncodedPair, PackedBatch
from umer1.distributed.parallel import ParallelConfig, ParallelState, init_distributed
from umer1.losses.contrastive import LossConfig
from umer1.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig
from umer1.models.qwen2_vl.frames import Frames
from umer1.plan.hardware import HARDWARE
from umer1.plan.setup import Setup
from umer1.plan.sft_memory import sft_memory
from umer1.plan.timeline import Timeline
from umer1.training.batches import divided, emptied
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.config import SFTConfig
from umer1.training.optimizer import OptimizerConfig
from umer1.training.sft import SFTTrainer
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch


def shape(hidden: int, layers: int, heads: int, groups: int, ffn: int, vocabulary: int, **more: Any) -> Qwen2VLConfig:
    """A Qwen2-VL of these sizes; more: `depth` and `embed` of the ViT, `tied`."""
    half = hidden // heads // 2
    section = (half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8)
    vision = VisionConfig(
        depth=more.get("depth", 2), embed_dim=more.get("embed", 64), num_heads=4, mlp_ratio=4, hidden_size=hidden
    )
    return Qwen2VLConfig(
        vision=vision,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        vocab_size=vocabulary,
        rms_norm_eps=1e-6,
        mrope_section=section,
        tie_word_embeddings=more.get("tied", True),
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
    )


@dataclass(kw_only=True)
class Case:
    """An SFT run.  sides: sizes as perf/synthetic.py takes them, of the query and of the positive."""

    name: str
    world_size: int
    model: Qwen2VLConfig
    pairs: int
    micro_batch: int
    sides: tuple[dict[str, Any], dict[str, Any]]
    parallel: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False
    train_vision: bool = False

    def config(self) -> SFTConfig:
        return SFTConfig(
            model=ModelConfig(fp32=not self.bf16, bf16=self.bf16, train_vision=self.train_vision),
            parallel=ParallelConfig(**self.parallel),
            data=DataConfig(global_batch_size=self.pairs, micro_batch_size=self.micro_batch),
            loss=LossConfig(**self.loss),
            optimizer=OptimizerConfig(train_iters=100, lr=1e-6, lr_warmup_iters=0),
        )

    def setup(self) -> Setup:
        return Setup(model=self.model, config=self.config(), world_size=self.world_size, hardware=HARDWARE["cpu"])


def made_pairs(case: Case, dp_rank: int, count: int) -> list[EncodedPair]:
    directory = directory_of(case.model)
    query, positive = (random_pairs(directory, count, seed=dp_rank, **sizes) for sizes in case.sides)
    return [replace(one, positive=other.positive) for one, other in zip(query, positive, strict=True)]


def packed(case: Case, pairs: list[EncodedPair], state: ParallelState) -> list[PackedBatch]:
    """As BatchSource gives them: padded for sequence parallelism, pixels on the first stage, of a rank's share."""
    padding = state.tp_size if case.parallel.get("sequence_parallel") else 1
    size = case.micro_batch
    batches = [pack(pairs[start : start + size], padding) for start in range(0, len(pairs), size)]
    if not state.is_first_stage:
        for batch in batches:
            batch.pixel_values = emptied(batch.pixel_values)
    elif state.vision_data_parallel:
        for batch in batches:
            frames = Frames.of(batch.grid_thw, case.model.vision, *divided(state))
            batch.pixel_values = frames.own(batch.pixel_values)
    return batches


class PackedAnew(FixedBatches):
    """Micro-batches that are packed for each step, so that their pixels can go when the ViT has seen them."""

    def __init__(self, case: Case, pairs: list[EncodedPair], state: ParallelState):
        self.case, self.pairs, self.state = case, pairs, state

    def next(self) -> list[PackedBatch]:
        return packed(self.case, self.pairs, self.state)


class CaseTrainer(SFTTrainer):
    """The trainer's step without its program: no files, no logs, no checkpoints."""

    def __init__(self, case: Case, pairs: list[EncodedPair], state: ParallelState):
        config, directory = case.config(), directory_of(case.model)
        models = build_training_model(config.model, config.parallel, directory, state, weights_follow=True)
        fill_randomly(models)
        watch = Watch.of(config, state, self.own_phases)
        Trainer.__init__(self, config, directory, state, watch, PackedAnew(case, pairs, state), models)


def compare(case: Case, make: Callable = CaseTrainer) -> dict[str, Any]:
    """On each rank: the peak of two steps as it was predicted and as it was."""
    with init_distributed(ParallelConfig(**case.parallel), seed=1) as state:
        pairs = made_pairs(case, state.dp_rank, case.pairs // state.dp_size)
        with allocations() as peak:
            trainer = make(case, pairs, state)
            for _ in range(2):  # the first step makes the optimizer's states
                trainer.train_step()
        batches = packed(case, pairs, state)
        predicted = sft_memory(case.setup(), state.pp_rank, batches, state.dp_rank)
        return row(state, predicted, peak, batches)


def row(state: ParallelState, predicted: Timeline, peak: Peak, batches: list[PackedBatch]) -> dict[str, Any]:
    """A rank's line in the record; sizes are those of its first micro-batch."""
    batch = batches[0]
    return {
        "rank": state.rank,
        "predicted_bytes": predicted.peak,
        "measured_bytes": peak.bytes,
        "moment": predicted.moment,
        "parts": predicted.parts,
        "tokens": len(batch.input_ids),
        "patches": len(batch.pixel_values),
        "supervised": len(batch.supervised_rows),
        "micro_batches": len(batches),
    }
