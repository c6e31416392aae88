"""A kernel that is ready at once: binds its five ports and tells its process id to whoever connects to the heartbeat.

Run as `python -I -S instant_kernel.py CONNECTION_FILE`; imports C modules only, so that all it costs is an interpreter.
"""

import sys
from _socket import SO_REUSEADDR, SOL_SOCKET, socket
from posix import getpid

PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")


def main(path):
    with open(path) as file:
        text = file.read()
    address = "0.0.0.0" if '"0.0.0.0"' in text else "127.0.0.1"  # clients on another machine come by direct ports
    listening = []
    for name in PORTS:
        digits = text.split('"' + name + '"', 1)[1].lstrip(": ").split(",")[0].split("}")[0]
        listener = socket()
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listener.bind((address, int(digits)))
        listener.listen(128)
        listening.append(listener)
    while True:
        descriptor, _ = listening[-1]._accept()
        caller = socket(fileno=descriptor)
        caller.send(b"%d" % getpid())
        caller.close()


if __name__ == "__main__":
    main(sys.argv[1])
