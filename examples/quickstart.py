"""What `make quickstart` runs: the embedded default from data to scores, in a quarter of an hour on two cores.

Draws mini-MMEB, trains the tiny base with all three losses (umer1) and with L_disc alone (dume), goes on from umer1
with GRPO (on vLLM where it is installed), scores all three on held-out queries, and leaves
runs/quickstart/results.png.
Every step is a command that is printed before it runs.  NPROC in the environment is the number of processes (2).
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
OUT = Path("runs/quickstart")
PROCESSES = os.environ.get("NPROC", "2")


def run(title: str, *command: str) -> None:
    """Print and run one command; its output streams through; a failure ends the quickstart."""
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(BIN / command[0]), *command[1:]], env=environment, check=False)
    if done.returncode:
        sys.exit(f"quickstart: '{title}' failed; the message stands above. Mend it and run make quickstart again")
    print(f"=== {title}: {time.monotonic() - started:.0f} s", flush=True)


def torchrun(*command: str) -> tuple[str, ...]:
    return ("torchrun", "--standalone", "--nproc-per-node", PROCESSES, *command)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    programs = {
        "umer1": ("examples/pretrain_sft.py",),
        "dume": ("examples/pretrain_sft.py", "--config", "examples/configs/mini_dume.yaml"),
        "grpo": ("examples/grpo.py",),
    }
    for name, program in programs.items():
        run(f"train {name}", *torchrun(*program))
    for name in programs:
        scoring = ("-m", "umer1.cli", "eval", "--benchmark", "mini", "--model", f"runs/mini-{name}/hf")
        if name == "dume":
            scoring += ("--modes", "disc")  # it was not trained to reason
        run(f"score {name}", *torchrun(*scoring, "--output", str(OUT / name)))
    run(
        "compare", "umer1", "compare", *(f"{name}={OUT / name}" for name in programs), "--png", str(OUT / "results.png")
    )
    pictures = ", ".join([f"{OUT}/results.png", *(f"runs/mini-{name}/training.png" for name in programs)])
    print(f"\nDone in {time.monotonic() - started:.0f} s. Pictures: {pictures}")
    print("Responses and their rewards, to read: runs/mini-grpo/rollouts")
    print(
        "Next, your own pairs: torchrun --nproc-per-node 2 examples/pretrain_sft.py --help, and examples/grpo.py --help"
    )


if __name__ == "__main__":
    main()
