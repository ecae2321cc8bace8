"""The process that vLLM runs in: a child of a trainer rank, or a server on its own (`umer1 serve-rollouts`).

It answers one command at a time, over a socket, with the messages of vllm_wire.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

from umer1.rl.engines.vllm_process import end_with_parent
from umer1.rl.engines.vllm_session import SEND_SECONDS, Session, build, first_message
from umer1.rl.engines.vllm_wire import Channel, ConnectionLost, WireError


def serve_child(connection: socket.socket) -> None:
    """Serve the one trainer at the other end until it goes: "configure" comes first."""
    channel = Channel(connection)
    message = first_message(channel)
    if message.op != "configure":
        raise WireError(f"{message.op[:40]!r} where the configuration was due")
    core, description = build(message.fields)
    session = Session(core, shares_memory=True)
    channel.send("started", timeout=SEND_SECONDS, **description)
    while True:
        message = channel.poll(3600.0)
        if message is not None:
            session.answer(channel, message)


def main(argv: list[str]) -> None:
    """`--child FD PARENT`, or `--listen FD PARENT SETTINGS.json`: what EngineProcess and `serve-rollouts` start."""
    end_with_parent(int(argv[2]))
    connection = socket.socket(fileno=int(argv[1]))
    try:
        if argv[0] == "--child":
            serve_child(connection)
        else:
            from umer1.rl.engines.vllm_listen import serve_forever  # imports torch, for which no child must wait

            serve_forever(connection, json.loads(Path(argv[3]).read_text()))
    except ConnectionLost:
        print("the trainer has gone: this engine ends", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # vLLM's threads and exit handlers have nothing left to do, and some do not end on their own
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
