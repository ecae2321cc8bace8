"""examples/grpo.py with a fault between trainer and vLLM: what the checks between them are there for.

    torchrun ... tests/broken_sync.py noise|once|pictures [flags of examples/grpo.py]

noise: other weights are streamed than the trainer's.  once: after the first update weights stay as they are.
pictures: the engine gets smaller pictures than the trainer.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

from umer1.rl import weight_sync
from umer1.rl.engines import vllm_engine


def stream_noise():
    stream = weight_sync.stream_hf

    def noise(models, state):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in stream(models, state):
            yield name, 0.1 * torch.randn(tensor.shape, generator=generator)

    weight_sync.stream_hf = noise


def sync_once():
    whole, calls = weight_sync.WeightSync.__call__, []

    def first(self, models):
        calls.append(1)
        return whole(self, models) if len(calls) == 1 else 0.0

    weight_sync.WeightSync.__call__ = first


def shrink_pictures():
    message = vllm_engine.prompt_message

    def smaller(request, special):
        images = tuple(image[: image.shape[0] // 2] for image in request.prompt.images)
        return message(replace(request, prompt=replace(request.prompt, images=images)), special)

    vllm_engine.prompt_message = smaller


if __name__ == "__main__":
    {"noise": stream_noise, "once": sync_once, "pictures": shrink_pictures}[sys.argv.pop(1)]()
    program = Path(__file__).resolve().parents[1] / "examples" / "grpo.py"
    sys.argv[0] = str(program)
    runpy.run_path(str(program), run_name="__main__")
