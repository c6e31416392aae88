"""A kernel that speaks ZeroMQ and nothing of Jupyter's: for conversations that no notebook would have.

Argument: connection file. Shell, control, stdin and hb send back what they get; a request ``many COUNT SIZE`` gets
COUNT messages of SIZE bytes each, numbered in their first eight. Iopub says ``tick`` all the time.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import zmq

info = json.loads(Path(sys.argv[1]).read_text())
context = zmq.Context()


def bound(kind: int, name: str) -> zmq.Socket[bytes]:
    made = context.socket(kind)
    made.sndhwm = made.rcvhwm = 4  # what waits here is not what is measured
    port = info[f"{name}_port"]
    made.bind(f"ipc://{info['ip']}-{port}" if info["transport"] == "ipc" else f"tcp://{info['ip']}:{port}")
    return made


def echo(name: str) -> None:
    router = bound(zmq.ROUTER, name)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # wait for a slow reader, and drop nothing of his
    while True:
        client, *parts = router.recv_multipart(copy=False)
        words = bytes(parts[0]).split() if len(parts[0]) < 100 else []
        try:
            if words[:1] == [b"many"]:
                for number in range(int(words[1])):
                    router.send_multipart([client, number.to_bytes(8, "big") + bytes(int(words[2]) - 8)])
            else:
                router.send_multipart([client, *parts])
        except zmq.ZMQError:
            pass  # it has gone


def tick() -> None:
    publisher = bound(zmq.PUB, "iopub")
    while True:
        publisher.send(b"tick")
        time.sleep(0.05)


for name in ("shell", "control", "stdin", "hb"):
    threading.Thread(target=echo, args=(name,)).start()
tick()
