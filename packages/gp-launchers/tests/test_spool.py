"""The spool leaves out whole messages only, counts them, and keeps the rest in order."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_launchers.relay import ENOUGH, Channel
from gp_launchers.spool import Full, Messages, Spool

GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32
READY = b"\x04\x05READY"


def message(number: int, *sizes: int) -> bytes:
    """A ZMTP message whose frames have these sizes; its first bytes are its number."""
    body = b""
    for place, size in enumerate(sizes):
        more = place < len(sizes) - 1
        data = (b"%06d" % number).ljust(size, b".")
        if len(data) < 256:
            body += bytes([more, len(data)]) + data
        else:
            body += bytes([more | 2]) + len(data).to_bytes(8, "big") + data
    return body


def numbers(data: bytes) -> list[int]:
    """The numbers of whole messages; fails if one is cut."""
    found, position, first = [], 0, True
    while position < len(data):
        flags = data[position]
        size = int.from_bytes(data[position + 1 : position + 9], "big") if flags & 2 else data[position + 1]
        position += 9 if flags & 2 else 2
        assert position + size <= len(data), "a message is cut"
        if first:
            found.append(int(data[position : position + 6]))
        first = not flags & 1
        position += size
    assert first, "a message is cut between its frames"
    return found


shapes = st.lists(st.lists(st.sampled_from([6, 40, 255, 256, 700]), min_size=1, max_size=4), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(shapes, st.lists(st.integers(1, 900), min_size=1), st.lists(st.booleans(), min_size=1), st.integers(0, 9000))
def test_what_comes_out_is_whole_messages_in_order(tmp_path_factory, shapes, cuts, takes, limit):
    path = str(tmp_path_factory.getbasetemp() / f"spool-{os.urandom(4).hex()}")
    messages, rest = Messages(), b"".join(message(number, *sizes) for number, sizes in enumerate(shapes))
    assert messages.ends(GREETING + READY) == [len(GREETING + READY)]
    spool, out, step = Spool(path, limit, messages.between), b"", 0
    try:
        while rest:
            size = cuts[step % len(cuts)]
            piece, rest = rest[:size], rest[size:]
            spool.append(piece, messages.ends(piece))
            assert len(spool) <= limit
            if takes[step % len(takes)]:
                out += spool.take(size)
            step += 1
    except Full:
        return  # the message had begun to go out: the connection is given up
    finally:
        lost = spool.lost_messages
        while part := spool.take(100):
            out += part
        spool.close()
    told = numbers(out)
    assert told == sorted(set(told))
    assert len(told) + lost == len(shapes)
    assert not os.path.exists(path)


def test_everything_is_kept_where_there_is_room(tmp_path):
    spool = Spool(str(tmp_path / "s"), 10_000, False)
    spool.append(b"a" * 5000, [])
    assert spool.take(3000) == b"a" * 3000
    spool.append(b"b" * 5000, [])
    assert spool.take(10_000) == b"a" * 2000 + b"b" * 5000
    assert (len(spool), spool.lost_bytes, os.listdir(tmp_path)) == (0, 0, [])
    spool.close()


def test_a_file_that_is_never_empty_does_not_grow(tmp_path):
    spool, written, read = Spool(str(tmp_path / "s"), 1000, True), b"", b""
    for number in range(200):
        piece = message(number, 400)
        spool.append(piece, [len(piece)])
        written += piece
        read += spool.take(len(piece) - 1)
        assert os.fstat(spool._file).st_size <= 3000
    while part := spool.take(77):
        read += part
    assert numbers(read) == list(range(200))
    assert read == written
    spool.close()


def test_a_message_that_has_begun_to_go_out_cannot_be_left_out(tmp_path):
    spool = Spool(str(tmp_path / "s"), 100, True)
    spool.append(b"x" * 80, [])
    spool.take(10)
    with pytest.raises(Full):
        spool.append(b"x" * 80, [])
    spool.close()


def test_a_full_disk_is_a_limit_too(tmp_path, monkeypatch):
    spool, messages = Spool(str(tmp_path / "s"), 10**6, True), Messages()
    messages.ends(GREETING)
    whole = message(1, 300)
    spool.append(whole, messages.ends(whole))
    real = os.pwrite

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for number in (2, 3):
        spool.append(message(number, 300), messages.ends(message(number, 300)))
    monkeypatch.setattr(os, "pwrite", real)
    spool.append(message(4, 300), messages.ends(message(4, 300)))
    assert numbers(spool.take(10**6)) == [1, 4]
    assert spool.lost_messages == 2
    spool.close()


@pytest.mark.parametrize(
    "greeting", [b"\xff" + b"\0" * 8 + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" * 32, b"?" * 64]
)
def test_of_other_protocols_the_ends_are_not_known(greeting):
    messages = Messages()
    assert messages.ends(greeting + message(1, 10)) == []
    assert not messages.known
    assert not messages.between


@given(shapes, st.integers(1, 50))
def test_ends_do_not_depend_on_how_the_bytes_come(shapes, size):
    data = GREETING + b"".join(message(number, *sizes) for number, sizes in enumerate(shapes))
    whole, pieces = Messages(), Messages()
    expected = whole.ends(data)
    found = [start + end for start in range(0, len(data), size) for end in pieces.ends(data[start : start + size])]
    assert found == expected
    assert len(found) == len(shapes)
    assert whole.between
    assert pieces.between


class FakeStream:
    """A stream whose queue the test fills and empties."""

    channel = "iopub"

    def __init__(self):
        self.queued = 0
        self.sent = b""

    def write(self, data):
        self.sent += data


def test_the_rest_of_a_message_that_was_left_out_never_goes_out(tmp_path):
    stream, lost = FakeStream(), []
    relay = SimpleNamespace(
        folder=lambda: str(tmp_path),
        buffer=300,
        send=lambda stream, data: stream.write(data),
        dropped=lambda messages, size: lost.append((messages, size)),
    )
    channel = Channel(relay, stream)
    channel._tell(GREETING + READY, channel._messages)
    stream.queued = ENOUGH  # nobody takes what comes now
    long = message(1, 700)
    channel._tell(long[:400], channel._messages)
    stream.queued = 0
    stream.on_drained()
    channel._tell(long[400:] + message(2, 40)[:10], channel._messages)
    channel._tell(message(2, 40)[10:] + message(3, 40), channel._messages)
    assert numbers(stream.sent[len(GREETING + READY) :]) == [2, 3]
    assert lost == [(1, len(long))]
