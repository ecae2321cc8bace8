"""docs/method.md, 5 in plain transformers and torch fp64, with nothing of umer1 in it: the truth of the GRPO tests.

The rollouts are given, in the form of SAVE/rollouts/iter_NNNNNNN.jsonl; rewards, advantages, loss and AdamW steps
follow from them, one response at a time, no padding, no packing.  Also writes the small RL files that the tests train
on, and rollouts for them, because a random model writes nothing that has a reward.
"""

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sft_reference import SUFFIX, WORDS, Reference

SIDES = ("query", "positive")
FORMAT = re.compile(r"<think>.*?</think>.*?<answer>.*?<gen_emb>", re.DOTALL)


def write_rl_pairs(root: Path, count: int = 8, *, seed: int = 0) -> Path:
    """`root/rl.json` and its pictures: text only, one image, two images and a video of four frames, by turns."""
    rng = np.random.default_rng(seed)
    (root / "media").mkdir(parents=True, exist_ok=True)

    def picture(width: int, height: int) -> str:
        name = f"media/rl{len(list((root / 'media').iterdir()))}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
        return name

    def side(name: str, kind: int) -> dict:
        image: str | list[str] = ""
        video = [""]
        if kind == 1:
            image = picture(56, 84)
        elif kind == 2:
            image = [picture(84, 56), picture(28, 112)]
        elif kind == 3:
            video = [picture(56, 56) for _ in range(4)]
        text = " ".join(rng.choice(WORDS, int(rng.integers(2, 6))))
        return {f"{name}_text": text, f"{name}_image": image, f"{name}_video": video}

    records = [
        {
            "dataset": "toy",
            "dataset_name": "toy",
            **side("qry", index % 4),
            **side("pos", (index + 1) % 4),
            "solution": "",
        }
        for index in range(count)
    ]
    path = root / "rl.json"
    path.write_text(json.dumps(records))
    return path


def write_fixed_rollouts(
    directory: Path, data: Path, path: Path, *, num_generations: int, faults: bool = True, noise: float = 0.05
) -> Path:
    """Responses to all pairs of `data` as a rollouts file: well-formed ones of several lengths and, with `faults`, by
    turns one without `<think>`, one that starts with other words, one cut off before `<gen_emb>`, one with vision pads
    and two embedding tokens, and one that failed.  Engine log-probs are the model's own with Gaussian `noise`.
    """
    rng = np.random.default_rng(1)
    policy = Policy(directory)
    lines = []
    for slot, record in enumerate(json.loads(data.read_text())):
        for number, side in enumerate(SIDES):
            prompt = policy.prompt_of(data.parent, record, number)
            completions = []
            for generation in range(num_generations):
                kind = (slot + 3 * number + generation) % 12 if faults else 99
                thoughts, answer = (" ".join(rng.choice(WORDS, int(rng.integers(low, 9)))) for low in (2, 1))
                text, end = f"<think>{thoughts}</think><answer>{answer}<gen_emb>", "<|im_end|>"
                if kind == 0:
                    text = f"{thoughts}<answer>{answer}<gen_emb>"
                elif kind == 4:
                    text = f"{answer} {text}"
                elif kind in (1, 5):
                    text, end = f"<think>{thoughts}</think><answer>{answer}", ""
                elif kind == 2:
                    text = f"<think><gen_emb>{thoughts}<|image_pad|><|video_pad|></think><answer><gen_emb>{answer}"
                elif kind == 3:
                    completions.append({"status": "failed", "finish_reason": None, "token_ids": [], "logprobs": []})
                    continue
                ids = policy.tokenizer(text + end, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logprobs = policy.respond(policy.read(prompt), ids, 1.0)[0]
                engine = (logprobs + noise * torch.from_numpy(rng.normal(size=len(ids)))).clamp(max=-1e-4)
                completions.append(
                    {
                        "status": "ok" if policy.id("<gen_emb>") in ids else "missing_gen_emb",
                        "finish_reason": "stop" if end else "length",
                        "token_ids": ids,
                        "logprobs": engine.tolist(),
                    }
                )
            lines.append({"iteration": 1, "slot": slot, "index": slot, "side": side, "completions": completions})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@dataclass(kw_only=True)
class Settings:
    """the paper's names; one AdamW step per rollouts file, inner epoch and mini-batch."""

    lr: float
    clip: float = 1.0
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon
    beta: float = 0.04
    loss_normalisation: str = "response"
    max_completion_length: int = 64
    temperature: float = 1.0
    comparison_pairs: int | None = None  # None: all pairs of a file
    inner_epochs: int = 1
    mini_batches: list[list[int]] | None = None  # places of the pairs of each optimizer step; None: all in one
    importance_cap: float | None = None  # None: no importance weight
    weights: dict[str, float] = field(default_factory=lambda: {"format": 1.0, "embedding": 1.0})
    train_vision: bool = False


@dataclass
class Step:
    """What one rollouts file led to; tensors fp64 [2 sides, N * G], failed rollouts hold zeros."""

    rewards: dict[str, torch.Tensor]  # format, embedding, ranking, margin
    total: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: list[list[torch.Tensor | None]]  # per side and rollout [L]
    losses: list[float]  # before each update
    grad_norms: list[float]  # before clipping


class Policy(Reference):
    """Log-probs and embeddings of given responses, in fp64."""

    def __init__(self, directory: Path):
        super().__init__(directory, torch.float64)

    def prompt_of(self, root: Path, record: dict, side: int) -> tuple[list[int], dict]:
        """Token ids and pixels of one side: vision blocks first, directly followed by the text."""
        name = ("qry", "pos")[side]
        images, video = record[f"{name}_image"], record[f"{name}_video"]
        images = [path for path in ([images] if isinstance(images, str) else images) if path]
        video = [path for path in video if path]
        markers = "<image>" * len(images) + "<video>" * bool(video)
        human = f"{markers}{record[f'{name}_text'].strip()}\n<disc_emb>\n{SUFFIX}"
        return self.prompt(root, human, images, video)

    def read(self, prompt: tuple[list[int], dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the language model for a prompt of P tokens: embeddings [P, H] and positions [3, P]."""
        ids, inputs = prompt
        row = torch.tensor([ids])
        kinds = self.kinds(row)
        grids = {key: value for key, value in inputs.items() if "grid" in key}
        positions, _ = self.model.model.get_rope_index(row, kinds, **grids)
        embeds = self.model.get_input_embeddings()(row[0])
        for kind, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
            if pixels in inputs:
                features = self.model.model.visual(inputs[pixels], grid_thw=inputs[grid]).pooler_output
                embeds = embeds.masked_scatter((kinds[0] == kind)[:, None], features)
        return embeds, positions[:, 0]

    def respond(
        self, prompt: tuple[torch.Tensor, torch.Tensor], token_ids: list[int], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [L] of the response's tokens after what `read` gave, and its embedding [H] at the last `<gen_emb>`.

        Vision pads that were sampled are tokens like any other: no picture belongs to them.
        """
        embeds, positions = prompt
        length, response = len(embeds), torch.tensor(token_ids)
        later = positions[:, -1:] + 1 + torch.arange(len(token_ids))
        hidden = self.model.model.language_model(
            inputs_embeds=torch.cat([embeds, self.model.get_input_embeddings()(response)])[None],
            position_ids=torch.cat([positions, later], dim=1)[:, None],
            use_cache=False,
        ).last_hidden_state[0]
        logits = self.model.lm_head(hidden[length - 1 : -1]) / temperature
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, response[:, None])[:, 0]
        places = [place for place, token in enumerate(token_ids) if token == self.id("<gen_emb>")]
        return logprobs, F.normalize(hidden[length + places[-1]], dim=0) if places else None


def embedding_reward(
    own: list[torch.Tensor | None], other: list[torch.Tensor | None], row: int, num_generations: int
) -> tuple[float, float, float]:
    """(reward, ranking, margin) of rollout `row` of one side against all of the other; None has no embedding."""
    there = [j for j in range(len(other)) if other[j] is not None]
    positives = {j for j in there if j // num_generations == row // num_generations}
    if own[row] is None or not positives:
        return 0.0, 0.0, 0.0
    similarity = {j: float(own[row] @ other[j]) for j in there}
    best = sorted(there, key=lambda j: (-similarity[j], j))[: len(positives)]
    ranking = len(positives & set(best)) / len(positives)
    negatives = [similarity[j] for j in there if j not in positives]
    margin = sum(similarity[j] for j in positives) / len(positives)
    margin -= sum(negatives) / len(negatives) if negatives else 0.0
    return ranking * margin, ranking, margin


def group_advantages(total: torch.Tensor, there: list[bool], num_generations: int) -> torch.Tensor:
    """[R] of [R]: within each group of rollouts that are there, (R - mean) / (std + 1e-4)."""
    advantages = torch.zeros_like(total)
    for start in range(0, len(total), num_generations):
        rows = [row for row in range(start, start + num_generations) if there[row]]
        if len(rows) > 1:
            group = total[rows]
            spread = ((group - group.mean()).square().sum() / (len(rows) - 1)).sqrt()
            advantages[rows] = (group - group.mean()) / (spread + 1e-4)
    return advantages


def response_loss(
    new: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, advantage: float, engine: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Normalised sum over the tokens of one response: clipped objective and k3 estimate of the KL."""
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1 - settings.epsilon, 1 + high)
    policy = -torch.minimum(ratio * advantage, clipped * advantage)
    if settings.importance_cap is not None:
        policy = policy * torch.exp(old - engine).clamp(max=settings.importance_cap)
    tokens = policy + settings.beta * (torch.exp(ref - new) - (ref - new) - 1)
    count = {"response": len(new), "constant": settings.max_completion_length}[settings.loss_normalisation]
    return tokens.sum() / count


class Trainer:
    """Steps of one policy over rollouts files."""

    def __init__(self, directory: Path, data: Path, settings: Settings):
        self.settings, self.root = settings, data.parent
        self.records = json.loads(data.read_text())
        self.policy = Policy(directory)
        self.frozen = copy.deepcopy(self.policy)
        for name, parameter in self.policy.model.named_parameters():
            fixed = ".visual." in name and ".merger." not in name and not settings.train_vision
            parameter.requires_grad_(not fixed)
        self.trained = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def step(self, rollouts: Path) -> Step:
        """One rollouts file, which must hold all pairs of the step: scored once, then `inner_epochs` updates."""
        sides = read_rollouts(rollouts)
        old, ref, embeddings = self._score(sides)
        rewards, total = self._rewards(sides, embeddings)
        size = len(sides[0][0]["completions"])
        advantages = torch.stack(
            [group_advantages(total[s], [row is not None for row in old[s]], size) for s in range(2)]
        )
        step = Step(rewards, total, advantages, old, [], [])
        parts = self.settings.mini_batches or [list(range(len(sides[0])))]
        for pairs in parts * self.settings.inner_epochs:
            self.optimizer.zero_grad()
            step.losses.append(self._backward(sides, pairs, old, ref, advantages))
            step.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip)))
            self.optimizer.step()
        return step

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors as they are now; names as transformers has them."""
        return {name: value.detach().clone() for name, value in self.policy.model.state_dict().items()}

    def _prompt(self, line: dict, side: int) -> tuple[list[int], dict]:
        prompt = self.policy.prompt_of(self.root, self.records[line["index"]], side)
        assert line.get("prompt_tokens", len(prompt[0])) == len(prompt[0]), "the prompt is another one"
        return prompt

    @torch.no_grad()
    def _score(self, sides: list[list[dict]]) -> tuple[list[list], list[list], list[list]]:
        """Old and reference log-probs and embeddings per side and rollout; None for what is not there."""
        old, ref, embeddings = ([[], []] for _ in range(3))
        for side, lines in enumerate(sides):
            for line in lines:
                prompt = self._prompt(line, side)
                now, before = self.policy.read(prompt), self.frozen.read(prompt)
                for completion in line["completions"]:
                    ids = completion["token_ids"]
                    there = completion["status"] != "failed"
                    temperature = self.settings.temperature
                    logprobs, embedding = self.policy.respond(now, ids, temperature) if there else (None, None)
                    old[side].append(logprobs)
                    embeddings[side].append(embedding)
                    ref[side].append(self.frozen.respond(before, ids, temperature)[0] if there else None)
        return old, ref, embeddings

    def _rewards(self, sides: list[list[dict]], embeddings: list[list]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        pairs, size = len(sides[0]), len(sides[0][0]["completions"])
        together = (self.settings.comparison_pairs or pairs) * size
        rewards = {name: torch.zeros(2, pairs * size, dtype=torch.float64) for name in ("format", "embedding")}
        rewards |= {name: torch.zeros_like(rewards["format"]) for name in ("ranking", "margin")}
        for side, lines in enumerate(sides):
            for row in range(pairs * size):
                if embeddings[side][row] is None:
                    continue
                text = self.policy.tokenizer.decode(lines[row // size]["completions"][row % size]["token_ids"])
                rewards["format"][side, row] = float(FORMAT.match(text) is not None)
                start = row // together * together
                own, other = (embeddings[s][start : start + together] for s in (side, 1 - side))
                found = embedding_reward(own, other, row - start, size)
                for name, value in zip(("embedding", "ranking", "margin"), found, strict=True):
                    rewards[name][side, row] = value
        return rewards, sum(weight * rewards[name] for name, weight in self.settings.weights.items())

    def _backward(
        self, sides: list[list[dict]], pairs: list[int], old: list[list], ref: list[list], advantages: torch.Tensor
    ) -> float:
        """Gradients of the loss over these pairs, which is returned: the mean of both sides' mean over responses.

        A side of which all responses failed is left out.
        """
        loss, size = 0.0, len(sides[0][0]["completions"])
        places = [pair * size + place for pair in pairs for place in range(size)]
        there = [[row for row in places if old[side][row] is not None] for side in range(2)]
        for side, lines in enumerate(sides):
            rows = there[side]
            for pair in pairs:
                prompt = self.policy.read(self._prompt(lines[pair], side))
                parts = []
                for row in (row for row in rows if row // size == pair):
                    completion = lines[pair]["completions"][row % size]
                    new, _ = self.policy.respond(prompt, completion["token_ids"], self.settings.temperature)
                    engine = torch.tensor(completion["logprobs"], dtype=torch.float64)
                    advantage = float(advantages[side, row])
                    parts.append(response_loss(new, old[side][row], ref[side][row], advantage, engine, self.settings))
                if parts:
                    part = sum(parts) / len(rows) / sum(map(bool, there))
                    part.backward()
                    loss += float(part.detach())
        return loss


def read_rollouts(path: Path) -> list[list[dict]]:
    """The file's lines per side, in the order of the pairs' slots."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    sides = [sorted((line for line in lines if line["side"] == side), key=lambda line: line["slot"]) for side in SIDES]
    assert [line["slot"] for line in sides[0]] == [line["slot"] for line in sides[1]]
    assert len({len(line["completions"]) for line in lines}) == 1
    return sides


def train(
    directory: Path, data: Path, rollouts: list[Path], settings: Settings
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """One step per rollouts file, and the weights after the last."""
    trainer = Trainer(directory, data, settings)
    steps = [trainer.step(path) for path in rollouts]
    return steps, trainer.weights()
