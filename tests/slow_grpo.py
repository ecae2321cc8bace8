"""examples/grpo.py that says by a file when a rank starts to generate; its torch engine waits before every token.

    torchrun ... tests/slow_grpo.py FOLDER SECONDS [flags of examples/grpo.py]

FOLDER/generate-RANK-N appears with the N-th call (from 1).  SECONDS is one number, or one for each rank by commas.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from umer1.rl.engines.torch_engine import TorchEngine, _RolloutLoop
from umer1.rl.engines.vllm_engine import VLLMEngine

RANK = int(os.environ.get("RANK", "0"))


def mark_calls(engine: type, folder: Path) -> None:
    generate, calls = engine.generate, 0

    def say_and_generate(self, requests, sampling, stop):
        nonlocal calls
        calls += 1
        (folder / f"generate-{RANK}-{calls}").touch()
        return generate(self, requests, sampling, stop)

    engine.generate = say_and_generate


def slow_down(seconds: float) -> None:
    choose = _RolloutLoop._choose

    def wait_and_choose(self, *arguments):
        time.sleep(seconds)
        return choose(self, *arguments)

    _RolloutLoop._choose = wait_and_choose


if __name__ == "__main__":
    folder, given = Path(sys.argv.pop(1)), sys.argv.pop(1).split(",")
    mark_calls(TorchEngine, folder)
    mark_calls(VLLMEngine, folder)
    slow_down(float(given[min(RANK, len(given) - 1)]))
    program = Path(__file__).resolve().parents[1] / "examples" / "grpo.py"
    sys.argv[0] = str(program)
    runpy.run_path(str(program), run_name="__main__")
