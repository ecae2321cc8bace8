"""Puts every side to the teacher that the journal has no answer of, many at once, and keeps answers as they come."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from umer1.annotation.answers import Fault
from umer1.annotation.client import Answer, Client, Failed, Refused, Stopped
from umer1.annotation.journal import Journal
from umer1.annotation.request import request_body
from umer1.annotation.teacher_config import TeacherConfig
from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot
from umer1.data.schema import Side
from umer1.errors import UserError
from umer1.progress import clock

_WRITTEN_TOGETHER = 512  # most answers that one fsync makes durable
_LAST_MOMENTS = 3.0  # seconds that a run which ends early waits for answers under way

Outcome = Answer | Refused | Failed | Exception  # a BadSample is one side's matter, any other exception the run's


@dataclass(slots=True)
class Question:
    """One side to be asked about."""

    key: str
    side: Side


class Asker:
    """`config.concurrency` threads that ask; the calling thread alone writes the journal."""

    def __init__(self, config: TeacherConfig, api_key: str | None, media: MediaRoot, journal: Journal):
        self.config, self.media, self.journal = config, media, journal
        self._stop = threading.Event()
        self._client = Client(config, api_key, self._stop)
        self._questions: queue.Queue[Question] = queue.Queue()
        self._results: queue.Queue[tuple[str, Outcome]] = queue.Queue()
        self._unanswered_in_a_row = 0

    def run(
        self, questions: Iterable[Question | None], done: Callable[[Answer | Refused | Fault], None]
    ) -> dict[str, Fault]:
        """Ask all; `done` hears of each outcome once it is durable.  What stays without an answer comes back by key.

        None among the questions is none: a reader that passes over many sides lets answers be kept meanwhile.
        Raises UserError when the endpoint refuses everybody or gave no answer to `stop_after_failures` sides in a row;
        what was answered until then is in the journal.
        """
        unanswered: dict[str, Fault] = {}
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.config.concurrency)]
        for thread in threads:
            thread.start()
        under_way = 0
        try:
            for question in questions:
                under_way -= self._settle(self._waiting(), unanswered, done)
                if question is None:
                    continue
                # two a thread: nobody waits for the reader, and little is read ahead
                while under_way >= 2 * self.config.concurrency:
                    under_way -= self._settle([self._results.get(), *self._waiting()], unanswered, done)
                self._questions.put(question)
                under_way += 1
            while under_way:
                under_way -= self._settle([self._results.get(), *self._waiting()], unanswered, done)
        except BaseException:
            self._stop.set()
            self._keep_what_comes(threads)
            raise
        self._stop.set()
        return unanswered

    def _keep_what_comes(self, threads: list[threading.Thread]) -> None:
        """The run ends early: answers that are there, or come within moments, are paid for and go into the journal."""
        deadline = time.monotonic() + _LAST_MOMENTS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        kept = [(key, outcome) for key, outcome in self._waiting() if isinstance(outcome, Answer | Refused)]
        if kept:
            self.journal.append(kept)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                question = self._questions.get(timeout=0.5)
            except queue.Empty:
                continue
            try:
                outcome = self._client.ask(request_body(question.side, self.config, self.media))
            except Stopped:
                return
            except Exception as error:  # told to the calling thread, which raises what it does not know
                outcome = error
            self._results.put((question.key, outcome))

    def _settle(
        self,
        results: list[tuple[str, Outcome]],
        unanswered: dict[str, Fault],
        done: Callable[[Answer | Refused | Fault], None],
    ) -> int:
        """How many they were; answers become durable before anything else happens."""
        kept = [(key, outcome) for key, outcome in results if isinstance(outcome, Answer | Refused)]
        if kept:
            self.journal.append(kept)
        for key, outcome in results:
            if isinstance(outcome, Failed | BadSample):
                unanswered[key] = _fault(outcome)
            elif not isinstance(outcome, Answer | Refused):
                raise outcome
            self._count(outcome)
            done(unanswered.get(key, outcome))
        return len(results)

    def _waiting(self) -> list[tuple[str, Outcome]]:
        """The results that nobody has collected yet, as many as one fsync takes."""
        found = []
        while len(found) < _WRITTEN_TOGETHER:
            try:
                found.append(self._results.get_nowait())
            except queue.Empty:
                break
        return found

    def _count(self, outcome: Answer | Refused | Failed | BadSample) -> None:
        """Ends the run where the teacher is at fault: it answers nobody any more, or refuses everybody."""
        if isinstance(outcome, BadSample):  # nobody was asked
            return
        self._unanswered_in_a_row = 0 if isinstance(outcome, Answer) else self._unanswered_in_a_row + 1
        if self._unanswered_in_a_row < self.config.stop_after_failures:
            return
        remedy = "mend the endpoint and run the same command"
        if isinstance(outcome, Refused):
            remedy += " with --ask-refused-again, or without it where these sides are at fault"
        raise UserError(
            f"the teacher gave no answer to {self._unanswered_in_a_row} sides in a row, the last time: "
            f"{outcome.detail}. {len(self.journal)} answers are kept in {self.journal.path}; {remedy}"
        )


def _fault(outcome: Failed | BadSample) -> Fault:
    cause = outcome.cause if isinstance(outcome, BadSample) else "teacher_failed"
    return Fault(cause, outcome.detail)


class Progress:
    """`128/1,024 sides, 60.1/s, ETA 0:00:15, 2 without an answer, 1.2M tokens in, 0.4M out, cost 1.23` on stderr.

    Tokens and cost are those of all answers in the journal, earlier runs' included.
    """

    def __init__(self, total: int, journal: Journal, config: TeacherConfig, now: Callable[[], float] = time.monotonic):
        self.total, self.journal, self.config, self.now = total, journal, config, now
        self.start = self.last = now()
        self.done = self.asked = self.failed = 0

    def known(self) -> None:
        """A side that needs no asking."""
        self.done += 1

    def heard(self, outcome: Answer | Refused | Fault) -> None:
        self.done += 1
        self.asked += 1
        self.failed += not isinstance(outcome, Answer)
        if self.now() - self.last >= self.config.progress_seconds:
            self.last = self.now()
            rate = self.asked / max(self.last - self.start, 1e-9)
            self._print(f"{rate:.1f}/s, ETA {clock((self.total - self.done) / rate)}")

    def finish(self) -> None:
        seconds = self.now() - self.start
        self._print(f"{self.asked:,} asked in {clock(seconds)} ({self.asked / max(seconds, 1e-9):.1f}/s)")

    def cost(self) -> float:
        journal, config = self.journal, self.config
        return (
            journal.input_tokens * config.input_token_price + journal.output_tokens * config.output_token_price
        ) / 1e6

    def _print(self, rate: str) -> None:
        parts = [f"{self.done:,}/{self.total:,} sides", rate, f"{self.failed:,} without an answer"]
        parts.append(f"{_short(self.journal.input_tokens)} tokens in, {_short(self.journal.output_tokens)} out")
        if self.config.input_token_price or self.config.output_token_price:
            parts.append(f"cost {self.cost():,.2f}")
        print(f"umer1 annotate: {', '.join(parts)}", file=sys.stderr, flush=True)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"
