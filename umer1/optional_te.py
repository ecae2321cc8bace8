"""A Transformer Engine that is installed and does not load counts as absent, for megatron-core too.

megatron-core does without it wherever its import raises ImportError.  But a missing cuDNN is an OSError, wheels of
different versions are an AssertionError or a RuntimeError, and the package can be imported without its half for torch:
each would end the program inside megatron-core's own imports.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGE = "transformer_engine"
_FIX = (
    "build it for this torch, with nvcc and cuDNN: pip install --no-build-isolation transformer-engine[pytorch] "
    "(docker/Dockerfile has one that fits); umer1 doctor tries it"
)


class _Guard(MetaPathFinder):
    """Finds the package as Python does; what goes wrong in its first import is an ImportError, and stays one."""

    fault: str | None = None

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(self, spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, guard: _Guard, own: Loader):
        self.guard, self.own = guard, own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.guard.fault:  # megatron-core's modules ask one after the other
            raise ModuleNotFoundError(self.guard.fault, name=PACKAGE)
        module.__loader__ = module.__spec__.loader = self.own  # nobody behind this sees the guard
        try:
            self.own.exec_module(module)
            importlib.import_module(f"{PACKAGE}.pytorch")
        except Exception as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.guard.fault = f"{PACKAGE} is installed and does not load ({cause}); {_FIX}"
            raise ModuleNotFoundError(self.guard.fault, name=PACKAGE) from error


_guard = _Guard()


def guard_transformer_engine() -> None:
    """From here on a broken package is an absent one; to be called before megatron-core is first imported."""
    if _guard not in sys.meta_path:
        sys.meta_path.insert(0, _guard)


def load_fault() -> str | None:
    """Why the package cannot be imported, with the fix where it is there, or None.  Imports it."""
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")
    except ImportError as error:
        return _guard.fault or str(error)
    return None
