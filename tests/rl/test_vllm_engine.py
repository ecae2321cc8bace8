"""The real vLLM on the CPU, in its process, against plain transformers in fp32."""

import time

import pytest

pytest.importorskip("vllm")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from inference_cases import INPUTS, reference_model, vision_arguments, write_inputs  # noqa: E402
from tiny_qwen2_vl import make_tiny_directory  # noqa: E402

from umer1.data.images import ImageConfig  # noqa: E402
from umer1.data.media import MediaRoot  # noqa: E402
from umer1.data.processor import Processor  # noqa: E402
from umer1.models.qwen2_vl.directory import HFDirectory  # noqa: E402
from umer1.models.qwen2_vl.weight_table import hf_shapes, hub_name  # noqa: E402
from umer1.rl.checksum import checksum  # noqa: E402
from umer1.rl.config import RolloutConfig  # noqa: E402
from umer1.rl.engines.vllm_engine import VLLMEngine  # noqa: E402
from umer1.rl.types import EngineDied, Interrupted, Request, Sampling  # noqa: E402

LENGTH = 24


class World:
    """A tiny model, prompts of every kind, and one engine for all tests of this file."""

    def __init__(self, root):
        self.directory = HFDirectory.open(make_tiny_directory(root / "model", hidden=128))
        opened = self.directory
        config = ImageConfig.from_settings(opened.config.vision, opened.image_settings, opened.video_settings)
        processor = Processor(opened.tokenizer, opened.special, opened.config, config)
        write_inputs(root)
        self.requests = []
        for item in INPUTS:
            images = item.get("image", [])
            images = [images] if isinstance(images, str) else images
            videos = [item["video"]] if "video" in item else []
            prompt = processor.encode_rollout_prompt(item["text"], images, videos, MediaRoot(root))
            self.requests.append(Request(item["id"], prompt))
        self.model = reference_model(root / "model")
        with torch.no_grad():  # a flat distribution hides mistakes
            self.model.get_input_embeddings().weight.mul_(3.0)
        self.log = root / "engine.log"
        self.engine = VLLMEngine(
            RolloutConfig(), opened, dtype=torch.float32, max_model_len=512, rank=0, local_rank=0, log_path=self.log
        )

    def sampling(self, **changes) -> Sampling:
        settings = dict(num_generations=4, max_completion_length=LENGTH, temperature=1.0, seed=1)
        settings["stop_ids"] = (self.directory.special.im_end,)
        return Sampling(**(settings | changes))

    def weights(self):
        for name, tensor in self.model.state_dict().items():
            if hub_name(name) in hf_shapes(self.directory.config):
                yield hub_name(name), tensor

    @torch.no_grad()
    def change(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def logprobs(self, request: Request, response: list[int], temperature: float) -> np.ndarray:
        """transformers' log-probs of a response, teacher-forced."""
        prompt = request.prompt.sequence
        ids = torch.cat([prompt.input_ids, torch.tensor(response)])[None]
        kinds = (ids == self.model.config.image_token_id).int() + 2 * (ids == self.model.config.video_token_id).int()
        extra = vision_arguments(prompt, self.model.config.video_token_id)
        extra |= {"mm_token_type_ids": kinds} if extra else {}
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0].double()
        scores = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        return scores.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()

    def worst(self, answers, temperature: float = 1.0) -> dict[str, float]:
        """Largest difference of log-probs for every prompt."""
        special = self.directory.special
        pads = {special.image_pad, special.video_pad}  # transformers takes sampled ones for pictures
        found = {}
        for request, completions in zip(self.requests, answers, strict=True):
            usable = [each for each in completions if not pads & set(each.token_ids)]
            assert usable
            found[request.key] = max(
                np.abs(self.logprobs(request, each.token_ids, temperature) - each.logprobs).max() for each in usable
            )
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("vllm"))
    yield made
    made.engine.close()


def never() -> bool:
    return False


def test_log_probs_are_those_of_transformers(world):
    """After three updates, with the same pictures and long texts each time: nothing stale, nothing missing."""
    for step in range(6):
        world.change(step)
        sums = world.engine.load_weights(world.weights())
        assert {name: value for name, value in sums.items() if not name.startswith("engine:")} == {
            name: checksum(tensor) for name, tensor in world.weights()
        }
        answers = world.engine.generate(world.requests, world.sampling(seed=step), never)
        print(world.worst(answers))
        assert max(world.worst(answers).values()) < 1e-4
