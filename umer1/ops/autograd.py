"""What backward passes of operations here ask autograd."""

import torch


def graph_is_kept() -> bool:
    """Whether the running backward was given retain_graph=True: a second one may want what the forward saved."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
