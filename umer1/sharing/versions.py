"""Which versions of what a model was made with."""

import importlib.metadata
import subprocess
from pathlib import Path

from umer1 import __version__

_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers")


def versions() -> dict[str, str]:
    """Package -> version, umer1's with the commit where there is one; what is not installed is left out."""
    commit = _commit()
    found = {"umer1": __version__ if commit is None else f"{__version__}, commit {commit}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that this code is part of, with -dirty where files differ from it; None where it was
    installed otherwise."""
    here = Path(__file__)
    # ls-files: a virtual environment may lie in a checkout of something else; --exclude: the hash, whatever tags say
    described = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    for words in (("ls-files", "--error-unmatch", here.name), described):
        try:
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
