"""A stand-in for a rollout engine that gives back responses from a file; examples/grpo.py with it instead of vLLM.

    torchrun ... tests/replay_engine.py ROLLOUTS.jsonl [flags of examples/grpo.py]

The line of a pair's slot and side answers its prompt, in every step.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np

from umer1.rl.checksum import checksum
from umer1.rl.types import Completion
from umer1.training import engines


class ReplayEngine:
    name, collective = "replay", False

    def __init__(self, path: Path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.lines = {(line["slot"], ("query", "positive").index(line["side"])): line for line in lines}

    def generate(self, requests, sampling, stop):
        places = [tuple(map(int, request.key.split("/")[-2:])) for request in requests]
        return [[self._completion(entry) for entry in self.lines[place]["completions"]] for place in places]

    def _completion(self, entry):
        if entry["status"] == "failed":
            return None
        logprobs = np.array(entry["logprobs"], dtype=np.float32)
        return Completion(entry["token_ids"], logprobs, entry["finish_reason"])

    def load_weights(self, tensors):
        return {name: checksum(tensor) for name, tensor in tensors}

    def start(self, stop):
        pass

    def sleep(self):
        pass

    wake = restart = close = sleep


if __name__ == "__main__":
    rollouts = Path(sys.argv.pop(1))
    engines.make_engine = lambda *_: ReplayEngine(rollouts)
    program = Path(__file__).resolve().parents[1] / "examples" / "grpo.py"
    sys.argv[0] = str(program)
    sys.argv += ["--rollout-engine", "torch"]  # vLLM's rules for models are none of the replay's
    runpy.run_path(str(program), run_name="__main__")
