"""Messages between the trainer and the vLLM process: a JSON header and raw bytes, in bounded sizes.

A frame is a magic word, the header's length, the header (a JSON object whose `sizes` lists the lengths of what
follows), then the byte strings.  Nothing received is ever executed or unpickled.
"""

import json
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_MAGIC = b"UMER"
_PREFIX = struct.Struct("<4sI")
MAX_HEADER_BYTES = 8 << 20  # a prompt of 32k tokens takes about 200 KB
MAX_BODY_BYTES = 1 << 30  # a video of 768 frames takes 58 MB
_RECEIVE_BYTES = 1 << 20


class WireError(Exception):
    """The other side sent something that is no frame of this protocol, or too large a one."""


class ConnectionLost(Exception):
    """The other side has gone."""


@dataclass(slots=True)
class Message:
    """`op` and its settings, with the byte strings that belong to it."""

    op: str
    fields: dict[str, Any] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)


class Channel:
    """A socket that carries whole messages; a partly received one is kept from poll to poll.

    max_header_bytes, max_body_bytes: bounds of what is accepted; they may be raised once the other side is known.
    """

    def __init__(self, connection: socket.socket, *, max_header_bytes=MAX_HEADER_BYTES, max_body_bytes=MAX_BODY_BYTES):
        connection.setblocking(False)
        self.connection = connection
        self.max_header_bytes, self.max_body_bytes = max_header_bytes, max_body_bytes
        self._received = bytearray()
        self._header: dict[str, Any] | None = None  # of the frame whose bodies are still to come

    def fileno(self) -> int:
        return self.connection.fileno()

    def close(self) -> None:
        self.connection.close()

    def is_left(self) -> bool:
        """Whether the other side has closed the connection, and nothing that it sent before is left."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def send(self, op: str, bodies: Sequence[bytes | memoryview] = (), *, timeout: float, **fields: Any) -> None:
        """Raises ConnectionLost when the other side is gone, TimeoutError when it does not take the message."""
        views = [memoryview(body).cast("B") for body in bodies]
        header = json.dumps({"op": op, "sizes": [len(view) for view in views], **fields}).encode()
        if len(header) > MAX_HEADER_BYTES or sum(map(len, views)) > MAX_BODY_BYTES:
            raise WireError(f"{op}: a message of {len(header)} + {sum(map(len, views))} bytes is too large to send")
        deadline = time.monotonic() + timeout
        for part in (memoryview(_PREFIX.pack(_MAGIC, len(header)) + header), *views):
            while part:
                try:
                    part = part[self.connection.send(part) :]
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(f"{op}: the message was not taken within {timeout:.0f} s") from None
                    select.select([], [self.connection], [], left)
                except OSError as error:
                    raise ConnectionLost(str(error)) from None

    def poll(self, seconds: float) -> Message | None:
        """The next message, or None when it is not complete after `seconds`.  Raises ConnectionLost, WireError."""
        deadline = time.monotonic() + seconds
        while True:
            message = self._next()
            if message is not None:
                return message
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([self.connection], [], [], left)[0]:
                return None
            try:
                data = self.connection.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(str(error)) from None
            if not data:
                raise ConnectionLost("the connection was closed")
            self._received += data

    def _next(self) -> Message | None:
        """Cut one frame off the bytes received so far."""
        if self._header is None and not self._take_header():
            return None
        sizes = self._header["sizes"]
        if len(self._received) < sum(sizes):
            return None
        bodies, begin = [], 0
        for size in sizes:
            bodies.append(bytes(memoryview(self._received)[begin : begin + size]))
            begin += size
        del self._received[:begin]
        fields, self._header = self._header, None
        del fields["sizes"]
        return Message(fields.pop("op"), fields, bodies)

    def _take_header(self) -> bool:
        if len(self._received) < _PREFIX.size:
            return False
        magic, length = _PREFIX.unpack_from(self._received)
        if magic != _MAGIC:
            raise WireError("not a message of umer1's rollout protocol")
        if length > self.max_header_bytes:
            raise WireError(f"a header of {length} bytes; at most {self.max_header_bytes} are taken")
        if len(self._received) < _PREFIX.size + length:
            return False
        raw = bytes(self._received[_PREFIX.size : _PREFIX.size + length])
        del self._received[: _PREFIX.size + length]
        try:
            header = json.loads(raw, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise WireError(f"a header that is no JSON: {error}") from None
        sizes = header.get("sizes") if isinstance(header, dict) else None
        if not isinstance(sizes, list) or not isinstance(header.get("op"), str):
            raise WireError("a header without op and sizes")
        if any(type(size) is not int or size < 0 for size in sizes) or sum(sizes) > self.max_body_bytes:
            raise WireError(f"a message with sizes {str(sizes)[:80]}; at most {self.max_body_bytes} bytes are taken")
        self._header = header
        return True


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON")
