"""`umer1 encode`: inputs to embeddings.

    umer1 encode --model DIR --input FILE.jsonl --data-root DIR --mode disc|gen --output FILE.npz
    torchrun --nproc-per-node 8 -m umer1.cli encode ... --tensor-model-parallel-size 2

Input lines are `{"id", "text", "image": path | [paths], "video": file | [frame paths]}`.  FILE.npz gets `ids` (text)
and `embeddings` (float32 [N, hidden], L2-normalised) in input order, and `made_by`, JSON text that says what they came
from: mode, SHA-256 of the model, input settings, versions.  In gen mode FILE.jsonl gets the responses.
Nothing is written unless everything went well; inputs that cannot be embedded stop the command before any work, or are
left out and listed in FILE.bad.jsonl (--skip-bad-inputs).
"""

import importlib.metadata
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umer1 import __version__
from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.configuration import help_text, load_config
from umer1.data.input_settings import InputSettings
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.distributed.parallel import init_distributed
from umer1.errors import UserError
from umer1.files import atomic_path, make_folder, write_json_lines, writing_to
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig
from umer1.inference.inputs import bad_inputs_message, read_inputs
from umer1.inference.planning import plan_batches
from umer1.inference.replicas import on_first
from umer1.inference.runner import BadInput, Encoded, Runner, inspect_together
from umer1.rules import path_problems, same_place


@dataclass(kw_only=True, slots=True)
class EncodeConfig:
    """What is encoded, and where to"""

    input: str | None = None
    """JSONL file of inputs."""
    data_root: str | None = None
    """Directory that media paths start at and cannot leave."""
    output: str | None = None
    """FILE.npz to write."""
    mode: Literal["disc", "gen"] = "disc"
    """disc = the prompt alone, read at <disc_emb>; gen = reason first, read at the response's <gen_emb>."""
    skip_bad_inputs: bool = False
    """Leave out inputs that cannot be embedded and list them in FILE.bad.jsonl, in place of stopping."""
    num_workers: int = 2
    """Threads that decode images ahead of the model."""

    def violations(self) -> list[str]:
        found = [f"--{name} is required" for name in ("input", "output") if not getattr(self, name)]
        if self.output and not self.output.endswith(".npz"):
            found.append(f"output={self.output!r} must end in .npz")
        else:
            found += path_problems("output", self.output, lambda path: not path.is_dir(), "is a directory; name a file")
        if self.num_workers < 1:
            found.append(f"num_workers={self.num_workers} must be 1 or above")
        if self.input and self.output:
            responses = [responses_path(self.output)] if self.mode == "gen" else []
            for path in (*responses, bad_path(self.output)):
                if same_place(path, self.input):
                    found.append(f"output={self.output!r} would write {path} over the input; choose another name")
        return found


@dataclass(kw_only=True, slots=True)
class EncodeCommand:
    """umer1 encode"""

    encode: EncodeConfig = field(default_factory=EncodeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def violations(self) -> list[str]:
        return self.encode.violations() + self.engine.violations() + self.generation.violations()


def responses_path(output: str | Path) -> Path:
    """FILE.jsonl beside FILE.npz."""
    return Path(output).with_suffix(".jsonl")


def bad_path(output: str | Path) -> Path:
    """FILE.bad.jsonl beside FILE.npz."""
    return Path(output).with_suffix(".bad.jsonl")


def main(argv: list[str]) -> None:
    """The command; every rank runs it."""
    if {"-h", "--help"} & set(argv):
        print(help_text(EncodeCommand, __doc__))
        return
    command = load_config(EncodeCommand, argv)
    config = command.encode
    make_folder(Path(config.output).parent)
    inputs, bad = read_inputs(config.input)
    total = len(inputs) + len(bad)
    media = None if config.data_root is None else MediaRoot(config.data_root)
    directory = open_directory(command.engine)
    processor = make_processor(command.engine, directory)
    with init_distributed(command.engine.parallel()) as state:
        command.engine.model = on_first(lambda: str(newest_model(command.engine.model)), state)
        sha256 = on_first(lambda: model_fingerprint(command.engine.model), state)
        costs, missing = inspect_together(inputs, config.mode, media, processor, state)
        bad += missing
        if bad and not config.skip_bad_inputs:
            raise UserError(bad_inputs_message(config.input, bad, total))
        batches = plan_batches(
            costs,
            max_tokens=command.engine.max_tokens_per_batch,
            max_patches=command.engine.max_patches_per_batch,
            max_inputs=command.generation.max_sequences,
            num_groups=state.dp_size,
        )
        engine = load_engine(command.engine, directory, processor, state)
        generation = command.generation if config.mode == "gen" else None
        runner = Runner(
            engine,
            inputs,
            media,
            generation=generation,
            skip_bad=config.skip_bad_inputs,
            num_workers=config.num_workers,
        )
        encoded, corrupt = runner.run(batches)
        bad += corrupt
        if bad and not config.skip_bad_inputs:
            raise UserError(bad_inputs_message(config.input, bad, total))
        if state.rank == 0:
            with writing_to(config.output):
                write_results(config, encoded, bad, total, made_by(command, sha256, processor))
        state.barrier()


def made_by(command: EncodeCommand, sha256: str, processor: Processor) -> dict[str, Any]:
    """What vectors depend on besides the inputs; only such as agree in all of it may be compared."""
    generates = command.encode.mode == "gen"
    return {
        "mode": command.encode.mode,
        "model_sha256": sha256,
        "dtype": str(command.engine.dtype).removeprefix("torch."),
        "inputs": asdict(InputSettings.of(processor.image_config, processor.blank_image_for_text)),
        "max_input_tokens": command.engine.max_input_tokens,
        "generation": asdict(command.generation) if generates else None,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of what may have had a hand in the numbers; what is not installed is left out."""
    found = {"umer1": __version__}
    for name in ("torch", "transformers", "torchvision", "Pillow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_results(
    config: EncodeConfig, encoded: list[Encoded], bad: list[BadInput], total: int, made: dict[str, Any]
) -> None:
    """The output files, each whole or not at all, and a summary on stderr.  made: `made_by`."""
    if not encoded:
        raise UserError(f"{config.input}: none of the {total} inputs could be embedded; see {bad_path(config.output)}")
    encoded = sorted(encoded, key=lambda item: item.position)
    broken = [item.id for item in encoded if not abs(np.linalg.norm(item.embedding) - 1.0) < 1e-3]
    if broken:
        raise UserError(
            f"the states are not finite for {len(broken)} of {len(encoded)} inputs ({', '.join(broken[:5])}, ...): "
            "its weights are damaged, or bf16 is too narrow for it (try --fp32); nothing was written"
        )
    if bad:
        write_json_lines(bad_path(config.output), map(asdict, sorted(bad, key=lambda entry: entry.line)))
    if config.mode == "gen":
        write_json_lines(responses_path(config.output), (item.response for item in encoded))
    with atomic_path(config.output) as aside, open(aside, "wb") as file:
        np.savez(
            file,
            ids=np.array([item.id for item in encoded]),
            embeddings=np.stack([item.embedding for item in encoded]).astype(np.float32),
            made_by=np.array(json.dumps(made, sort_keys=True)),
        )
    if not bad:
        bad_path(config.output).unlink(missing_ok=True)  # an earlier run's, whose embeddings these replace
    summary = [f"{len(encoded)} embeddings of {encoded[0].embedding.shape[-1]} numbers in {config.output}"]
    if config.mode == "gen":
        missing = sum(item.response["missing_gen_emb"] for item in encoded)
        summary.append(f"responses in {responses_path(config.output)}, {missing} of them without <gen_emb>")
    if bad:
        summary.append(f"{len(bad)} of {total} inputs left out, listed in {bad_path(config.output)}")
    print("umer1 encode: " + "; ".join(summary), file=sys.stderr, flush=True)
