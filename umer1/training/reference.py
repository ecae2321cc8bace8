"""The frozen model that GRPO's KL penalty is measured against: the weights that the run started from.

Its weights lie beside the policy's on the same ranks, in the policy's precision (bf16 on GPUs) and, while not used, in
host memory.  For its forward they change places with the policy's; the module, its layout and its kernels are the same.
`SAVE/reference` holds them as a Hugging Face directory, written once, so that a resumed run has the same reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from umer1.device import pinned
from umer1.distributed.parallel import ParallelState
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import agree, load_hf, save_hf, unwrap

FOLDER = "reference"


class Reference:
    """Made from the models as they are; every method is collective."""

    def __init__(self, models: list[torch.nn.Module]):
        self.models = models
        self.kept = [_to_host(parameter) for parameter in self._parameters()]

    def _parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that training moves; the others are the same in both."""
        return [p for model in self.models for p in model.parameters() if p.requires_grad]

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The models have the reference's weights inside the block, and exactly their own after it."""
        parameters = self._parameters()
        own = [parameter.detach().clone() for parameter in parameters]
        for parameter, kept in zip(parameters, self.kept, strict=True):
            parameter.copy_(kept, non_blocking=True)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)

    def save(self, save: str, assets: HFDirectory, state: ParallelState) -> None:
        """Write the models' weights, which must still be the reference's, to SAVE/reference; complete or not at all."""
        save_hf([unwrap(model) for model in self.models], assets, Path(save) / FOLDER, state)


@torch.no_grad()
def read_reference(models: list[torch.nn.Module], places: list[str | None], state: ParallelState) -> Reference:
    """The reference of a resumed run, from the first of `places` (save directories) that has one.

    The models' weights are as before afterwards.  Raises UserError on every rank when there is none.
    """
    found = [Path(place) / FOLDER for place in places if place and (Path(place) / FOLDER).is_dir()]
    agree(None if found else _missing(places), state)
    parameters = [parameter for model in models for parameter in model.parameters()]
    own = [parameter.detach().clone() for parameter in parameters]
    load_hf([unwrap(model) for model in models], HFDirectory.open(found[0]), state)
    reference = Reference(models)
    for parameter, value in zip(parameters, own, strict=True):
        parameter.copy_(value)
    return reference


def _missing(places: list[str | None]) -> str:
    where = " or ".join(str(Path(place) / FOLDER) for place in places if place)
    return (
        f"the run cannot go on without its reference model, which is not in {where}; put it back, or start a new run "
        "with another --save (or --beta 0, which needs none)"
    )


def _to_host(parameter: torch.nn.Parameter) -> torch.Tensor:
    return pinned(parameter.detach().to("cpu", copy=True))
