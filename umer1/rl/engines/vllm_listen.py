"""The server's side of TCP: who may connect, and one command at a time from whoever is let in."""

import hmac
import secrets
import select
import socket
import sys
import time
from typing import Any

from umer1.printable import printable
from umer1.rl.engines.vllm_remote import PROTOCOL, keep_alive, proof, token
from umer1.rl.engines.vllm_session import SEND_SECONDS, EngineFailure, Holder, Session, build
from umer1.rl.engines.vllm_wire import MAX_BODY_BYTES, MAX_HEADER_BYTES, Channel, ConnectionLost, Message, WireError

_HELLO_SECONDS = 10.0
_HELLO_BYTES = 4096  # nothing larger is taken from someone unknown
_MAX_PEERS = 64
_MAX_STRANGERS = 64  # connections that have not shown the secret; the oldest makes room for the newest


class Peer:
    """One connection: unknown until it has shown that it knows the secret, then with a session of its own."""

    def __init__(self, connection: socket.socket, name: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(connection)
        self.name, self.nonce = name, secrets.token_hex(32)
        self.channel = Channel(connection, max_header_bytes=_HELLO_BYTES, max_body_bytes=0)
        self.session: Session | None = None
        self.since = time.monotonic()
        self.channel.send("challenge", timeout=1.0, nonce=self.nonce)

    def overdue(self) -> bool:
        return self.session is None and time.monotonic() - self.since > _HELLO_SECONDS

    def take(self, message: Message, core: Any, holder: Holder, description: dict[str, Any], *, full: bool) -> None:
        """Raises EngineFailure where the engine broke; any other error means that this connection is to be closed."""
        if self.session is not None:
            self.session.answer(self.channel, message)
            return
        reason = ""
        if message.op != "hello" or message.fields.get("protocol") != PROTOCOL:
            reason = f"this server speaks version {PROTOCOL} of umer1's rollout protocol"
        elif not self._knows_the_secret(message.fields.get("proof")):
            reason = "the secret in UMER1_ROLLOUT_TOKEN is not the server's"
        elif full:
            reason = f"{_MAX_PEERS} trainers are connected already"
        if reason:
            self.channel.send("refused", timeout=SEND_SECONDS, reason=reason)
            raise WireError(f"refused: {reason}")
        self.channel.max_header_bytes, self.channel.max_body_bytes = MAX_HEADER_BYTES, MAX_BODY_BYTES
        self.session = Session(core, holder=holder, name=self.name)
        self.channel.send("description", timeout=SEND_SECONDS, **description)

    def _knows_the_secret(self, given: Any) -> bool:
        right = proof(token(), self.nonce)
        return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, right)

    def close(self) -> None:
        self.channel.close()
        if self.session is not None:
            self.session.close()


def serve_forever(listener: socket.socket, settings: dict[str, Any]) -> None:
    """Build the engine, then listen.  A connection that breaks the rules is closed; the others are not touched."""
    core, description = build(settings)
    description["model"] = settings["description"]
    listener.listen()
    listener.setblocking(False)
    host, port = listener.getsockname()[:2]
    print(f"[serve-rollouts] vLLM {description['vllm']} listens on {host}:{port}", flush=True)
    peers: list[Peer] = []
    holder = Holder()
    served = False
    while True:
        # a message may lie in a channel's own buffer, behind the one that was just served
        ready = select.select([listener, *(peer.channel for peer in peers)], [], [], 0.0 if served else 1.0)[0]
        if listener in ready:
            _accept(listener, peers)
        served = False
        for peer in list(peers):
            try:
                message = peer.channel.poll(0)
                if message is not None:
                    served = True
                    full = sum(other.session is not None for other in peers) >= _MAX_PEERS
                    peer.take(message, core, holder, description, full=full)
                if peer.overdue():
                    raise TimeoutError("it did not say hello")
            except EngineFailure:
                raise
            except Exception as error:  # whatever it sent, the others are not touched
                _drop(peer, peers, f"{type(error).__name__}: {error}")


def _drop(peer: Peer, peers: list[Peer], reason: str) -> None:
    print(f"[serve-rollouts] {peer.name}: {printable(reason)}", file=sys.stderr, flush=True)
    peers.remove(peer)
    peer.close()


def _accept(listener: socket.socket, peers: list[Peer]) -> None:
    try:
        connection, address = listener.accept()
    except OSError:
        return
    strangers = [peer for peer in peers if peer.session is None]
    if len(strangers) >= _MAX_STRANGERS:
        _drop(strangers[0], peers, "it did not say hello before many others came")
    try:
        peers.append(Peer(connection, f"{address[0]}:{address[1]}"))
    except (ConnectionLost, TimeoutError, OSError):
        connection.close()
