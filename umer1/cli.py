"""The `umer1` command: thin, each subcommand is a module's main(argv)."""

import difflib
import importlib
import sys

from umer1 import __version__
from umer1.errors import UserError, exit_on_user_error

COMMANDS = {
    "convert": ("umer1.conversion", "Hugging Face directory <-> megatron distributed checkpoint"),
    "ckpt": ("umer1.checkpoint_command", "list, verify, prune and export checkpoints"),
    "annotate": ("umer1.annotation.annotate", "pairs -> SFT and RL files, with reasoning from a teacher"),
    "encode": ("umer1.inference.encode", "JSONL of inputs -> embeddings, in disc or gen mode"),
    "eval": ("umer1.evaluation.command", "score a model on a benchmark"),
    "share": ("umer1.sharing.share", "a model directory for others: sentence-transformers files and a model card"),
    "doctor": ("umer1.doctor.command", "what is installed, what it is used for, whether it works"),
    "plan": ("umer1.plan.command", "memory, layout and speed of a training run, before anything of it exists"),
    "mine": ("umer1.mining.mine", "hard negatives of an SFT file, by a model's embeddings"),
    "report": ("umer1.report.command", "training runs as one HTML page: curves, samples, settings, comparison"),
    "serve-rollouts": ("umer1.rl.engines.vllm_serve", "a vLLM engine for GRPO that trainers reach over TCP"),
    "compare": ("umer1.evaluation.compare", "results of several runs side by side"),
}


def main() -> None:
    """Run `umer1 COMMAND ...`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no text to the locale
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "--help"
    with exit_on_user_error(f"umer1 {name}" if name in COMMANDS else "umer1"):
        if name in ("-h", "--help"):
            print(_help())
        elif name == "--version":
            print(f"umer1 {__version__}")
        elif name in COMMANDS:
            importlib.import_module(COMMANDS[name][0]).main(arguments[1:])
        else:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            nearest = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"unknown command {name!r}{nearest}; there are {', '.join(COMMANDS)}")


def _help() -> str:
    lines = ["usage: umer1 COMMAND ...   (umer1 COMMAND --help tells more)", ""]
    lines += [f"  {name:14s} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "Training:  torchrun --nproc-per-node N examples/pretrain_sft.py --help, and examples/grpo.py --help"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
