"""The rollout phase over all ranks: who gives which requests to which engine, and what happens when one fails.

A `collective` engine (torch) answers a data-parallel rank's requests with all ranks of its copy of the model.  Engines
of their own (vllm) stand one beside each group of consecutive ranks, its first rank leading; requests of a copy are
dealt out over its ranks, gathered at the leader and the answers brought back.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from umer1 import device
from umer1.distributed.flags import SharedFlag
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.rl.types import Completion, EngineDied, Interrupted, Request, RolloutEngine, Sampling, Stop
from umer1.rl.weight_sync import WeightSync

Answer = list[Completion | None]

_TICK_SECONDS = 0.02  # between looks at signals of a rank that waits for the others


class FollowingEngine:
    """Stands on ranks whose group's engine is led by another rank: it hears all weights and answers nothing."""

    name, collective = "following", False

    def generate(self, requests: list[Request], sampling: Sampling, stop: Stop) -> list[Answer]:
        if requests:
            raise AssertionError("requests go to the leader of the group")
        return []

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        for _ in tensors:
            pass
        return {}

    def start(self, stop: Stop) -> None:
        """Nothing to wait for."""

    def sleep(self) -> None:
        """Nothing to do."""

    def wake(self) -> None:
        """The engine takes memory of this rank's GPU as well."""
        device.release_memory()

    close, restart = sleep, wake


@dataclass(slots=True)
class _Outcome:
    """How a rank's part of the phase ended: nothing (well), or the kind and text of what went wrong."""

    kind: str = ""  # "", "interrupted", "died", "error"
    text: str = ""


class RolloutPhase:
    """Runs the engines of all ranks together; every method is collective over the world.

    ranks_per_engine: size of the groups, in consecutive ranks.  leave: raised when any rank wants the phase to end.
    """

    def __init__(
        self, engine: RolloutEngine, state: ParallelState, *, ranks_per_engine: int, timeout: float, leave: SharedFlag
    ):
        self.engine, self.state, self.leave = engine, state, leave
        self.sync_weights = WeightSync(engine, state, timeout)
        self.ranks = list(range(state.rank - state.rank % ranks_per_engine, state.world_size))[:ranks_per_engine]
        self.group = None
        if ranks_per_engine > 1:
            for first in range(0, state.world_size, ranks_per_engine):
                group = dist.new_group(list(range(first, first + ranks_per_engine)))
                if first == self.ranks[0]:
                    self.group = group
        self.answered: dict[str, Answer] = {}  # of the step at hand: kept when another rank's engine died
        self.working: Callable[[], None] = lambda: None  # called while this rank's engine is at work
        self.waiting: Callable[[str], None] = lambda name: None  # called when only the others' are

    def start(self, stop: Stop) -> None:
        """Wait until every engine stands.

        Raises on all ranks together: EngineDied, UserError; Interrupted, when `stop` says so.
        """
        self._agree(self._attempt(lambda asked_to_stop: self.engine.start(asked_to_stop), stop))

    def load_weights(self, models: list[torch.nn.Module], stop: Stop) -> float:
        """The trainer's weights into every engine; seconds.

        Raises on all ranks together: EngineDied, UserError; Interrupted, when `stop` says so while engines start.
        """
        self.start(stop)
        return self.sync_weights(models)

    def run(self, requests: list[Request], sampling: Sampling, stop: Stop) -> list[Answer]:
        """Answers to the requests of this data-parallel rank, which all ranks of its copy of the model give alike.

        Raises on all ranks together: Interrupted, EngineDied (call again after `restart` and `load_weights`: answers
        that had come stay), UserError.  `stop` is this rank's own; the others hear of it.
        """
        mine = requests if self.engine.collective else requests[self._place() :: self._replica()]
        waiting = [request for request in mine if request.key not in self.answered]
        gathered = waiting if self.engine.collective else self._gather(waiting)
        found: dict[str, Answer] = {}

        def generate(asked_to_stop: Stop) -> None:
            answers = self.engine.generate(gathered, sampling, asked_to_stop) if gathered else []
            found.update({request.key: answer for request, answer in zip(gathered, answers, strict=True)})

        outcome = self._attempt(generate, stop)
        self._keep(found, {request.key for request in mine})
        self._agree(outcome)
        answered, self.answered = self._share_in_replica(), {}
        return [answered[request.key] for request in requests]

    def restart(self) -> None:
        """Start dead engines anew; those that live are left as they are."""
        self.engine.restart()

    def _attempt(self, work: Callable[[Stop], None], stop: Stop) -> _Outcome:
        """How `work` ended here, once it has ended on all ranks; each hears when any of them is told to stop."""

        def asked_to_stop() -> bool:
            self.working()
            if stop():
                self.leave.up()
            return self.leave.is_up()

        outcome = _Outcome()
        try:
            work(asked_to_stop)
        except Interrupted as error:
            outcome = _Outcome("interrupted", str(error))
        except EngineDied as error:
            outcome = _Outcome("died", f"rank {self.state.rank}: {error}")
        except UserError as error:
            outcome = _Outcome("error", f"rank {self.state.rank}: {error}")
        self.waiting("waiting for the other ranks' engines")
        self._wait_for_others(stop)
        return outcome

    def _wait_for_others(self, stop: Stop) -> None:
        """A signal that comes while this rank waits is passed on; in a blocking collective nobody would hear it."""
        if self.state.world_size == 1:
            return
        waiting = dist.all_reduce(torch.zeros(1, device=self.state.device), async_op=True)
        while not waiting.is_completed():
            if stop():
                self.leave.up()
            time.sleep(_TICK_SECONDS)
        waiting.wait()  # raises when a rank has gone

    def _place(self) -> int:
        """This rank's number among the ranks of its copy of the model."""
        return self.state.pp_rank * self.state.tp_size + self.state.tp_rank

    def _replica(self) -> int:
        return self.state.tp_size * self.state.pp_size

    def _gather(self, requests: list[Request]) -> list[Request]:
        """At the leader the group's requests, elsewhere none.  Patches stay: these engines take the pictures."""
        if self.group is None:
            return requests
        requests = [_without_patches(request) for request in requests]
        parts: list[Any] | None = [None] * len(self.ranks) if self.state.rank == self.ranks[0] else None
        dist.gather_object(requests, parts, dst=self.ranks[0], group=self.group)
        return [request for part in parts or [] for request in part]

    def _keep(self, found: dict[str, Answer], own: set[str]) -> None:
        """Bring answers back from the leader."""
        if self.group is not None:
            message = [found]
            dist.broadcast_object_list(message, self.ranks[0], group=self.group)
            found = message[0]
        self.answered |= {key: answer for key, answer in found.items() if key in own}

    def _agree(self, outcome: _Outcome) -> None:
        """Hear how all ranks fared; raises when one did not fare well."""
        outcomes: list[Any] = [None] * self.state.world_size
        dist.all_gather_object(outcomes, outcome)
        for kind, error in (("error", UserError), ("interrupted", Interrupted), ("died", EngineDied)):
            texts = [each.text for each in outcomes if each.kind == kind]
            if texts:
                if kind != "died":
                    self.answered = {}
                raise error(texts[0])

    def _share_in_replica(self) -> dict[str, Answer]:
        """Answers of all ranks of this copy of the model."""
        if self.engine.collective or self._replica() == 1:
            return self.answered
        parts: list[Any] = [None] * self._replica()
        dist.all_gather_object(parts, self.answered, group=self.state.groups.mp)
        return {key: answer for part in parts for key, answer in part.items()}


def _without_patches(request: Request) -> Request:
    sequence = request.prompt.sequence
    patches = sequence.pixel_values.new_empty(0, *sequence.pixel_values.shape[1:])
    return replace(request, prompt=replace(request.prompt, sequence=replace(sequence, pixel_values=patches)))
