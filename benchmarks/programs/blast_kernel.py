"""A kernel that says as much as it is asked for: `python blast_kernel.py CONNECTION_FILE`.

It speaks ZeroMQ as kernels do, but not Jupyter's messages, so that nothing is left but the way to the client. A request
on shell or control is ``get``, size, channel and topic: so many bytes come back, on shell, or on iopub after the topic;
or ``put`` and bytes: they are counted. The heartbeat echoes.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import zmq

CHANNELS = {"shell": zmq.ROUTER, "iopub": zmq.PUB, "stdin": zmq.ROUTER, "control": zmq.ROUTER, "hb": zmq.ROUTER}


def bound(context: zmq.Context[Any], info: dict[str, Any], channel: str) -> zmq.Socket[Any]:
    """Bind the socket of a channel."""
    made = context.socket(CHANNELS[channel])
    separator = ":" if info["transport"] == "tcp" else "-"
    made.bind(f"{info['transport']}://{info['ip']}{separator}{info[f'{channel}_port']}")
    return made


def echo(heartbeat: zmq.Socket[Any]) -> None:
    """As ipykernel does: a thread of its own, without the interpreter."""
    zmq.proxy(heartbeat, heartbeat)


def serve(sockets: dict[str, zmq.Socket[Any]]) -> None:
    """Answer requests for ever."""
    poller = zmq.Poller()
    requests = [sockets["shell"], sockets["control"]]
    for one in requests:
        poller.register(one, zmq.POLLIN)
    data = b""
    while True:
        for one, _ in poller.poll():
            client, what, *rest = one.recv_multipart(copy=False)
            if what.bytes == b"put":
                one.send_multipart([client.bytes, b"%d" % len(rest[0])])
                continue
            size, channel = int(rest[0].bytes), rest[1].bytes.decode()
            if len(data) != size:
                data = bytes(size)
            if channel == "iopub":
                sockets["iopub"].send_multipart([rest[2].bytes, data], copy=False)
            else:
                one.send_multipart([client.bytes, data], copy=False)


def main() -> None:
    with open(sys.argv[1]) as file:
        info = json.load(file)
    context: zmq.Context[Any] = zmq.Context()
    sockets = {channel: bound(context, info, channel) for channel in CHANNELS}
    threading.Thread(target=echo, args=(sockets["hb"],), daemon=True).start()
    serve(sockets)


if __name__ == "__main__":
    main()
