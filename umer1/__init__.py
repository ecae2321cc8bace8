"""umer1: training models that reason before they embed (UME-R1 on Qwen2-VL, built on megatron-core)."""

import warnings

__version__ = "0.1.0"

# Transformer Engine, Apex and a GPU are optional here, and megatron-core warns about each at every import.
warnings.filterwarnings("ignore", module=r"megatron\.core")
