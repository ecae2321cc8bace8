"""`umer1 serve-rollouts`: a vLLM engine that trainers on this or other machines reach over TCP.

    umer1 serve-rollouts --model DIR --port 7000
    torchrun ... examples/grpo.py --rollout-server 127.0.0.1:7000

DIR gives config and tokenizer; weights come from the trainer before every step.  Beyond this machine's own addresses
the server wants a secret, the same on both sides, in the environment variable UMER1_ROLLOUT_TOKEN.  The secret itself
is never sent, but what is sent is not encrypted: use a network that you trust, or a tunnel.
"""

import ipaddress
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from umer1 import device
from umer1.configuration import help_text, load_config
from umer1.data.images import ImageConfig
from umer1.errors import UserError
from umer1.files import write_json
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.engines.vllm_assets import check_head_size, dtype_name, save_engine_assets
from umer1.rl.engines.vllm_process import server_command, start
from umer1.rl.engines.vllm_remote import TOKEN_VARIABLE, model_description, token
from umer1.rules import bound_problems


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """What is served, and where"""

    model: str | None = None
    """Hugging Face directory of the model that will be trained; its weights are not read."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a secret in UMER1_ROLLOUT_TOKEN."""
    port: int = 7000
    """Port to listen on; 0 takes a free one, which is printed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The trainer's dtype; auto: bfloat16 on a GPU, float32 on the CPU."""
    max_model_len: int = 4096
    """Most tokens of prompt and response together; the trainer's need must not be larger."""
    max_sequences: int = 256
    """Most responses worked on at once."""
    tensor_parallel_size: int = 1
    """GPUs that the layers are cut over."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that vLLM may take."""

    def violations(self) -> list[str]:
        found = [] if self.model else ["--model is required"]
        found += bound_problems(self, 1, "max_model_len", "max_sequences", "tensor_parallel_size")
        if not 0 <= self.port < 65536:
            found.append(f"port={self.port} must be 0 to 65535")
        if not 0 < self.gpu_memory_utilization <= 1:
            found.append(f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and at most 1")
        if not is_loopback(self.host) and not token():
            found.append(
                f"host={self.host}: set a secret in {TOKEN_VARIABLE}, here and where the trainer runs, for an address "
                "that other machines reach; 127.0.0.1 needs none"
            )
        return found


@dataclass(kw_only=True, slots=True)
class ServeCommand:
    """The command's configuration"""

    serve: ServeConfig = field(default_factory=ServeConfig)

    def violations(self) -> list[str]:
        return self.serve.violations()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str]) -> None:
    """The command: runs until it is interrupted or the engine ends."""
    if {"-h", "--help"} & set(argv):
        print(help_text(ServeCommand, __doc__))
        return
    config = load_config(ServeCommand, argv).serve
    directory = HFDirectory.open(config.model, weights=False)
    check_head_size(directory.config)
    dtype = device.default_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
    images = ImageConfig.of_directory(directory)
    with tempfile.TemporaryDirectory(prefix="umer1-vllm-") as folder, bound_socket(config) as listener:
        model, settings = Path(folder) / "model", Path(folder) / "settings.json"
        save_engine_assets(directory, images, model, dtype=dtype_name(dtype), max_tokens=config.max_model_len)
        write_json(
            settings,
            dict(
                model=str(model),
                dtype=dtype_name(dtype),
                max_model_len=config.max_model_len,
                max_sequences=config.max_sequences,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                description=model_description(directory.config),
            ),
        )
        _run(start(server_command("--listen", listener, str(settings)), listener))


def bound_socket(config: ServeConfig) -> socket.socket:
    """Bound now, so that a wrong address is said at once; listening begins when the engine stands."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from None
    return listener


def _run(process: subprocess.Popen) -> None:
    """Until the engine ends; SIGTERM and Ctrl-C end it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        status = process.wait()
        raise UserError(f"the engine ended with status {status}; its messages are above")
    except KeyboardInterrupt:
        pass
    finally:
        process.kill()
        process.wait()
