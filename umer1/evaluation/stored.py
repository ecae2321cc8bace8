"""What a model made of a benchmark, kept on disk: every mode is scored again from it without the model.

One `TASK.npz` per task, plain arrays and no Python objects (texts are arrays of characters), written whole or not at
all.  Embeddings keep their bits, so that scores from a file equal those of the run that wrote it.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np

from umer1.data.arrays import read_arrays
from umer1.errors import UserError
from umer1.evaluation.modes import AdaptiveTiming, GenOutputs, ModeEmbeddings, TaskOutputs
from umer1.files import atomic_path

FORMAT = 1  # of the file; one that says otherwise is refused
_GROUPS = "groups/"
_TEXTS = ("texts", "sample_texts")
_NUMBERS = ("seconds_per_query",)


def arrays_path(directory: str | Path, task: str) -> Path:
    """Where an evaluation that writes to `directory` keeps a task."""
    return Path(directory) / "arrays" / f"{task}.npz"


def save_outputs(outputs: TaskOutputs, path: str | Path) -> None:
    """Write one task's outputs to `path` (.npz)."""
    arrays = {
        "format": np.array(FORMAT),
        "metric": np.array(outputs.metric),
        "labels": outputs.labels,
        "disc_seconds_per_query": np.array(outputs.disc_seconds_per_query),
        "disc/queries": outputs.disc.queries,
        "disc/candidates": outputs.disc.candidates,
    }
    arrays |= {_GROUPS + split: np.array(names, dtype=np.str_) for split, names in outputs.groups.items()}
    if outputs.timing is not None:
        arrays["timing/reasoned"] = outputs.timing.reasoned
        arrays["timing/seconds_per_query"] = np.array(outputs.timing.seconds_per_query)
    if outputs.gen is not None:
        gen = {field.name: getattr(outputs.gen, field.name) for field in fields(GenOutputs)}
        embeddings = gen.pop("embeddings")
        gen |= {"queries": embeddings.queries, "candidates": embeddings.candidates}
        gen["texts"] = np.array(gen["texts"], dtype=np.str_)
        # without samples the list is [Q][0], which says nothing of its type
        gen["sample_texts"] = np.array(gen["sample_texts"], dtype=np.str_).reshape(gen["samples"].shape[:2])
        arrays |= {f"gen/{name}": np.asarray(value) for name, value in gen.items()}
    with atomic_path(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def load_outputs(path: str | Path) -> TaskOutputs:
    """The outputs that `save_outputs` wrote; UserError naming the file where it is damaged or of another format."""
    try:
        arrays = read_arrays(path)
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"format {arrays['format']}, this version reads {FORMAT}")
        return _outputs(arrays)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not the stored outputs of a task ({error}); run the evaluation again") from None


def _outputs(arrays: dict[str, np.ndarray]) -> TaskOutputs:
    def embeddings(mode: str) -> ModeEmbeddings:
        return ModeEmbeddings(arrays[f"{mode}/queries"], arrays[f"{mode}/candidates"])

    gen = None
    if "gen/queries" in arrays:
        values = {field.name: arrays[f"gen/{field.name}"] for field in fields(GenOutputs) if field.name != "embeddings"}
        values |= {name: values[name].tolist() for name in _TEXTS}
        values |= {name: float(values[name]) for name in _NUMBERS}
        gen = GenOutputs(embeddings=embeddings("gen"), **values)
    timing = None
    if "timing/reasoned" in arrays:
        timing = AdaptiveTiming(arrays["timing/reasoned"], float(arrays["timing/seconds_per_query"]))
    return TaskOutputs(
        metric=str(arrays["metric"]),
        labels=arrays["labels"],
        disc=embeddings("disc"),
        disc_seconds_per_query=float(arrays["disc_seconds_per_query"]),
        gen=gen,
        timing=timing,
        groups={name.removeprefix(_GROUPS): arrays[name].tolist() for name in arrays if name.startswith(_GROUPS)},
    )
