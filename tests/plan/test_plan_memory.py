"""The predicted peak against what torch's allocator handed out, on shapes that nobody tuned the formulas on."""

import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import umer1.megatron_import  # noqa: F401

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
from plan_cases import Case, compare, made_pairs, shape
from plan_policy_case import PolicyCase, compare_policy

from umer1.data.loader import DataConfig
from umer1.data.packing import pack
from umer1.distributed.parallel import ParallelConfig
from umer1.plan.hardware import HARDWARE
from umer1.plan.schedule import one_f_one_b
from umer1.plan.settings import PlanConfig
from umer1.plan.setup import Setup, batch_bytes, num_patches
from umer1.plan.steps import Steps, packed_of
from umer1.plan.timeline import Timeline
from umer1.plan.workload import Side, imagine
from umer1.training.build import ModelConfig
from umer1.training.config import SFTConfig
from umer1.training.flops import step_flops
from umer1.training.policy_config import GRPOConfig

SEED = random.randrange(2**32)

BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
RECOMPUTE = ({}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"}, BLOCK)


def drawn_case(seed: int) -> Case:
    """One process; sizes large enough that tables of a few KB do not count."""
    draw = random.Random(seed)
    hidden = draw.choice((128, 192, 256))
    sides = tuple(
        {"text": draw.randrange(40, 300), "response": draw.randrange(8, 200), "grid": (16, draw.choice((8, 12, 16)))}
        for _ in range(2)
    )
    model = shape(hidden, draw.randrange(2, 7), 4, 2, hidden * draw.randrange(2, 4), 1024, tied=draw.random() < 0.5)
    parallel = dict(draw.choice(RECOMPUTE))
    if parallel == {"recompute_granularity": "full"} and model.num_layers % 2 == 0:
        parallel |= {"recompute_method": "uniform", "recompute_num_layers": 2}
    micro_batch = draw.choice((1, 2))
    return Case(
        name="drawn", world_size=1, model=model, pairs=2, micro_batch=micro_batch, sides=sides, parallel=parallel
    )


def drawn_policy_case(seed: int) -> PolicyCase:
    """GRPO in one process, of the same kind of sizes."""
    draw, like = random.Random(seed), drawn_case(seed)
    return PolicyCase(
        name="drawn",
        world_size=1,
        model=like.model,
        pairs=2,
        group=4,
        micro_batch=draw.choice((2, 4, 8)),
        response=draw.randrange(64, 200),
        prompt={"text": draw.randrange(40, 160), "grid": (16, draw.choice((8, 12, 16)))},
        parallel=like.parallel,
    )


@pytest.mark.parametrize(("drawn", "run"), [(drawn_case, compare), (drawn_policy_case, compare_policy)])
def test_prediction_within_ten_per_cent(drawn, run):
    seed = random.SystemRandom().randrange(10**6)
    case = drawn(seed)
    row = run(case)
    error = row["predicted_bytes"] / row["measured_bytes"] - 1
    assert abs(error) < 0.1, f"seed {seed}: {100 * error:+.1f}%, {case}: {row}"


@pytest.mark.parametrize(("batches", "stages", "virtual"), [(5, 1, 1), (8, 4, 1), (2, 4, 1), (8, 4, 2), (4, 2, 3)])
def test_schedule(batches, stages, virtual):
    """Every pass once, a backward after its forward, as many in flight as 1F1B has, forwards in megatron's order."""
    for stage in range(stages):
        order = list(one_f_one_b(batches, stage, stages, virtual))
        counts = Counter(order)
        assert len(counts) == len(order) == 2 * batches * virtual
        flying, most = set(), 0
        for work in order:
            key = (work.batch, work.chunk)
            flying.add(key) if work.kind == "forward" else flying.remove(key)
            most = max(most, len(flying))
        if virtual == 1:
            assert most == min(stages - stage, batches)
        else:
            warm_up = 2 * (stages - stage - 1) + (virtual - 1) * stages
            assert most == min(warm_up + 1, batches * virtual)
        forwards = [(work.batch, work.chunk) for work in order if work.kind == "forward"]
        assert forwards == get_schedule_table(batches, virtual, stages)


def test_imagined_batch_has_the_shapes_of_a_real_one():
    sizes = {"text": 30, "response": 12, "grid": (8, 4)}
    case = Case(
        name="", world_size=1, model=shape(128, 2, 4, 2, 128, 512), pairs=3, micro_batch=3, sides=(sizes, sizes)
    )
    real = pack(made_pairs(case, 0, 3), 4)
    # Two tokens around a picture are text to the plan.
    made = imagine(case.model, [Side(text=32, response=12, patches=32)] * 6, pad_to_multiple=4)
    for name in ("input_ids", "position_ids", "pixel_values", "disc_rows", "supervised_rows", "cu_seqlens"):
        assert getattr(made, name).shape == getattr(real, name).shape, name
    assert torch.equal(made.cu_seqlens, real.cu_seqlens) and made.num_real_tokens == real.num_real_tokens
    assert batch_bytes(made, patches=num_patches(made)) == batch_bytes(real, patches=len(real.pixel_values))
    assert step_flops([made], case.model, False) == pytest.approx(step_flops([real], case.model, False), rel=1e-3)


def test_timeline_keeps_the_peak_and_its_parts():
    line = Timeline()
    line.hold("a", 5, "first")
    line.touch("second", b=3)
    line.drop("a", 2)
    line.hold("c", 1, "third")
    assert (line.peak, line.moment, line.parts) == (8, "second", {"a": 5, "b": 3})


def test_largest_micro_batch_is_the_largest():
    """What it says fits, one pair more does not."""
    model = shape(256, 4, 8, 2, 768, 4096)
    config = SFTConfig(model=ModelConfig(bf16=True), data=DataConfig(global_batch_size=64))
    tight = replace(HARDWARE["h100"], memory_bytes=800 << 20, reserve_bytes=0)
    settings = PlanConfig(world_size=1, text_tokens=64, response_tokens=64, patches_per_side=256)
    setup = Setup(model=model, config=config, world_size=1, hardware=tight)
    steps = Steps(setup, settings)
    found = steps.largest_micro_batch()
    assert 0 < found < 64

    def peak(size: int) -> int:
        works = steps.expected(replace(config.data, micro_batch_size=size))
        return max(line.peak for line in steps.memory(works))

    assert peak(found) <= tight.usable_bytes < peak(found + 1)
    roomy = replace(setup, hardware=HARDWARE["cpu"])
    assert Steps(roomy, settings).largest_micro_batch() is None


def test_least_recomputation_is_that_of_the_stage_with_most_layers():
    """The first of two stages has one layer of eight."""
    uneven = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}
    settings = PlanConfig(world_size=2, patches_per_side=0)

    def steps(usable: int, **recompute: Any) -> Steps:
        config = SFTConfig(
            model=ModelConfig(bf16=True),
            parallel=ParallelConfig(**uneven, **recompute),
            data=DataConfig(global_batch_size=16, micro_batch_size=4, seq_length=2048),
        )
        device = replace(HARDWARE["h100"], memory_bytes=usable, reserve_bytes=0, fragmentation=0.0)
        model = shape(256, 8, 8, 2, 768, 4096)
        return Steps(Setup(model=model, config=config, world_size=2, hardware=device), settings)

    def peak(count: int) -> int:
        recompute = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": count}
        tried = steps(1 << 40, **recompute)
        return max(line.peak for line in tried.memory(tried.fullest()))

    for count in (4, 7):
        assert peak(count) < peak(count - 1)
        assert steps(math.ceil(peak(count) / 0.93)).least_recomputation() == count


@pytest.mark.parametrize("config_class", [SFTConfig, GRPOConfig])
def test_nothing_is_fuller_than_the_fullest_micro_batch(config_class):
    """Drawn settings: its tokens are the most that they allow, and the step keeps its number of micro-batches.

    It once was as many sequences of seq_length as the budget holds: 24,576 tokens of 32,768.
    """
    rng = random.Random(SEED)
    for _ in range(30):
        pairs, seq_length, parts = rng.choice((2, 4, 6, 12)), rng.randrange(30, 3000), rng.choice((1, 2))
        data = DataConfig(
            global_batch_size=pairs,
            seq_length=seq_length,
            micro_batch_size=rng.randrange(1, 9),
            max_tokens_per_micro_batch=rng.choice((None, rng.randrange(10, 8 * seq_length))),
        )
        config, least, available = config_class(data=data), 2, 2 * pairs
        if config_class is GRPOConfig:
            config.policy.mini_batches, config.rollout.num_generations = parts, 3
            least, available = 1, 2 * pairs // parts * 3
        settings = PlanConfig(world_size=1, text_tokens=rng.randrange(1, 300))
        setup = Setup(model=shape(64, 2, 4, 2, 128, 512), config=config, world_size=1, hardware=HARDWARE["h100"])
        steps = Steps(setup, settings)
        expected, fullest = (
            [len(packed_of(work).input_ids) for work in works] for works in (steps.expected(), steps.fullest())
        )
        most = min(data.micro_batch_size * least, available) * seq_length
        if data.max_tokens_per_micro_batch is not None:
            most = min(most, max(data.max_tokens_per_micro_batch, least * seq_length))
        # A few tokens go in rounding to sequences of one length.
        sequences = data.micro_batch_size * least
        assert most - sequences < max(fullest) <= most and max(expected) <= most, (SEED, data, settings)
        assert len(expected) == len(fullest) and steps.side.tokens(setup.model) <= seq_length, (SEED, data, settings)


def test_more_ranks_take_less_and_more_tokens_take_more():
    settings = PlanConfig(world_size=4, text_tokens=64, response_tokens=64, patches_per_side=256)

    def peak(layout: dict, **data: int) -> int:
        config = SFTConfig(
            model=ModelConfig(bf16=True), parallel=ParallelConfig(**layout), data=DataConfig(**data, seq_length=1024)
        )
        model = shape(256, 4, 8, 2, 768, 4096)
        steps = Steps(Setup(model=model, config=config, world_size=4, hardware=HARDWARE["h100"]), settings)
        return max(line.peak for line in steps.memory(steps.fullest()))

    plain = peak({})
    assert peak({"tensor_model_parallel_size": 2}) < plain
    assert peak({"tensor_model_parallel_size": 2, "sequence_parallel": True}) < peak({"tensor_model_parallel_size": 2})
    assert peak({"recompute_granularity": "full"}) < peak({"recompute_granularity": "selective"}) < plain
    assert peak({}, max_tokens_per_micro_batch=2048) < plain < peak({}, micro_batch_size=8)
    assert plain < peak({"use_distributed_optimizer": False})
