"""`umer1 share`: a model directory that others can load, with a card that says where it comes from.

    umer1 share --model runs/2b-grpo-hf --run runs/2b-grpo --results runs/2b-eval/results.json \\
        --base-model Qwen/Qwen2-VL-2B-Instruct --name me/my-2b --output shared/my-2b

The output loads in transformers, vLLM and sentence-transformers (disc mode: SentenceTransformer("shared/my-2b")), none
of which runs code from it.  README.md has the hub's metadata, how to use the model, data sets with their pairs, recipe,
steps, scores, commit and versions; local paths are left out.  An earlier export at --output is replaced in one step.
docs/sharing.md tells more.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.checkpoints.source import load_model_weights, open_model, stored_model_dtype
from umer1.configuration import help_text, load_config
from umer1.distributed.parallel import ParallelConfig, init_distributed, launched_world_size
from umer1.errors import ConfigError, UserError
from umer1.inference.replicas import on_first
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.export import destination_problem
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import save_hf
from umer1.sharing.card import Subject
from umer1.sharing.documents import export_documents
from umer1.sharing.scores import read_results
from umer1.sharing.training_run import checkpoint_step, read_run, run_of


@dataclass(kw_only=True, slots=True)
class ShareConfig:
    """What is shared, and what its card tells"""

    model: str | None = None
    """Hugging Face Qwen2-VL directory, or a checkpoint of umer1 (a --save directory or one iter_* in it)."""
    output: str | None = None
    """Directory to write."""
    run: str | None = None
    """The training run's --save directory: data, recipe and steps of the card; default: --model where it is one."""
    results: list[str] | None = None
    """results.json files of `umer1 eval` of this model: --results a/results.json b/results.json."""
    name: str | None = None
    """The model's name on the card, as users will load it; default: the output directory's."""
    base_model: str | None = None
    """Hub id (owner/name) of the model that training started from."""
    license: str | None = None
    """The hub's word for the licence, such as apache-2.0."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the written weights; default: as stored."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights while they are copied (under torchrun)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""

    def violations(self) -> list[str]:
        found = [f"--{name} is required" for name in ("model", "output") if not getattr(self, name)]
        if self.base_model and self.base_model.count("/") != 1:
            found.append(f"base_model={self.base_model!r} must be a hub id like Qwen/Qwen2-VL-2B-Instruct")
        if self.output and (problem := destination_problem(self.output)):
            found.append(problem)
        return found

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


@dataclass(kw_only=True, slots=True)
class ShareCommand:
    """umer1 share"""

    share: ShareConfig = field(default_factory=ShareConfig)

    def violations(self) -> list[str]:
        return self.share.violations()


def main(argv: list[str]) -> None:
    """The command; every rank runs it."""
    if {"-h", "--help"} & set(argv):
        print(help_text(ShareCommand, __doc__))
        return
    config = load_config(ShareCommand, argv).share
    parallel = config.parallel()
    source = open_model(config.model)
    if problems := parallel.violations(source.config, launched_world_size()):
        raise ConfigError(problems)
    with init_distributed(parallel) as state:
        model = on_first(lambda: newest_model(config.model), state)
        dtype = config.dtype or stored_model_dtype(model, source)
        subject = on_first(lambda: _subject(config, model, source.config, dtype), state)
        models = build_model(source.config, parallel, state, params_dtype=getattr(torch, dtype))
        load_model_weights(models, model, source, state)
        save_hf(models, source, config.output, state, documents=export_documents(subject, source))
        if state.rank == 0:
            print(f"umer1 share: {model} -> {config.output} ({dtype})", file=sys.stderr, flush=True)


def _subject(config: ShareConfig, model: Path, model_config: Qwen2VLConfig, dtype: str) -> Subject:
    """What the card tells; UserError where the results are of other weights."""
    results = [read_results(path) for path in config.results or []]
    scored = {found.sha256 for found in results} - {None}
    if scored and scored != {sha256 := model_fingerprint(model)}:
        raise UserError(
            f"--results are of files with the SHA-256 {', '.join(sorted(scored))}, and {model} has {sha256}: share the "
            "very directory or checkpoint that was evaluated"
        )
    return Subject(
        name=config.name or Path(config.output).absolute().name,
        config=model_config,
        dtype=dtype,
        base_model=config.base_model,
        license=config.license,
        run=read_run(config.run, checkpoint_step(model)) if config.run else run_of(model),
        results=results,
    )
