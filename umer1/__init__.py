"""umer1: training models that reason before they embed (UME-R1 on Qwen2-VL, built on megatron-core)."""

__version__ = "0.1.0"
