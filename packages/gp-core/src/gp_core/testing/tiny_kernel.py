"""A kernel for tests that any Python from 3.8 on can run by ``-c``: binds its ports, answers questions, sleeps.

Its arguments: connection file; "serve", "never" (never listens) or "exit:CODE"; words that it only tells back.
Whoever connects to one of its ports and sends a line gets a JSON object: what this process sees of itself.
"""

import glob
import json
import os
import select
import signal
import socket
import sys
import time

PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
HELLO = "the tiny kernel runs"
LAST_WORDS = "the tiny kernel gives up"


def cmdlines() -> list:  # type: ignore[type-arg]  # Python 3.8
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as file:
                found.append(file.read().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            pass
    return found


def main() -> None:
    path, mode = sys.argv[1:3]
    signals = []
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    with open(path) as file:
        connection = json.load(file)
    sys.stdout.write(HELLO + "\n")
    sys.stdout.flush()
    if mode.startswith("exit:"):
        sys.stderr.write(LAST_WORDS + "\n")
        sys.exit(int(mode[5:]))
    while mode == "never":
        time.sleep(3600)
    listeners = []
    for name in PORTS:
        listener = socket.socket(socket.AF_INET6 if ":" in connection["ip"] else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((connection["ip"], connection[name]))
        listener.listen(16)
        listeners.append(listener)
    while True:
        for listener in select.select(listeners, [], [])[0]:
            peer = listener.accept()[0]
            with peer:
                peer.settimeout(5)
                try:
                    if peer.makefile().readline():  # a mere probe says nothing
                        seen = {"env": dict(os.environ), "cwd": os.getcwd(), "words": sys.argv[3:], "pid": os.getpid()}
                        seen.update(host=socket.gethostname(), signals=signals, cmdlines=cmdlines())
                        peer.sendall(json.dumps(seen).encode())
                except (OSError, ValueError):
                    pass


if __name__ == "__main__":
    main()
