"""A line between two networks: moves Ethernet frames between two TAP devices, as slowly and as badly as it is told.

Arguments: descriptor of the near TAP device, name of the far one, seed. The far device is made in the network
namespace that this process runs in. Commands come as JSON objects, one a line, and are answered likewise; the end of
the input is the end of the line.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from typing import Any

SET_INTERFACE = 0x400454CA  # TUNSETIFF
TAP, NO_HEADER = 0x0002, 0x1000
LARGEST = 65536
AT_ONCE = 64  # frames of one direction, until the other one has its turn
SYN, RST, ACK = 0x02, 0x04, 0x10


def open_tap(name: str) -> int:
    """Make a TAP device in this network namespace; it lives as long as the descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TAP | NO_HEADER))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Line:
    """Both directions.

    Args:
        near: Descriptor of a TAP device.
        far: Another one.
        seed: Decides which frames are lost.
    """

    def __init__(self, near: int, far: int, seed: int) -> None:
        self.delay = 0.0  # seconds that a round trip takes longer
        self.loss = 0.0  # share of the frames
        self.rate = 0.0  # bytes a second, each way; 0: as fast as it goes
        self.queue = 0.03  # seconds that a frame may wait for its turn at that rate; more are dropped
        self.blackout = False
        self.carried = self.lost = 0
        self._random = random.Random(seed)
        self._near, self._far = near, far
        self._other = {near: far, far: near}
        self._free = {near: 0.0, far: 0.0}  # when what was sent there until now is on the wire
        self._last = {near: 0.0, far: 0.0}
        self._waiting: dict[int, deque[tuple[float, bytes]]] = {near: deque(), far: deque()}
        self._flows: set[bytes] = set()  # ports of the far side that have TCP connections
        self._dead: set[bytes] = set()  # those whose connections are not known any more

    def command(self, told: dict[str, Any]) -> dict[str, Any]:
        """Do as told and answer."""
        if told.pop("reset", False):
            self._dead |= self._flows
            self._flows.clear()
        for name, value in told.items():
            setattr(self, name, value)
        return {"carried": self.carried, "lost": self.lost}

    def run(self) -> None:
        """Forward until the input ends."""
        commands = sys.stdin.fileno()
        while True:
            ready, _, _ = select.select([self._near, self._far, commands], [], [], self._flush())
            if commands in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                print(json.dumps(self.command(json.loads(line))), flush=True)
                continue
            for source in ready:
                self._read(source)

    def _read(self, source: int) -> None:
        for _ in range(AT_ONCE):
            try:
                frame = os.read(source, LARGEST)
            except BlockingIOError:
                return
            if not self._knows(source, frame):
                _write(source, answered_with_reset(frame))
                _write(self._other[source], turned_into_reset(frame))
            elif self.blackout or (self.loss and self._random.random() < self.loss):
                self.lost += 1
            else:
                self._take(self._other[source], frame)

    def _take(self, target: int, frame: bytes) -> None:
        now = when = time.monotonic()
        if self.rate:
            begin = max(self._free[target], now)
            if begin - now > self.queue:
                self.lost += 1
                return
            self._free[target] = when = begin + len(frame) / self.rate
        self.carried += 1
        when = self._last[target] = max(when + self.delay / 2, self._last[target])
        if when <= now and not self._waiting[target]:
            _write(target, frame)
        else:
            self._waiting[target].append((when, frame))

    def _flush(self) -> float | None:
        """Send what is due; return how long the next one waits."""
        now = time.monotonic()
        for target, waiting in self._waiting.items():
            while waiting and waiting[0][0] <= now:
                _, frame = waiting.popleft()
                if not self.blackout:
                    _write(target, frame)
        due = [waiting[0][0] for waiting in self._waiting.values() if waiting]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _knows(self, source: int, frame: bytes) -> bool:
        """Whether this is no segment of a TCP connection that was reset."""
        if not is_tcp(frame):
            return True
        port = frame[36:38] if source == self._near else frame[34:36]
        flags = frame[47]
        if port in self._dead:
            if flags & (SYN | ACK) != SYN:
                return bool(flags & RST)
            self._dead.discard(port)  # it is used again
        self._flows.add(port)
        return True


def is_tcp(frame: bytes) -> bool:
    """Whether a frame holds a TCP segment in an IPv4 packet without options."""
    return len(frame) >= 54 and frame[12:15] == b"\x08\x00\x45" and frame[23] == 6


def answered_with_reset(frame: bytes) -> bytes:
    """Return the RST for the sender of a segment, as from its receiver."""
    ports = frame[36:38] + frame[34:36]
    return _reset(frame[6:12] + frame[0:6], frame[30:34] + frame[26:30], ports, frame[42:46])


def turned_into_reset(frame: bytes) -> bytes:
    """Return the RST for the receiver of a segment, as from its sender."""
    return _reset(frame[0:12], frame[26:34], frame[34:38], frame[38:42])


def _reset(hardware: bytes, addresses: bytes, ports: bytes, sequence: bytes) -> bytes:
    segment = struct.pack("!4s4sIBBHHH", ports, sequence, 0, 5 << 4, RST, 0, 0, 0)
    pseudo = addresses + struct.pack("!HH", 6, len(segment))
    segment = segment[:16] + checksum(pseudo + segment) + segment[18:]
    packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0) + addresses
    packet = packet[:10] + checksum(packet) + packet[12:]
    return hardware + b"\x08\x00" + packet + segment


def checksum(data: bytes) -> bytes:
    """Return the checksum of IP and TCP of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def _write(target: int, frame: bytes) -> None:
    try:
        os.write(target, frame)
    except OSError:
        pass  # the device is down


if __name__ == "__main__":
    line = Line(int(sys.argv[1]), open_tap(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({}), flush=True)
    line.run()
