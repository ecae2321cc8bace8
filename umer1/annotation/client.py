"""Chat completions over HTTP: one connection a thread, a deadline for the whole exchange, retries with back-off."""

import email.utils
import http.client
import json
import random
import re
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from umer1.annotation.teacher_config import TeacherConfig
from umer1.errors import UserError

_MAX_REPLY_BYTES = 64 * 2**20
_MAX_RETRY_AFTER = 3600.0
_LONG_WAIT = 20.0  # seconds; a longer one is said, since a run that waits shows no progress
# Codes that no second attempt mends, and that concern every request alike.
_SETUP_CODES = (401, 402, 403, 404, 405)
_RETRIED_CODES = (408, 409, 425, 429)
_NO_ANSWERS = ("abort", "error")  # finish reasons of a request that the server, as it stops for example, let go


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher wrote, as it came."""

    content: str
    reasoning: str | None  # where the server keeps it apart (a reasoning parser)
    finish_reason: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The server will not answer this request however often it is asked."""

    detail: str


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer after all attempts."""

    detail: str


class Stopped(Exception):
    """The run ends while a request waits."""


class _Retry(Exception):
    def __init__(self, detail: str, after: float | None = None):
        super().__init__(detail)
        self.after = after


class _Reply(http.client.HTTPResponse):
    """Passes over interim replies (102, 103, ...), of which http.client knows 100 alone: it takes another one for the
    answer, and the answer for that to the connection's next request."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()
            if not 100 < status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)


class Client:
    """Asks one endpoint; to be used by many threads.

    api_key: sent as a bearer token to the endpoint alone (redirects are not followed), and kept out of every message.
    stop: once set, waits end in Stopped.
    """

    def __init__(self, config: TeacherConfig, api_key: str | None, stop: threading.Event):
        self.config, self.stop = config, stop
        self._key = api_key
        self._address = urlsplit(config.endpoint)
        self._path = self._address.path.rstrip("/") + "/chat/completions"
        self._local = threading.local()
        self._said_until = 0.0  # on the monotonic clock: a wait up to then is known

    def ask(self, body: bytes) -> Answer | Refused | Failed:
        """Ask until there is an answer, a refusal, or `max_attempts` are used up.

        Raises UserError when the endpoint refuses everybody (key, address, model).
        """
        detail = ""
        for attempt in range(self.config.max_attempts):
            try:
                return self._judge(*self._exchange(body))
            except _Retry as error:
                detail = self._hidden(str(error))
                if attempt + 1 < self.config.max_attempts:
                    self._wait(self._delay(attempt, error.after), detail)
        return Failed(f"{detail} (attempt {self.config.max_attempts} of {self.config.max_attempts})")

    def _wait(self, seconds: float, why: str) -> None:
        """Stopped when the run ends meanwhile.  A long wait is said once for all threads that wait about as long."""
        end = time.monotonic() + seconds
        if seconds > _LONG_WAIT and end > self._said_until + _LONG_WAIT:
            self._said_until = end
            print(f"umer1 annotate: {why}; the next attempt is in {seconds:.0f} s", file=sys.stderr, flush=True)
        if self.stop.wait(seconds):
            raise Stopped from None

    def _delay(self, attempt: int, after: float | None) -> float:
        """Full jitter: any part of a bound that doubles; behind a Retry-After, a little of it on top."""
        # 2**64 is beyond any bound; a patient run's number of attempts is beyond what a float can hold
        bound = min(self.config.max_backoff_seconds, self.config.backoff_seconds * 2 ** min(attempt, 64))
        if after is None:
            return random.uniform(0.0, bound)
        return min(after, _MAX_RETRY_AFTER) + random.uniform(0.0, min(bound, self.config.backoff_seconds))

    # -- one exchange ------------------------------------------------------------------------------------------------

    def _exchange(self, body: bytes) -> tuple[int, str | None, bytes]:
        """(status, Retry-After, body).  A stalled or trickling server is cut off at the deadline."""
        connection = self._connection()
        expired, timer = threading.Event(), None
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            if connection.sock is None:
                connection.connect()
            timer = threading.Timer(self.config.request_timeout_seconds, _cut, (connection.sock, expired))
            timer.daemon = True
            timer.start()
            connection.sock.settimeout(self.config.request_timeout_seconds + 1)
            try:
                connection.request("POST", self._path, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server that reads no further (413) has said why, mostly
            response = connection.getresponse()
            content = response.read(_MAX_REPLY_BYTES + 1)
            if not response.isclosed():  # cut short, or too long: no further request can go this way
                connection.close()
            if expired.is_set():  # a body that only the connection's end bounds looks whole
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if expired.is_set():
                raise _Retry(f"no answer within {self.config.request_timeout_seconds:g} s") from None
            raise _Retry(f"{type(error).__name__}: {error}") from None
        finally:
            if timer is not None:
                timer.cancel()
        if len(content) > _MAX_REPLY_BYTES:
            raise _Retry("the reply is longer than 64 MiB")
        return response.status, response.headers.get("Retry-After"), content

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            connection = kinds[self._address.scheme](
                self._address.hostname, self._address.port, timeout=self.config.connect_timeout_seconds
            )
            connection.response_class = _Reply
            self._local.connection = connection
        elif connection.sock is not None and _has_ended(connection.sock):
            connection.close()  # as servers do with one that is idle for some seconds; it opens anew
        return connection

    # -- what a reply means ------------------------------------------------------------------------------------------

    def _judge(self, status: int, retry_after: str | None, content: bytes) -> Answer | Refused:
        if 200 <= status < 300:
            return read_answer(content)
        said = self._hidden(_shown(content))
        if status in _SETUP_CODES or 300 <= status < 400:
            hints = {
                401: "check --api-key-env",
                403: "check --api-key-env",
                404: "check --endpoint and --teacher-model",
            }
            hint = hints.get(status, "check --endpoint")
            raise UserError(f"{self.config.endpoint} answers {status} to every request: {said!r}; {hint}")
        if status in _RETRIED_CODES or status >= 500:
            raise _Retry(f"status {status}: {said}", seconds_of(retry_after))
        return Refused(f"status {status}: {said}")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _has_ended(sock: socket.socket) -> bool:
    """Whether there is something to be read from a connection that waits for its next request: its end."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return bool(waiting.poll(0))


def _cut(sock: socket.socket, expired: threading.Event) -> None:
    expired.set()
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already, which is what was wanted


def seconds_of(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date, as seconds from now; None for none or nonsense."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\s*[0-9]+\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):  # a year that no clock has
        return None


def read_answer(content: bytes) -> Answer:
    """The first choice of a reply; a body that is no chat completion, or no finished one, is asked for again."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        usage = reply.get("usage") or {}
        if not isinstance(text, str) or not isinstance(reasoning, str | None):
            raise TypeError("content is no text")
        answer = Answer(
            content=text,
            reasoning=reasoning,
            finish_reason=str(choice.get("finish_reason") or "stop"),
            input_tokens=_count(usage.get("prompt_tokens")),
            output_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise _Retry(f"the reply is no chat completion ({problem}): {_shown(content)}") from None
    if answer.finish_reason in _NO_ANSWERS:
        raise _Retry(f"the server did not finish, finish_reason {answer.finish_reason}")
    return answer


def _shown(content: bytes) -> str:
    """The start of a body, on one line."""
    return " ".join(content[:400].decode("utf-8", "replace").split())


def _count(value: Any) -> int:
    """Tokens; 0 for what cannot be their number."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0
