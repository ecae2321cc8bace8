#!/bin/sh
# Make .venv with tested versions and umer1 in it; run by `make`, done once.
# A Python whose torch already sees a GPU keeps that torch; elsewhere the pinned build of requirements/ is installed.
set -eu
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "umer1 needs Python 3.11, 3.12 or 3.13; this is $("$python" --version). Try: make PYTHON=python3.12 quickstart" >&2
    exit 1
}
if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "[setup 1/3] a torch with a GPU was found: it is kept"
    "$python" -m venv --system-site-packages .venv
    wanted=requirements/cuda.txt
else
    echo "[setup 1/3] installing torch (CPU; about a minute)"
    "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements/cpu.txt)"
    wanted=requirements/cpu.txt
fi
echo "[setup 2/3] installing megatron-core, transformers and the rest ($wanted)"
.venv/bin/pip install --quiet --disable-pip-version-check -r "$wanted"
echo "[setup 3/3] installing umer1"
.venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
touch .venv/ready
