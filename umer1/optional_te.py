"""A Transformer Engine that is installed and does not load counts as absent, for megatron-core too.

megatron-core does without it wherever its import raises ImportError.  But a missing cuDNN is an OSError, wheels of
different versions are an AssertionError or a RuntimeError, and the package can be imported without its half for torch:
each would end the program inside megatron-core's own imports.
"""

import importlib
import sys

PACKAGE = "transformer_engine"
_FIX = (
    "build it for this torch, with nvcc and cuDNN: pip install --no-build-isolation transformer-engine[pytorch] "
    "(docker/Dockerfile has one that fits); umer1 doctor tries it"
)
_fault: str | None = None


def load_fault() -> str | None:
    """Why the package cannot be imported, with the fix where it is there, or None.  Imports it.

    One that does not load is marked in sys.modules, so that whoever imports it from then on gets an ImportError.
    """
    global _fault
    if sys.modules.get(PACKAGE, ...) is None:
        return _fault or f"{PACKAGE} is switched off in this process"
    try:
        importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name == PACKAGE:
            return str(error)
        _mark(error)
    except Exception as error:
        _mark(error)
    else:
        try:
            importlib.import_module(f"{PACKAGE}.pytorch")
        except Exception as error:
            _mark(error)
        else:
            return None
    return _fault


def _mark(error: Exception) -> None:
    global _fault
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    _fault = f"{PACKAGE} is installed and does not load ({cause}); {_FIX}"
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    sys.modules[PACKAGE] = None
