"""umer1's engine as a model of the mteb package, so that the community's harness can score it.

    import mteb
    from umer1.sharing.mteb_encoder import MtebEncoder

    with MtebEncoder("runs/2b/hf", mode="gen") as model:
        mteb.evaluate(model, mteb.get_tasks(["STSBenchmark"]))

Texts, pictures and both together, in disc or gen mode.  Needs the mteb package: pip install 'umer1[share]'.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import get_prompt
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType
from PIL import Image

from umer1 import device as devices
from umer1.checkpoints.fingerprint import model_fingerprint, newest_model
from umer1.data.media import to_rgb
from umer1.distributed.parallel import init_distributed, launched_world_size
from umer1.errors import ConfigError, UserError
from umer1.inference.engine import EngineConfig, load_engine, make_processor, open_directory
from umer1.inference.generate import GenerationConfig
from umer1.inference.inputs import BadInput, Input
from umer1.inference.planning import plan_batches
from umer1.inference.runner import Runner, inspect_together
from umer1.progress import Progress

_AT_ONCE = 1024  # inputs, with their pictures, that are held and cut into batches of like length
_SHOWN = 5  # inputs that one message lists
_NUM_WORKERS = 2  # threads that resize pictures ahead of the model


class MtebEncoder:
    """mteb's EncoderProtocol.  One at a time in a process; `close` (or `with`) lets go of the model.

    mode: "disc" or "gen".  prompts: instructions by mteb's keys (task name, task type, "query", "document", or
    "NAME-query" and the like), in place of the tasks' own.  A task's own instruction stands before queries and before
    the inputs of symmetric tasks; before documents only where the task has one for them.  generation: of gen mode.
    settings: fields of EngineConfig, such as max_pixels or bf16.  name: what results are filed under; the default is
    the directory's name, the hash of the weights is the revision.  Raises UserError.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        mode: Literal["disc", "gen"] = "disc",
        prompts: Mapping[str, str] | None = None,
        generation: GenerationConfig | None = None,
        name: str | None = None,
        **settings: Any,
    ):
        generation = generation or GenerationConfig()
        config = EngineConfig(model=str(newest_model(model_name)), **settings)
        found = config.violations() + generation.violations()
        if mode not in ("disc", "gen"):
            found.append(f"mode={mode!r} is not legal; use disc or gen")
        if device is not None and device.split(":")[0] != devices.device().type:
            found.append(f"device={device!r} is not what umer1 runs on here; use {devices.device().type}")
        if launched_world_size() > 1:
            found.append("mteb runs in one process; start it without torchrun")
        if found:
            raise ConfigError(found)
        self.prompts, self.mode = dict(prompts or {}), mode
        experiment = {"mode": mode, **_chosen(config, EngineConfig(model=config.model))}
        if mode == "gen":
            experiment |= _chosen(generation, GenerationConfig())
        if self.prompts:
            experiment["prompts"] = json.dumps(self.prompts, sort_keys=True, ensure_ascii=False)
        self.max_inputs, self.generation = generation.max_sequences, generation if mode == "gen" else None
        directory = open_directory(config)
        processor = make_processor(config, directory)
        with ExitStack() as stack:
            state = stack.enter_context(init_distributed(config.parallel()))
            self.engine = load_engine(config, directory, processor, state)
            self._open = stack.pop_all()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"umer1/{name or Path(model_name).absolute().name}",
                "revision": revision or model_fingerprint(config.model),
                "embed_dim": directory.config.hidden_size,
                "max_tokens": config.max_input_tokens,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch", "safetensors"],
                "modalities": ["text", "image"],
                "use_instructions": True,
                "experiment_kwargs": experiment,
            }
        )

    def __enter__(self) -> "MtebEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process groups; the model cannot be used any more."""
        self._open.close()

    def encode(
        self,
        inputs: Iterable[Mapping[str, list]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **_: Any,
    ) -> np.ndarray:
        """float32 [N, H], L2-normalised, in the order of `inputs` (mteb's batches; their size does not matter here).

        UserError when an input cannot be embedded: a score without it would be another benchmark's.
        """
        what = f"umer1 {self.mode}, {task_metadata.name} {hf_subset} {hf_split}"
        instruction = self.instruction(task_metadata, prompt_type)
        progress = Progress(what, len(inputs.dataset), enabled=show_progress_bar)
        embeddings: list[np.ndarray] = []
        held: list[tuple[str, Image.Image | None]] = []
        for batch in inputs:
            held += _items(batch, instruction)
            if len(held) >= _AT_ONCE:
                embeddings += self._embed(held, what, len(embeddings), progress)
                held = []
        embeddings += self._embed(held, what, len(embeddings), progress)
        progress.finish()
        return np.array(embeddings, dtype=np.float32).reshape(-1, self.engine.model_config.hidden_size)

    def instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """What stands before every text; "" for nothing."""
        if (chosen := get_prompt(self.prompts, task_metadata, prompt_type)) is not None:
            return chosen
        own = task_metadata.prompt
        if isinstance(own, dict):
            return own.get(prompt_type.value, "") if prompt_type is not None else ""
        return own if own and prompt_type is not PromptType.document else ""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [N1, N2] of all pairs."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines [N] of pairs in the same place."""
        return pairwise_cos_sim(embeddings1, embeddings2)

    def _embed(
        self, items: list[tuple[str, Image.Image | None]], what: str, first: int, progress: Progress
    ) -> list[np.ndarray]:
        """One float32 [H] an item; `first` is the number of the first one, for messages and for sampling."""
        pictures = _Pictures()
        inputs = [
            Input(str(number), text, () if picture is None else (pictures.add(number, picture),), (), number)
            for number, (text, picture) in enumerate(items, start=first)
        ]
        engine = self.engine
        costs, bad = inspect_together(inputs, self.mode, pictures, engine.processor, engine.state)
        _check(bad, what)
        batches = plan_batches(
            costs,
            max_tokens=engine.config.max_tokens_per_batch,
            max_patches=engine.config.max_patches_per_batch,
            max_inputs=self.max_inputs,
            num_groups=1,
        )
        runner = Runner(
            engine,
            inputs,
            pictures,
            generation=self.generation,
            skip_bad=False,
            num_workers=_NUM_WORKERS,
            progress=progress,
        )
        encoded, bad = runner.run(batches)
        _check(bad, what)
        return [entry.embedding for entry in sorted(encoded, key=lambda entry: entry.position)]


def _chosen(settings: Any, defaults: Any) -> dict[str, Any]:
    """Those of a dataclass that are not as they come."""
    usual = asdict(defaults)
    return {name: value for name, value in asdict(settings).items() if value != usual[name]}


class _Pictures:
    """Pictures in memory, opened as MediaRoot opens files."""

    def __init__(self):
        self._pictures: dict[str, Image.Image] = {}

    def add(self, number: int, picture: Image.Image) -> str:
        """The name of `picture` from now on."""
        self._pictures[str(number)] = picture
        return str(number)

    def image_size(self, name: str) -> tuple[int, int]:
        """(width, height)"""
        return self._pictures[name].size

    def open_image(self, name: str) -> Image.Image:
        """RGB"""
        return to_rgb(self._pictures[name])

    def signature(self, name: str) -> None:
        """Nothing to remember a decoded picture by: names are used again."""
        return None


def _items(batch: Mapping[str, list], instruction: str) -> list[tuple[str, Image.Image | None]]:
    """(text, picture) of each input of one of mteb's batches; UserError for what umer1 has no prompt for."""
    if foreign := {"audio", "video"} & set(batch):
        raise UserError(f"the task has {' and '.join(sorted(foreign))}; MtebEncoder takes text and images")
    count = len(next(iter(batch.values())))
    texts = batch.get("text", [""] * count)
    pictures = batch.get("image", [None] * count)
    return [(f"{instruction} {text}".strip(), picture) for text, picture in zip(texts, pictures, strict=True)]


def _check(bad: list[BadInput], what: str) -> None:
    if bad:
        listed = "".join(f"\n  input {entry.id}: {entry.cause}: {entry.detail}" for entry in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UserError(f"{what}: {len(bad)} inputs cannot be embedded:{listed}{more}")
