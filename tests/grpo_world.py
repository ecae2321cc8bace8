"""examples/grpo.py as a program on a tiny model that does say `<gen_emb>` now and then: the ground of its tests."""

import json
from pathlib import Path

import torch
from grpo_reference import Policy, write_rl_pairs
from programs import GRPO, run_in_forks
from safetensors.torch import load_file, save_file
from tiny_qwen2_vl import make_tiny_directory

# What the logits of these tokens are on average; those of the others are 0 +- 1.
FAVOURED = {"<gen_emb>": 3.0, "<|im_end|>": 2.5}


def make_talking_directory(path: Path, data: Path, **sizes: int) -> Path:
    """A random model of which about half of the responses have `<gen_emb>` and some end by themselves."""
    directory = make_tiny_directory(path, tied=False, embedding_tokens=True, **sizes)
    policy = Policy(directory)
    states = []
    with torch.no_grad():
        for record in json.loads(data.read_text()):
            for side in range(2):
                embeds, positions = policy.read(policy.prompt_of(data.parent, record, side))
                states.append(
                    policy.model.model.language_model(
                        inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False
                    ).last_hidden_state[0]
                )
    mean = torch.cat(states).mean(0)
    weights = load_file(path / "model.safetensors")
    for token, logit in FAVOURED.items():
        weights["lm_head.weight"][policy.id(token)] = (logit * mean / mean.square().sum()).float()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return directory


class Setting:
    """A model, training pairs, held-out pairs of which two have one positive."""

    def __init__(self, root: Path, *, pairs: int = 8, **sizes: int):
        self.data = write_rl_pairs(root / "data", pairs)
        self.heldout = write_rl_pairs(root / "heldout", 6, seed=5)
        records = json.loads(self.heldout.read_text())
        records[4] |= {key: value for key, value in records[1].items() if key.startswith("pos_")}
        self.heldout.write_text(json.dumps(records))
        self.model = make_talking_directory(root / "model", self.data, **sizes)

    def flags(self, *more: str) -> list[str]:
        """Two steps of four pairs with three responses of at most twelve tokens; later flags win."""
        base = ["--hf-model", str(self.model), "--data-path", str(self.data), "--fp32", "--rollout-engine", "torch"]
        base += "--global-batch-size 4 --micro-batch-size 8 --num-generations 3 --train-iters 2 --lr 1e-4".split()
        base += "--seq-length 512 --max-completion-length 12 --log-rollouts 1 --log-rollouts-prompts 99".split()
        return [*base, *more]


def succeed(arguments: list[str], processes: int = 1, *, program: Path = GRPO, **settings) -> str:
    """What examples/grpo.py (or a wrapper of it) printed, without a word of trouble."""
    done = run_in_forks(program, arguments, processes, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def records(save: Path) -> list[dict]:
    """metrics.jsonl"""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def rollouts(save: Path, iteration: int = 1) -> list[dict]:
    """The lines of a step's rollouts file."""
    return [json.loads(line) for line in (save / f"rollouts/iter_{iteration:07d}.jsonl").read_text().splitlines()]
