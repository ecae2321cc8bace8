"""A tiny model, prompts of every kind, and plain transformers beside it: the ground of the vLLM tests."""

from pathlib import Path

import numpy as np
import torch
from inference_cases import INPUTS, reference_model, vision_arguments, write_inputs
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.images import ImageConfig
from umer1.data.media import MediaRoot
from umer1.data.processor import Processor
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weight_table import hf_shapes, hub_name
from umer1.rl.config import RolloutConfig
from umer1.rl.engines.vllm_engine import VLLMEngine
from umer1.rl.types import Request, Sampling
from umer1.training.policy_batches import teacher_forced

LENGTH = 24


class VLLMWorld:
    """A tiny model in transformers, and the requests."""

    def __init__(self, root: Path, *, tied: bool = True):
        self.directory = HFDirectory.open(make_tiny_directory(root / "model", hidden=128, tied=tied))
        opened = self.directory
        config = ImageConfig.of_directory(opened)
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
        self.root = root

    def engine(self, config: RolloutConfig | None = None, **settings) -> VLLMEngine:
        """A client, with a child of its own unless `server` is given."""
        return VLLMEngine(
            config or RolloutConfig(),
            self.directory,
            dtype=torch.float32,
            max_model_len=1024,
            rank=0,
            local_rank=0,
            log_path=self.root / "engine.log",
            **settings,
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
    def logits(self, request: Request, response: list[int]) -> torch.Tensor:
        """transformers' logits [len(response), vocabulary] before each token of a response, teacher-forced."""
        prompt = request.prompt.sequence
        ids = torch.cat([prompt.input_ids, torch.tensor(response)])[None]
        kinds = (ids == self.model.config.image_token_id).int() + 2 * (ids == self.model.config.video_token_id).int()
        extra = vision_arguments(prompt, self.model.config.video_token_id)
        extra |= {"mm_token_type_ids": kinds} if extra else {}
        # transformers 5 places text after a long video elsewhere than vLLM and the releases that trained the weights
        _, positions = teacher_forced(prompt, response)
        extra |= {"position_ids": positions[:, None]}
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
        return logits[len(prompt) - 1 : -1].double()

    def logprobs(self, request: Request, response: list[int], temperature: float) -> np.ndarray:
        """transformers' log-probs of a response."""
        scores = (self.logits(request, response) / temperature).log_softmax(-1)
        return scores.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()

    def likeliest(self, request: Request, response: list[int]) -> list[int]:
        """The likeliest token at every place of a response."""
        return self.logits(request, response).argmax(-1).tolist()

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
