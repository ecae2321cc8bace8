"""InfoNCE as its formula reads, with the logits whole: what the operation is compared with."""

import torch


def reference_loss(
    query, key, *, temperature, labels=None, negatives=None, query_ids=None, key_ids=None
) -> torch.Tensor:
    """The arguments of umer1.ops.infonce; plain torch in the dtype of the inputs, differentiable."""
    count = len(query)
    labels = torch.arange(count) if labels is None else labels
    columns = key if negatives is None else torch.cat([key, negatives])
    logits = query @ columns.T / temperature
    if query_ids is not None:
        own = torch.zeros(count, len(columns), dtype=torch.bool)
        own[torch.arange(count), labels] = True
        logits = torch.where((query_ids[:, None] == key_ids[None, :]) & ~own, -torch.inf, logits)
    rows = torch.arange(count)
    to_key = torch.log_softmax(logits, dim=1)[rows, labels]
    to_query = torch.log_softmax(logits[:, : len(key)], dim=0)[rows, labels]
    return -(to_key.sum() + to_query.sum()) / (2 * count)


def loss_and_gradients(loss_of, tensors: dict, **options) -> dict[str, torch.Tensor]:
    """`loss`, and `d name` of every floating tensor among `tensors`, of `loss_of(**tensors, **options)`."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    loss = loss_of(**leaves, **options)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()} | {f"d {name}": value for name, value in zip(leaves, found, strict=True)}
