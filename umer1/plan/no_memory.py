"""Build real modules of any size on any machine: floating-point tensors without memory, collectives with nobody."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_META = torch.device("meta")


class NoMemory(TorchDispatchMode):
    """Inside, new floating-point tensors are on the "meta" device: shapes and dtypes alone.

    Collectives get an empty tensor in place of one without memory; they are for fake process groups, where nothing is
    sent and results mean nothing.  Integers keep their values: generators' states and counters are read while modules
    are built.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            args = tree_map_only(torch.Tensor, lambda t: torch.empty(0) if t.device == _META else t, args)
            return func(*args, **kwargs)
        if kwargs.get("device") is not None:
            given = [arg for arg in args if isinstance(arg, torch.Tensor)]
            whole = func is torch.ops.aten.full.default and isinstance(args[1], int)  # a dtype that the value decides
            implied = given[0].dtype if given else torch.int64 if whole else torch.get_default_dtype()
            dtype = kwargs.get("dtype") or implied
            if dtype.is_floating_point:
                kwargs["device"] = _META
        return func(*args, **kwargs)
