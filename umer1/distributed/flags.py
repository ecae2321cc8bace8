"""A word that any rank may say and all ranks hear without a collective: for ranks that wait in different places."""

import torch.distributed as dist


class SharedFlag:
    """Down until some rank raises it, then up on all ranks for good."""

    def __init__(self, name: str):
        self.key = f"umer1/{name}"
        self.store = dist.distributed_c10d._get_default_store()
        self._known = False

    def up(self) -> None:
        """Raise it."""
        if not self._known:
            self.store.set(self.key, "1")
            self._known = True

    def is_up(self) -> bool:
        """Whether any rank raised it; one short request to the store."""
        self._known = self._known or self.store.check([self.key])
        return self._known
