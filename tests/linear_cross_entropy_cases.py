"""Random cases of linear cross-entropy and log-probs, and their comparison with plain log_softmax in fp64."""

import random

import torch

from umer1.ops.linear_cross_entropy import linear_cross_entropy, linear_logprobs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Roundings of the accumulation's dtype that a result may be off by whatever plain torch's error is; in fp64 plain
# torch is the truth and has round-off of its own.
FLOOR = {torch.float32: 8, torch.float64: 10_000}


def plain(hidden, weight, labels, temperature, vocab_size):
    """(log-probs, entropy) by torch in the inputs' dtype, half ones upcast after the product as trainers do."""
    scores = (hidden @ weight[:vocab_size].T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    scores = scores.log_softmax(1)
    return scores.gather(1, labels[:, None]).squeeze(1), -(scores.exp() * scores).sum(1)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def make_case(seed: int, dtypes=DTYPES, largest: tuple[int, int] = (600, 5000)) -> dict:
    """One random case: odd shapes from 1 to the `largest`, every option, ties, sharp and flat distributions."""
    draw = random.Random(seed)
    # One dimension may be large, so that a case stays cheap.
    shape = [draw.choice([1, 2, 3, 7, draw.randint(1, 40)]) for _ in range(3)]
    shape[draw.randrange(3)] = draw.choice([1, *(draw.randint(1, size) for size in largest)])
    rows, width, tokens = shape
    dtype = draw.choice(dtypes)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight *= draw.choice([0.1, 1.0, 3.0]) / width**0.5
    if draw.random() < 0.2:  # ties: tokens of equal logits
        weight[tokens // 2 :] = weight[0].clone()
    vocab_size = draw.choice([tokens, draw.randint(1, tokens)])
    scale = torch.randn(rows, generator=generator, dtype=torch.float64)
    if draw.random() < 0.3:  # rows that do not count
        scale[::2] = 0.0
    return {
        "seed": seed,
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "labels": torch.randint(0, vocab_size, (rows,), generator=generator),
        "scale": scale * draw.choice([1.0, 1e-6]),
        "temperature": draw.choice([1.0, 0.6, 2.5]),
        "vocab_size": vocab_size,
        # None keeps all logits, as does the third, which for wide rows cuts the products of the gradients.
        "block_bytes": draw.choice([1, None, 8 * rows * tokens]),
    }


def operand_noise(case: dict) -> dict[str, float]:
    """What rounding the operands of each gradient's product makes of it, as a norm: {"d_hidden", "d_weight"}.

    Operands are softmax - onehot with the weight, which is exact, and with the scaled rows, which are rounded too.
    The roundings of V tokens or R rows add up as a random walk.  Plain torch rounds as much, but in a gradient of a
    few elements its own sum may come out right by luck (fp16, 1,380 rows, two elements of d_weight: 3e-4 beside an
    expected 4e-3), and terms that cancel leave a sum far below the roundings of each (bf16, one row, 28 tokens).
    """
    hidden, weight = (case[name].double() for name in ("hidden", "weight"))
    weight = weight[: case["vocab_size"]]
    slope = (hidden @ weight.T / case["temperature"]).softmax(1)
    slope[torch.arange(len(hidden), device=hidden.device), case["labels"]] -= 1.0
    slope *= case["scale"][:, None] / case["temperature"]
    eps = torch.finfo(case["hidden"].dtype).eps
    squares = {"d_hidden": slope.square() @ weight.square(), "d_weight": slope.square().T @ hidden.square()}
    return {name: eps * float(square.sum().sqrt()) for name, square in squares.items()}


def check_case(case: dict, *, tensor_cores: bool, impl: str = "torch") -> None:
    """Results and gradients are no further from fp64 than twice plain torch plus round-off.

    tensor_cores: the products of the gradients have operands of the inputs' dtype.
    """
    hidden, weight, labels, scale = (case[name] for name in ("hidden", "weight", "labels", "scale"))
    options = {name: case[name] for name in ("temperature", "vocab_size")}
    how = {"block_bytes": case["block_bytes"], "impl": impl}
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def reference(precision):
        own = leaves(hidden.to(precision), weight.to(precision))
        logprobs, entropy = plain(*own, labels, **options)
        (logprobs * scale.to(logprobs.dtype)).sum().backward()
        return {"logprobs": logprobs, "entropy": entropy, "d_hidden": own[0].grad, "d_weight": own[1].grad}

    true, same = reference(torch.float64), reference(hidden.dtype)
    own = leaves(hidden, weight)
    logprobs, entropy = linear_logprobs(*own, labels, entropy=True, **how, **options)
    (logprobs * scale.to(dtype)).sum().backward()
    results = {"logprobs": logprobs, "entropy": entropy, "d_hidden": own[0].grad, "d_weight": own[1].grad}
    own = leaves(hidden, weight)
    total, losses = linear_cross_entropy(*own, labels, row_weights=-scale, **how, **options)
    total.backward()
    results |= {"losses": -losses, "loss's d_hidden": own[0].grad, "loss's d_weight": own[1].grad}
    assert logprobs.dtype == entropy.dtype == losses.dtype == total.dtype == dtype
    assert own[0].grad.dtype == own[1].grad.dtype == hidden.dtype
    # Logits carry round-off in proportion to the largest; sums over rows or tokens add to it.
    largest = (hidden.double() @ weight.double().T / case["temperature"]).abs().max().item()
    roundings = (
        FLOOR[dtype] * torch.finfo(dtype).eps * (1 + largest) * (1 + max(*hidden.shape, len(weight)) ** 0.5 / 10)
    )
    rows_scale = float(scale.abs().max()) * max(float(hidden.abs().max()), float(weight.abs().max()), 1.0)
    noise = operand_noise(case) if tensor_cores else {}
    for name, got in results.items():
        key = name.removeprefix("loss's ").replace("losses", "logprobs")
        error, its = (float((tensor.double() - true[key]).detach().norm()) for tensor in (got, same[key]))
        floor = roundings * (rows_scale if key.startswith("d_") else 1.0) * got.numel() ** 0.5
        if got.dtype != dtype:  # roundings of operand and result, and the step of subnormal numbers
            floor += torch.finfo(got.dtype).eps * float(true[key].detach().norm())
            floor += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps * got.numel() ** 0.5
            floor += noise.get(key, 0.0)
        assert error <= 2 * its + floor, (
            f"seed {case['seed']}, {hidden.dtype}, {tuple(hidden.shape)} x {tuple(weight.shape)}, {options}: "
            f"{name} off by {error:.3e}, plain torch by {its:.3e}, floor {floor:.3e}"
        )
