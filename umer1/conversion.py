"""`umer1 convert`: a Hugging Face directory to a megatron distributed checkpoint and back, bit for bit."""

import argparse
from pathlib import Path

import torch

from umer1.checkpoints import layout
from umer1.checkpoints.search import is_checkpoint_place
from umer1.checkpoints.source import load_model_weights, open_model, stored_model_dtype
from umer1.distributed.parallel import ParallelConfig, ParallelState, init_distributed, launched_world_size
from umer1.errors import ConfigError, UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.export import destination_problem
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import load_hf, save_hf, stored_dtype
from umer1.sharing.card import Subject
from umer1.sharing.documents import export_documents
from umer1.sharing.training_run import run_of
from umer1.training.checkpoint import save_checkpoint

_EPILOG = """\
examples:
  umer1 convert --from-hf Qwen2-VL-2B-Instruct --to-checkpoint runs/base
      writes runs/base/iter_0000000, from which training starts:  examples/pretrain_sft.py --load runs/base --finetune
  umer1 convert --from-checkpoint runs/sft --to-hf exported
      takes the newest valid checkpoint of runs/sft (or name one: runs/sft/iter_0005000) and writes safetensors that
      transformers and vLLM load, with config, tokenizer and processor; the padded vocabulary is cut back
  torchrun --nproc-per-node 4 -m umer1.cli convert --from-hf DIR --to-checkpoint DIR --tensor-model-parallel-size 2 \\
      --pipeline-model-parallel-size 2
      the same by four processes, each holding a quarter of the model

A checkpoint does not depend on the layout: what one process writes loads at any tensor, pipeline and data parallelism.
The parallel sizes only say how many processes share this conversion; started as a plain program, one process does it
all and they are not needed.

The two tokens <gen_emb> and <disc_emb> are added when the tokenizer lacks them; their rows start from those of
<|object_ref_end|> and <|object_ref_start|>.  No code from the directory is executed.
"""


def main(argv: list[str]) -> None:
    """Parse, check, convert; UserError for everything a user can mend."""
    options = _parse(argv)
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    size = options.tensor_model_parallel_size * options.pipeline_model_parallel_size
    if launched_world_size() == 1 and size > 1:
        print(f"one process converts for all {size}: the checkpoint loads at any layout", flush=True)
        legal = parallel
        parallel = ParallelConfig()
    else:
        legal = parallel
    source = _checked_source(options)
    if problems := legal.violations(source.config, max(size, launched_world_size())):
        raise ConfigError(problems)
    with init_distributed(parallel) as state:
        if options.from_hf:
            _import(source, Path(options.to_checkpoint), options, parallel, state)
        else:
            _export(source, options, parallel, state)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="umer1 convert",
        description=__doc__.split(": ", 1)[1],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-hf", metavar="DIR", help="Qwen2-VL directory: config.json, safetensors, tokenizer.json")
    source.add_argument("--from-checkpoint", metavar="DIR", help="a --save directory or one iter_* directory of it")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--to-checkpoint", metavar="DIR", help="save directory to write iter_0000000 into (with --from-hf)"
    )
    target.add_argument("--to-hf", metavar="DIR", help="directory to write; an earlier export there is replaced")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of the written weights; default: that of the source"
    )
    for name, text in (("tensor", "ranks that share each layer"), ("pipeline", "ranks that share the layers")):
        parser.add_argument(f"--{name}-model-parallel-size", type=int, default=1, metavar="N", help=text)
    options = parser.parse_args(argv)
    if bool(options.from_hf) != bool(options.to_checkpoint):
        parser.error("use --from-hf with --to-checkpoint, or --from-checkpoint with --to-hf")
    return options


def _checked_source(options: argparse.Namespace) -> HFDirectory:
    """Open the source and refuse targets that may not be written, before any process group exists."""
    if options.from_hf:
        if is_checkpoint_place(Path(options.from_hf)):
            raise UserError(f"{options.from_hf} is a checkpoint; use --from-checkpoint")
        target = Path(options.to_checkpoint)
        if layout.list_iterations(target):
            raise UserError(f"{target} holds checkpoints already; name another directory")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file; --to-checkpoint needs a directory")
        return HFDirectory.open(options.from_hf)
    if not is_checkpoint_place(Path(options.from_checkpoint)):
        raise UserError(
            f"{options.from_checkpoint} is no checkpoint and holds none (an iter_* directory with {layout.MANIFEST})"
        )
    if problem := destination_problem(options.to_hf):
        raise UserError(problem)
    return open_model(options.from_checkpoint)


def _import(
    source: HFDirectory, target: Path, options: argparse.Namespace, parallel: ParallelConfig, state: ParallelState
) -> None:
    dtype = getattr(torch, options.dtype) if options.dtype else stored_dtype(source)
    models = build_model(source.config, parallel, state, params_dtype=dtype)
    load_hf(models, source, state)
    written = save_checkpoint(target, models, source, state)
    _report(f"{source.path} -> {written} ({_name(dtype)})", source, state)


def _export(source: HFDirectory, options: argparse.Namespace, parallel: ParallelConfig, state: ParallelState) -> None:
    dtype = getattr(torch, options.dtype or stored_model_dtype(source.path.parent, source))
    models = build_model(source.config, parallel, state, params_dtype=dtype)
    read = load_model_weights(models, options.from_checkpoint, source, state)
    subject = Subject(Path(options.to_hf).absolute().name, source.config, _name(dtype), run=run_of(read))
    save_hf(models, source, options.to_hf, state, documents=export_documents(subject, source))
    _report(f"{read} -> {options.to_hf} ({_name(dtype)})", source, state)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _report(what: str, source: HFDirectory, state: ParallelState) -> None:
    if state.rank == 0:
        added = "added and initialised" if source.added_tokens else "already there"
        print(f"converted {what}; <gen_emb> and <disc_emb> {added}", flush=True)
