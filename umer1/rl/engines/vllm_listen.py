"""The server's side of TCP: who may connect, and one command at a time from whoever is let in."""

import hmac
import secrets
import select
import socket
import sys
import time
from typing import Any

from umer1.rl.engines.vllm_remote import PROTOCOL, proof, token
from umer1.rl.engines.vllm_session import SEND_SECONDS, Session, build
from umer1.rl.engines.vllm_wire import MAX_BODY_BYTES, MAX_HEADER_BYTES, Channel, ConnectionLost, Message, WireError

_HELLO_SECONDS = 10.0
_HELLO_BYTES = 4096  # nothing larger is taken from someone unknown
_MAX_PEERS = 64


class Peer:
    """One connection: unknown until it has shown that it knows the secret, then with a session of its own."""

    def __init__(self, connection: socket.socket, name: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.name, self.nonce = name, secrets.token_hex(32)
        self.channel = Channel(connection, max_header_bytes=_HELLO_BYTES, max_body_bytes=0)
        self.session: Session | None = None
        self.since = time.monotonic()
        self.channel.send("challenge", timeout=1.0, nonce=self.nonce)

    def overdue(self) -> bool:
        return self.session is None and time.monotonic() - self.since > _HELLO_SECONDS

    def take(self, message: Message, core: Any, description: dict[str, Any]) -> None:
        """Raises ConnectionLost, WireError or TimeoutError when this connection is to be closed."""
        if self.session is not None:
            self.session.answer(self.channel, message)
            return
        reason = ""
        if message.op != "hello" or message.fields.get("protocol") != PROTOCOL:
            reason = f"this server speaks version {PROTOCOL} of umer1's rollout protocol"
        elif not hmac.compare_digest(str(message.fields.get("proof")).encode(), proof(token(), self.nonce).encode()):
            reason = "the secret in UMER1_ROLLOUT_TOKEN is not the server's"
        if reason:
            self.channel.send("refused", timeout=SEND_SECONDS, reason=reason)
            raise WireError(f"refused: {reason}")
        self.channel.max_header_bytes, self.channel.max_body_bytes = MAX_HEADER_BYTES, MAX_BODY_BYTES
        self.session = Session(core)
        self.channel.send("description", timeout=SEND_SECONDS, **description)


def serve_forever(listener: socket.socket, settings: dict[str, Any]) -> None:
    """Build the engine, then listen.  A connection that breaks the rules is closed; the others are not touched."""
    core, description = build(settings)
    description["model"] = settings["description"]
    listener.listen()
    listener.setblocking(False)
    host, port = listener.getsockname()[:2]
    print(f"[serve-rollouts] vLLM {description['vllm']} listens on {host}:{port}", flush=True)
    peers: list[Peer] = []
    while True:
        ready = select.select([listener, *(peer.channel for peer in peers)], [], [], 1.0)[0]
        if listener in ready:
            _accept(listener, peers)
        for peer in list(peers):
            try:
                message = peer.channel.poll(0) if peer.channel in ready else None
                if message is not None:
                    peer.take(message, core, description)
                if peer.overdue():
                    raise TimeoutError("it did not say hello")
            except (ConnectionLost, WireError, TimeoutError) as error:
                print(f"[serve-rollouts] {peer.name}: {error}", file=sys.stderr, flush=True)
                peer.channel.close()
                peers.remove(peer)


def _accept(listener: socket.socket, peers: list[Peer]) -> None:
    try:
        connection, address = listener.accept()
    except OSError:
        return
    if len(peers) >= _MAX_PEERS:
        connection.close()
        return
    try:
        peers.append(Peer(connection, f"{address[0]}:{address[1]}"))
    except (ConnectionLost, TimeoutError):
        connection.close()
