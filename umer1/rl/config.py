"""How rollouts are made: the engine, the sampling, and the checks between trainer and engine."""

from dataclasses import dataclass
from typing import Literal

VLLM_TEMPERATURES = (0.01, 2.0)  # below, vLLM samples at 0.01 instead; above, it refuses every request


def vllm_temperature_problems(temperature: float) -> list[str]:
    """[] or why vLLM does not sample at a temperature above 0."""
    low, high = VLLM_TEMPERATURES
    if low <= temperature <= high:
        return []
    return [f"temperature={temperature} must be {low} to {high:g} for vLLM; or use the torch engine"]


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """How responses are sampled, and by which engine"""

    rollout_engine: Literal["auto", "vllm", "torch"] = "auto"
    """vllm, torch (plain sampling with a KV cache: slow, needs nothing), or auto: vllm where it is installed."""
    num_generations: int = 8
    """Responses of each prompt, the group that advantages are taken in (G)."""
    temperature: float = 1.0
    """Temperature of sampling; all log-probs are taken at it too."""
    top_p: float = 1.0
    """Only 1 is legal: the log-probs are those of the whole distribution."""
    top_k: int = 0
    """Only 0 (off) is legal: the log-probs are those of the whole distribution."""
    max_completion_length: int = 2048
    """Most tokens of a response; a longer one is cut off there."""
    stop_at_gen_emb: bool = False
    """End a response right after <gen_emb> instead of at <|im_end|>."""
    rollout_server: str | None = None
    """HOST:PORT[,HOST:PORT...] of vLLM servers (`umer1 serve-rollouts`) instead of engines that the run starts."""
    rollout_tensor_parallel_size: int = 1
    """GPUs that one vLLM engine's layers are cut over."""
    rollout_gpu_memory_utilization: float = 0.4
    """Share of a GPU's memory that vLLM may take."""
    rollout_max_sequences: int = 256
    """Most responses that one engine works on at once."""
    rollout_timeout_seconds: float = 480.0
    """Seconds after which responses of a step that are not there yet are left out of their groups."""
    rollout_max_restarts: int = 3
    """Dead engines that are started anew in one run; one more saves the run and stops it."""
    weight_sync_timeout_seconds: float = 300.0
    """Seconds after which a weight update that some engine did not finish ends the run."""
    parity_threshold: float | None = None
    """Mean |difference| of log-probs of trainer and engine above which a step stops the run; default: 0.01 in fp32,
    0.2 in bf16."""
    max_failed_steps: int = 5
    """Steps in a row without a single response that stop the run."""
    log_rollouts: int = 10
    """Steps between files of rollouts under SAVE/rollouts; 0 for none."""
    log_rollouts_prompts: int = 4
    """Pairs of a step whose responses are written."""

    def violations(self) -> list[str]:
        found = []
        at_least = {"num_generations": 2, "max_completion_length": 1, "rollout_tensor_parallel_size": 1}
        at_least |= {"rollout_max_sequences": 1, "rollout_max_restarts": 0, "max_failed_steps": 1}
        at_least |= {"log_rollouts": 0, "log_rollouts_prompts": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                why = ": an advantage needs something to compare with" if name == "num_generations" else ""
                found.append(f"{name}={getattr(self, name)} must be {least} or above{why}")
        if not 0 < self.temperature < float("inf"):
            found.append(f"temperature={self.temperature} must be above 0; without chance all responses are equal")
        elif self.rollout_engine != "torch":
            found += vllm_temperature_problems(self.temperature)
        if self.top_p != 1.0:
            found.append(f"top_p={self.top_p} is refused: the policy's log-probs are those of top_p=1")
        if self.top_k != 0:
            found.append(f"top_k={self.top_k} is refused: the policy's log-probs are those of top_k=0 (off)")
        for name in ("rollout_timeout_seconds", "weight_sync_timeout_seconds"):
            if not getattr(self, name) > 0:
                found.append(f"{name}={getattr(self, name)} must be above 0")
        if not 0 < self.rollout_gpu_memory_utilization < 1:
            found.append(
                f"rollout_gpu_memory_utilization={self.rollout_gpu_memory_utilization} must be between 0 and 1"
            )
        if self.parity_threshold is not None and not self.parity_threshold > 0:
            found.append(f"parity_threshold={self.parity_threshold} must be above 0")
        return found + self._server_violations()

    def _server_violations(self) -> list[str]:
        if self.rollout_server is None:
            return []
        found = []
        if self.rollout_engine == "torch":
            found.append("rollout_server is for vLLM; leave rollout_engine unset or vllm")
        for address in self.rollout_server.split(","):
            host, colon, port = address.strip().rpartition(":")
            if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
                found.append(f"rollout_server: {address.strip()!r} is not HOST:PORT")
        return found

    def servers(self) -> list[tuple[str, int]]:
        """(host, port) of each server; an address that `violations` complains of is left out."""
        parts = [address.strip().rpartition(":") for address in (self.rollout_server or "").split(",") if address]
        return [(host, int(port)) for host, _, port in parts if host and port.isdigit()]
