"""A run without data: a model, its optimizer and a Checkpointer, and disks that fail in each way."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from umer1.distributed.parallel import ParallelConfig
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.checkpoint import CheckpointConfig, Checkpointer
from umer1.training.optimizer import OptimizerConfig, build_optimizer

NOBODY = 65534


class Run:
    """A model, its optimizer and a Checkpointer on this rank."""

    def __init__(self, path, state, *, parallel=None, train_vision=False, lr=0.01, fp32=True, **config):
        parallel = parallel or ParallelConfig()
        directory = HFDirectory.open(path)
        settings = ModelConfig(fp32=fp32, bf16=not fp32, train_vision=train_vision)
        self.models = build_training_model(settings, parallel, directory, state)
        self.optimizer, self.scheduler = build_optimizer(
            OptimizerConfig(lr=lr, lr_warmup_iters=0, lr_decay_style="constant"),
            self.models,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        )
        self.checkpointer = Checkpointer(CheckpointConfig(**config), state, directory)

    def fill(self, value):
        with torch.no_grad():
            for parameter in self.models[0].parameters():
                parameter.fill_(value)

    def step(self):
        """An optimizer step along gradients that are the weights."""
        for model in self.models:
            model.zero_grad_buffer()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(parameter.detach())
        self.optimizer.step()
        self.scheduler.step(1)

    def save(self, iteration, *, last=False):
        self.checkpointer.save(
            iteration, self.models, self.optimizer, self.scheduler, {"iteration": iteration}, last=last
        )

    def load(self):
        return self.checkpointer.load(self.models, self.optimizer, self.scheduler)

    def weight(self):
        return float(self.models[0].module.decoder.final_layernorm.weight[0].detach())


@contextmanager
def full_disk() -> Iterator[None]:
    """Files of this process end at 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_permission(folder) -> Iterator[None]:
    """Nothing can be made in `folder` by this process."""
    mode, root = os.stat(folder).st_mode, os.geteuid() == 0
    os.chmod(folder, 0o555)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chmod(folder, mode)


def mount_disk(folder, options="rw") -> bool:
    """An empty file system at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0


def unmount(folder) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options) -> None:
    """Change a mounted file system: ro, size=..."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextmanager
def read_only(disk) -> Iterator[None]:
    """Nothing can be written to a disk from `mount_disk`."""
    remount(disk, "ro")
    try:
        yield
    finally:
        remount(disk, "rw")
