"""Loaded by every Python of the vLLM process (this folder is on its PYTHONPATH), before anything else is.

With a torch that has no GPU support, torchvision's compiled part cannot load: it is built for CUDA.  Its Python part,
all that the image processors use, works once the two operators it registers fakes for are declared.  torchaudio and
torchcodec, which vLLM's CPU build asks for and no rollout uses, fail at import in the same way and break transformers
with them, so there they count as not installed.
"""

import importlib.machinery
import importlib.metadata
import sys

_HIDDEN = ("torchaudio", "torchcodec")
_libraries = []  # declared operators last as long as the object that declared them


def _cpu_torch():
    """From the version alone: importing torch here would slow down every small helper process."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _declare_operators():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


class _PathFinder(importlib.machinery.PathFinder):
    """The usual finder, less what is hidden; torchvision's operators are declared when it is imported."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname in _HIDDEN:
            return None
        spec = super().find_spec(fullname, path, target)
        if fullname == "torchvision" and spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def declare_and_run(module):
                _declare_operators()
                run(module)

            spec.loader.exec_module = declare_and_run
        return spec


if _cpu_torch():
    sys.meta_path[:] = [_PathFinder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
