"""What the rollout engines of GRPO take of the devices, and how long a step's responses take under an assumption.

seconds = rounds x tokens of a response x (weights + keys and values of all responses at hand) / bandwidth reached
"""

from dataclasses import dataclass
from typing import Literal

from umer1.distributed.parallel import ParallelConfig
from umer1.plan.parameters import stage_parameters
from umer1.plan.settings import PlanConfig
from umer1.plan.setup import Setup
from umer1.plan.workload import Side


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Engines of one run; bytes and tokens are those of one device."""

    engine: Literal["vllm", "torch", "server"]
    device_bytes: int
    """Taken of the trainer's device while responses are made; 0 for servers."""
    weights_bytes: int
    cache_bytes_per_token: float
    """Keys and values."""
    cache_tokens: int
    """Tokens that one engine holds at once; 0: not known (servers)."""
    full_sequences: int
    """Sequences of seq_length that fit at once."""
    responses: int
    """That one engine makes in a step."""
    seconds: float | None
    """None: not estimated (servers, devices without data sheet)."""


def plan_rollouts(setup: Setup, settings: PlanConfig, side: Side, prompts: int) -> Rollouts:
    """side: a prompt and its response.  prompts: of a step, both sides of all pairs."""
    config, model, hardware = setup.config.rollout, setup.model, setup.hardware
    server, torch_engine = config.rollout_server is not None, config.rollout_engine == "torch" or not hardware.gpu
    engine = "server" if server else "torch" if torch_engine else "vllm"
    cut = setup.layout.tp * setup.layout.pp if engine == "torch" else config.rollout_tensor_parallel_size
    engines = len(config.servers()) if server else setup.world_size // cut
    whole = stage_parameters(model, ParallelConfig(), 0, train_vision=False)
    weights = setup.itemsize * sum(parameter.numel for parameter in whole[0]) // cut
    # An engine that is cut further than there are KV heads has each of them on several devices.
    heads = max(model.num_query_groups, cut)
    per_token = 2 * model.num_layers * heads * model.head_dim * setup.itemsize / cut
    longest, responses = setup.config.data.seq_length, -(-prompts * config.num_generations // engines)
    taken = tokens = 0
    if engine == "vllm":
        taken = int(hardware.memory_bytes * config.rollout_gpu_memory_utilization)
        tokens = max(int((taken - weights) / per_token), 0)
    elif engine == "torch":
        tokens = min(responses, config.rollout_max_sequences) * longest
        taken = int(weights + tokens * per_token)
    seconds = None
    if engine != "server" and hardware.bandwidth is not None:
        together = max(min(responses, config.rollout_max_sequences, tokens // side.tokens(model)), 1)
        read = weights + together * (side.tokens(model) - side.response / 2) * per_token
        reached = hardware.bandwidth * settings.assumed_bandwidth
        seconds = -(-responses // together) * side.response * read / reached
    return Rollouts(engine, taken, weights, per_token, tokens, tokens // longest, responses, seconds)
