"""The model card: README.md with the hub's metadata, made from what is known of the model and of its run.

Of the machine it was made on it says nothing: a path is shown as its last part.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from umer1.data.prompts import SUFFIX
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.models.qwen2_vl.weight_table import hf_shapes
from umer1.sharing.scores import Results, Score
from umer1.sharing.training_run import TrainingRun
from umer1.sharing.versions import versions

# Settings that make a recipe, by the section that holds them; a run has those of its stage.
_RECIPE = {
    "optimizer": ("train_iters", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction")
    + ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
    "data": ("global_batch_size", "data_block_size", "seq_length", "min_pixels", "max_pixels", "video_min_pixels")
    + ("video_max_pixels", "num_frames", "blank_image_for_text"),
    "loss": ("variant", "contrastive_temperature", "learnable_temperature", "disc_weight", "gen_weight", "ce_weight")
    + ("cached_contrastive", "mask_equal_targets"),
    "rollout": ("num_generations", "temperature", "max_completion_length"),
    "policy": ("epsilon", "epsilon_high", "beta", "loss_normalisation", "inner_epochs", "mini_batches"),
    "reward": ("comparison_pairs", "exclude_equal_targets"),
    "model": ("train_vision",),
    "run": ("seed",),
}

_USE = """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{model}")
embeddings = model.encode(["a red square", "two blue circles"])
print(embeddings.shape)
print(model.similarity(embeddings, embeddings))
```

A picture is a path, a URL or a PIL image: `model.encode([{{"image": picture, "text": "Which breed is this?"}}])`. A
video is a list of frames under `"video"`. A bare string that is a picture's URL or path is fetched as one: give texts
that you did not write as `{{"text": text}}`. An instruction stands in front of the text; it may be given as `prompt=`.
This is disc mode: one pass over the input.

Gen mode reasons first and embeds the result, which takes longer:

```
umer1 encode --model {model} --input inputs.jsonl --data-root DIR --mode gen --output embeddings.npz
```

Pictures were upright, by their EXIF orientation, and their transparency was laid on white, before anything else. Other
programs leave that to who calls them; these two lines do it:

    picture = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGBA")
    picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")

For other engines: vision blocks, the task, a line with `<disc_emb>` and the line below make the user's turn. The disc
embedding is the last layer's state (after the final norm) at `<disc_emb>`, the gen embedding that at the last
`<gen_emb>` of the response; both are L2-normalised.

```
{suffix}
```"""


_BLANK = """\
A text without a picture was given a white one in training, and sentence-transformers adds none: give it, as in
`model.encode([{"image": PIL.Image.new("RGB", (28, 28), "white"), "text": text}])`. `umer1 encode` does so by itself."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a card is about."""

    name: str  # as users will load it: a hub id, or a directory's name
    config: Qwen2VLConfig
    dtype: str  # of the weights
    base_model: str | None = None  # a hub id
    license: str | None = None  # the hub's word for it
    run: TrainingRun | None = None
    results: list[Results] = field(default_factory=list)


def model_card(subject: Subject, blank_image_for_text: bool = False) -> str:
    """README.md as text: YAML front matter as the hub reads it, then Markdown.

    blank_image_for_text: whether the model was trained to see a white picture where an input has none.
    """
    front = yaml.safe_dump(metadata(subject), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {subject.name}", _what(subject), "## Use"]
    parts.append(_USE.format(model=subject.name, suffix=SUFFIX))
    if blank_image_for_text:
        parts.append(_BLANK)
    if subject.run is not None:
        parts += ["## Training", *_training(subject.run)]
    if subject.results:
        benchmarks = dict.fromkeys(results.benchmark for results in subject.results)
        parts += ["## Scores", *(part for name in benchmarks for part in _scores(name, subject.results))]
    return "\n\n".join([*parts, "## Versions", *_versions(subject.run)]) + "\n"


def metadata(subject: Subject) -> dict[str, Any]:
    """The front matter."""
    found: dict[str, Any] = {"library_name": "sentence-transformers", "pipeline_tag": "feature-extraction"}
    if subject.license:
        found["license"] = subject.license
    if subject.base_model:
        found["base_model"] = subject.base_model
    found["tags"] = ["sentence-transformers", "feature-extraction", "multimodal", "embeddings", "qwen2_vl", "umer1"]
    scored = [
        _result(results.benchmark, score)
        for results in subject.results
        for score in results.scores
        if score.queries is not None and score.way != "oracle"  # nobody can use a model that way
    ]
    if scored:
        found["model-index"] = [{"name": subject.name, "results": scored}]
    return found


def _result(benchmark: str, score: Score) -> dict[str, Any]:
    return {
        "task": {"type": "retrieval", "name": f"{score.task}, {score.way}"},
        "dataset": {"type": benchmark, "name": f"{benchmark} {score.task}"},
        "metrics": [{"type": score.metric, "value": round(score.value, 2), "name": f"{score.metric} ({score.way})"}],
    }


def _what(subject: Subject) -> str:
    config = subject.config
    parameters = sum(math.prod(shape) for shape in hf_shapes(config).values())
    return (
        f"Embeds text, images, videos and any combination of them as {config.hidden_size} numbers. A Qwen2-VL model of "
        f"{parameters / 1e6:,.1f} M parameters ({config.num_layers} layers, {subject.dtype}) with the two tokens "
        "`<disc_emb>` and `<gen_emb>` of UME-R1 (arXiv 2511.00405), at whose states the two kinds of embedding are "
        "read."
    )


def _training(run: TrainingRun) -> list[str]:
    model, checkpoint, data = (run.config.get(name, {}) for name in ("model", "checkpoint", "data"))
    start = model.get("hf_model") or checkpoint.get("load")
    origin = Path(start).name if start else "the built-in mini model"
    if run.step is None:
        parts = [f"{run.stage}, started from {origin}; how many steps were done was not recorded."]
    else:
        seen = run.step * data["global_batch_size"]
        steps = f"{run.step:,} step{'' if run.step == 1 else 's'}"
        parts = [f"{run.stage}, {steps} ({seen:,} pairs), started from {origin}."]
    if run.pairs:
        rows = [(name or "(unnamed)", f"{count:,}") for name, count in sorted(run.pairs.items())]
        parts.append(_table(("data set", "pairs"), [*rows, ("all", f"{sum(run.pairs.values()):,}")]))
    settings = [("data_path", _data_path(data.get("data_path")))]
    settings += [(name, run.config.get(section, {}).get(name)) for section, names in _RECIPE.items() for name in names]
    rewards = run.config.get("reward", {}).get("rewards", [])
    settings.append(("rewards", ", ".join(f"{term['weight']:g} {term['name']}" for term in rewards) or None))
    rows = [(name, f"`{value}`") for name, value in settings if value is not None]
    parts.append(_table(("setting", "value"), rows))
    last = [(name, f"{run.last[name]:.4g}") for name in ("loss", "reward", "grad_norm") if run.last.get(name)]
    if last:
        parts.append(_table(("last step", "value"), last))
    return parts


def _data_path(value: Any) -> str | None:
    """The files' names, weights before them where there are any, without their folders."""
    words = value if isinstance(value, list) else [] if value is None else [value]
    return " ".join(Path(str(word)).name for word in words) or None


def _scores(benchmark: str, all_results: list[Results]) -> list[str]:
    """Tasks down, ways of scoring across, per cent; then what has to be known beside the numbers."""
    results = [found for found in all_results if found.benchmark == benchmark]
    cells = {(score.task, score.metric, score.way): score for found in results for score in found.scores}
    ways = list(dict.fromkeys(way for _, _, way in cells))
    rows = []
    for task, metric in dict.fromkeys((task, metric) for task, metric, _ in cells):
        scores = [cells.get((task, metric, way)) for way in ways]
        queries = next(score.queries for score in scores if score is not None)
        values = ["" if score is None else f"{score.value:.1f}" for score in scores]
        rows.append((task, metric, "" if queries is None else f"{queries:,}", *values))
    known = [f"weights with the SHA-256 `{found.sha256}`" for found in results if found.sha256 is not None]
    weights = known[0] if known else "weights that the results do not name"
    notes = "\n".join(dict.fromkeys(f"- {note}" for found in results for note in found.notes))
    table = _table(("task", "metric", "queries", *ways), rows)
    return [f"{benchmark}, per cent, of {weights}:", table, *([notes] if notes else [])]


def _versions(run: TrainingRun | None) -> list[str]:
    used = run.versions if run is not None else []
    tables = [_table((f"training from step {step:,}", "version"), list(found.items())) for step, found in used]
    return [*tables, _table(("export", "version"), list(versions().items()))]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """A data set may be called anything."""
    return " ".join(text.splitlines()).replace("|", "\\|")
