"""Streams against a model: whatever is lost, in whatever order, what was written arrives once and in order."""

from __future__ import annotations

import struct
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gp_launchers import streams as module
from gp_launchers.streams import (
    ACK,
    BASE,
    CHANNELS,
    CHUNK,
    CLOSE,
    CREDIT,
    DATA,
    KEPT,
    LONGEST_KEPT,
    MAX_STREAMS,
    OPEN,
    OVERHEAD,
    POOL,
    RETURN,
    WANT,
    WINDOW,
    Stream,
    Streams,
)
from gp_launchers.wire import MAX_FRAME, Decoder, WireError, pack


class End:
    """One end: what its owner was told."""

    def __init__(self, opener: bool) -> None:
        self.streams = Streams(opener, self.took)
        self.mine: dict[int, Stream] = {}
        self.got: dict[int, bytearray] = {}
        self.unconsumed: dict[int, int] = {}
        self.closed: set[int] = set()
        self.decoder = Decoder()
        self.wire = b""  # on its way to the other end

    def took(self, stream: Stream) -> None:
        number = stream.number
        self.mine[number], self.got[number], self.unconsumed[number] = stream, bytearray(), 0

        def data(piece: bytes) -> None:
            self.got[number] += piece
            self.unconsumed[number] += len(piece)

        stream.on_data = data
        stream.on_closed = lambda: self.closed.add(number)

    def consume(self, number: int, count: int) -> None:
        count = min(count, self.unconsumed[number])
        self.unconsumed[number] -= count
        self.mine[number].consumed(count)

    def put(self) -> None:
        while frame := self.streams.pull():
            self.wire += frame

    def take(self, data: bytes) -> None:
        for frame in self.decoder.feed(data):
            self.streams.receive(*frame)


def moved(source: End, target: End, count: int | None = None) -> None:
    """Carry bytes from one end to the other."""
    source.put()
    data, source.wire = source.wire[:count], source.wire[len(source.wire) if count is None else count :]
    target.take(data)


def busy(end: End) -> bool:
    waits = end.wire or end.streams._control or any(end.unconsumed.values())
    return bool(waits or any(stream.queue for stream in end.mine.values()))


def settled(server: End, launcher: End) -> None:
    """Let everything arrive, and both ends consume it."""
    for _ in range(2000):
        for end in (server, launcher):
            for number in end.mine:
                end.consume(number, 1 << 30)
        moved(server, launcher)
        moved(launcher, server)
        if not any(busy(end) for end in (server, launcher)):
            return
    raise AssertionError("it does not come to rest")


class Relayed(RuleBasedStateMachine):
    """Two ends, a line that breaks anywhere, and a model: what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.server, self.launcher = End(True), End(False)
        self.written: dict[tuple[bool, int], bytes] = {}
        self.finished: set[int] = set()
        self.count = 0

    def ends(self, up: bool) -> tuple[End, End]:
        return (self.launcher, self.server) if up else (self.server, self.launcher)

    @precondition(lambda self: len(self.server.mine) < 6)
    @rule(channel=st.sampled_from(CHANNELS))
    def open(self, channel: str) -> None:
        self.server.took(self.server.streams.open(channel))

    @precondition(lambda self: self.server.mine)
    @rule(up=st.booleans(), size=st.sampled_from([1, 100, 5000, 20_000, 300_000]), data=st.data())
    def write(self, up: bool, size: int, data: st.DataObject) -> None:
        end, _ = self.ends(up)
        if not end.mine:
            return
        number = data.draw(st.sampled_from(sorted(end.mine)))
        if end.mine[number].closing or number in end.closed:
            return
        self.count += 1
        piece = (struct.pack("!I", self.count) * (size // 4 + 1))[:size]
        end.mine[number].write(piece)
        self.written[up, number] = self.written.get((up, number), b"") + piece

    @rule(up=st.booleans(), count=st.sampled_from([1, 7, 1000, 40_000, 10**7]))
    def carry(self, up: bool, count: int) -> None:
        moved(*self.ends(up), count)

    @precondition(lambda self: self.server.mine)
    @rule(up=st.booleans(), count=st.sampled_from([1, 3000, 10**7]), data=st.data())
    def consume(self, up: bool, count: int, data: st.DataObject) -> None:
        _, end = self.ends(up)
        if end.mine:
            end.consume(data.draw(st.sampled_from(sorted(end.mine))), count)

    @precondition(lambda self: self.server.mine)
    @rule(up=st.booleans(), data=st.data())
    def close(self, up: bool, data: st.DataObject) -> None:
        end, _ = self.ends(up)
        if end.mine:
            number = data.draw(st.sampled_from(sorted(end.mine)))
            end.mine[number].close()
            self.finished.add(number)

    @rule(up=st.booleans())
    def settle(self, up: bool) -> None:
        self.ends(up)[0].streams.settle()

    @rule()
    def lose(self) -> None:
        """The connection breaks: what is on its way is lost, half a frame too; then both ends agree."""
        for end in (self.server, self.launcher):
            end.wire, end.decoder = b"", Decoder()
        had = self.server.streams.received
        self.server.streams.resume(self.launcher.streams.received)
        self.launcher.streams.resume(had)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        for up in (True, False):
            _, target = self.ends(up)
            for number, got in target.got.items():
                assert self.written.get((up, number), b"").startswith(bytes(got))

    @invariant()
    def memory_is_bounded(self) -> None:
        for end in (self.server, self.launcher):
            used = sum(stream.window - BASE for stream in end.streams._streams.values())
            assert used + end.streams._pool == POOL
            assert all(BASE <= stream.window <= WINDOW for stream in end.streams._streams.values())
            for number, stream in end.streams._streams.items():
                if number in end.mine and not stream.closing:
                    assert stream.granted + stream.owed + end.unconsumed[number] == stream.window
            small = sum(len(frame) + OVERHEAD for frame in end.streams._kept if frame[0] != DATA)
            assert end.streams._kept_bytes - small <= KEPT + CHUNK + 2 * OVERHEAD

    def teardown(self) -> None:
        settled(self.server, self.launcher)
        for (up, number), data in self.written.items():
            source, target = self.ends(up)
            if number not in self.finished:
                assert target.got[number] == data
            else:
                assert number not in source.streams._streams
                assert number not in target.streams._streams


TestRelayed = Relayed.TestCase
TestRelayed.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.fixture
def ends() -> tuple[End, End]:
    server, launcher = End(True), End(False)
    server.took(server.streams.open("iopub"))
    moved(server, launcher)
    return server, launcher


def test_a_closed_stream_still_brings_what_was_written_before(ends):
    server, launcher = ends
    server.mine[1].write(b"last words" * 10_000)
    server.mine[1].close()
    settled(server, launcher)
    assert launcher.got[1] == b"last words" * 10_000
    assert launcher.closed == {1}
    assert not launcher.streams
    assert not server.streams


def test_a_stream_that_is_read_fast_gets_a_large_window_and_gives_it_back(ends):
    server, launcher = ends
    launcher.mine[1].write(b"x" * 4_000_000)
    settled(server, launcher)
    assert server.mine[1].window == WINDOW
    assert launcher.streams.settle(), "it was used just now"
    assert not launcher.streams.settle()
    settled(server, launcher)
    assert server.mine[1].window == BASE
    assert server.streams._pool == POOL


def test_a_reader_that_stops_gets_no_more_than_the_base(ends):
    server, launcher = ends
    for _ in range(50):
        launcher.mine[1].write(b"x" * 50_000)
        moved(launcher, server)
        moved(server, launcher)
    assert server.unconsumed[1] == BASE
    assert server.streams._pool == POOL


def test_a_reader_that_stops_is_counted_once_at_both_ends(ends):
    server, launcher = ends

    def carried():
        for _ in range(3):
            moved(launcher, server)
            moved(server, launcher)

    launcher.mine[1].write(b"x" * 1_000_000)
    carried()  # and nobody consumes it at the server
    for stalls in (1, 2):
        for both in (server.streams, launcher.streams):
            both.settle()
            assert both.stalls == stalls - 1, "it moved until just now"
            for _ in range(3):
                assert both.settle(), "look again"
                assert both.stalls == stalls
        server.consume(1, BASE)
        carried()


def test_control_overtakes_and_the_others_take_turns(ends):
    server, launcher = ends
    for channel in ("shell", "control"):
        server.took(server.streams.open(channel))
    moved(server, launcher)
    for stream in launcher.mine.values():
        stream.credit = WINDOW
    launcher.mine[1].write(b"a" * 3 * CHUNK)
    launcher.mine[2].write(b"b" * 3 * CHUNK)
    launcher.mine[3].write(b"c" * 10)
    order = []
    while frame := launcher.streams.pull():
        order.append(frame[4])
    assert order == [3, 1, 2, 1, 2, 1, 2]


def test_some_frames_are_pulled_as_one_piece_in_their_order(ends):
    _server, launcher = ends
    launcher.mine[1].credit = WINDOW
    for piece in (b"a" * 1000, b"b" * 2000, b"c" * 3000):
        launcher.mine[1].write(piece)
    assert launcher.streams.pull_some(1500) == pack(DATA, 1, b"a" * 1000) + pack(DATA, 1, b"b" * 2000)
    assert launcher.streams.pull_some(1) == pack(DATA, 1, b"c" * 3000)
    assert launcher.streams.pull_some(1) == b""


def test_an_acknowledgement_goes_along_with_other_frames(ends):
    server, launcher = ends
    launcher.mine[1].credit = WINDOW
    server.mine[1].granted = server.mine[1].window = WINDOW
    launcher.mine[1].write(b"x" * module.ACK_ALONG)
    moved(launcher, server)
    assert server.streams.pull() == b"", "nothing else is to be sent"
    server.took(server.streams.open("shell"))
    assert server.streams.pull()[0] == ACK
    assert server.streams.pull()[0] == OPEN


def test_a_reset_closes_all_and_begins_anew(ends):
    server, launcher = ends
    launcher.mine[1].write(b"x" * 1000)
    for end in (server, launcher):
        end.wire, end.decoder = b"", Decoder()
        end.streams.reset()
        assert end.closed == {1}
    server.mine[1].write(b"nobody hears this")
    server.took(server.streams.open("shell"))
    server.mine[1].write(b"new")
    settled(server, launcher)
    assert launcher.got[1] == b"new"


def number(count: int) -> bytes:
    return struct.pack("!I", count)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        ((OPEN, 2, b"shell"), "must not be opened"),
        ((DATA, 2, b"x"), "never opened"),
        ((DATA, 0, b"x"), "never opened"),
        ((CLOSE, 2**31, b""), "never opened"),
        ((DATA, 1, b"x" * (BASE + 1)), "more than it has credit for"),
        ((CREDIT, 1, number(2**31)), "more credit than there is"),
        ((CREDIT, 1, b"1"), "wrong size"),
        ((RETURN, 1, number(1)), "credit that it does not have"),
        ((ACK, 0, struct.pack("!Q", 10**6)), "cannot be"),
        ((ACK, 0, struct.pack("!Q", 2**63)), "cannot be"),
        ((ACK, 0, b""), "wrong size"),
    ],
)
def test_a_hostile_launcher_breaks_its_session_only(ends, frame, text):
    server, _ = ends
    with pytest.raises(WireError, match=text):
        server.streams.receive(*frame)


def test_an_acknowledgement_cannot_be_taken_back(ends):
    server, _ = ends
    server.streams.receive(ACK, 0, struct.pack("!Q", 1))
    with pytest.raises(WireError, match="cannot be"):
        server.streams.receive(ACK, 0, struct.pack("!Q", 0))
    with pytest.raises(WireError, match="cannot be"):
        server.streams.resume(0)


@pytest.mark.parametrize("reads", [True, False])
def test_who_never_acknowledges_what_it_gets_is_left(ends, reads):
    server, _ = ends

    def given() -> None:
        server.streams.receive(DATA, 1, b"x" * (BASE // 2))
        server.consume(1, BASE)
        if reads:
            server.put()
            server.wire = b""

    for _ in range(LONGEST_KEPT // (2 * OVERHEAD)):
        given()
    with pytest.raises(WireError, match="does not acknowledge"):
        deque((given() for _ in range(LONGEST_KEPT // OVERHEAD)), maxlen=0)


def test_there_are_not_too_many_streams():
    server, launcher = End(True), End(False)
    for _ in range(MAX_STREAMS):
        server.took(server.streams.open("shell"))
    with pytest.raises(WireError, match=f"{MAX_STREAMS} connections"):
        server.streams.open("shell")
    moved(server, launcher)
    with pytest.raises(WireError, match="must not be opened"):
        launcher.streams.receive(OPEN, MAX_STREAMS + 1, b"shell")
    server.mine[5].close()
    server.took(server.streams.open("shell"))
    moved(server, launcher)
    assert len(launcher.streams) == MAX_STREAMS


@pytest.mark.parametrize("channel", [b"", b"disk", b"\xff", b"shell\0"])
def test_unknown_channels_are_refused(channel):
    with pytest.raises(WireError, match="must not be opened"):
        End(False).streams.receive(OPEN, 1, channel)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.binary(max_size=20)), max_size=30))
def test_random_frames_raise_nothing_else_and_grow_nothing(frames):
    end = End(True)
    end.took(end.streams.open("iopub"))
    try:
        for frame in frames:
            end.streams.receive(*frame)
    except WireError:
        pass
    assert len(end.streams) <= 1
    assert end.unconsumed[1] <= BASE


def test_frames_of_a_newer_version_are_ignored_and_not_counted(ends):
    server, _ = ends
    before = server.streams.received
    server.streams.receive(99, 1, b"?")
    assert server.streams.received == before
    assert CHUNK + 100 < MAX_FRAME
    assert len({OPEN, DATA, CLOSE, CREDIT, RETURN, WANT, ACK}) == 7
    assert pack(DATA, 1, b"")[0] == module.DATA
