"""umer1: training models that reason before they embed (UME-R1 on Qwen2-VL, built on megatron-core)."""

import os
import warnings

from umer1.optional_te import guard_transformer_engine

__version__ = "0.1.0"

# Transformer Engine, Apex and a GPU are optional here, and megatron-core warns about each at every import; it also
# calls some collectives by names that torch will change.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)

guard_transformer_engine()

# Megatron-core wraps small functions in torch.compile when it is imported.  Without a GPU that gains nothing and costs
# seconds at every start and at the first step; the switch has to be set before torch is first imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
