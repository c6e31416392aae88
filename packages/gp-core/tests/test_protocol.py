import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core import protocol
from gp_core.errors import KERNEL_DIED, NO_PORT, ProtocolError
from gp_core.protocol import Exited, Hello, Listening
from gp_launchers.wire import MAX_HELLO, Decoder, WireError, pack, pack_message, unpack_message

HELLO = {"type": "hello", "versions": [2], "kernel_id": "k", "token": "TOKEN", "secret": "SECRET", "run": 1}
PORTS = {name: 40000 + number for number, name in enumerate(protocol.PORTS)}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.sampled_from(
        ["type", "versions", "kernel_id", "token", "secret", "run", "pid", "ports", "code", "stderr", "reason"]
    )
    | st.text(),
    anything | st.sampled_from(["hello", "listening", "exited", [2], PORTS]),
)
frames = st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300))


@given(st.lists(frames), st.randoms())
def test_frames_survive_any_cutting(sent: list[tuple[int, int, bytes]], random: object) -> None:
    stream = b"".join(pack(*frame) for frame in sent)
    decoder, received, start = Decoder(), [], 0
    while start < len(stream):
        end = start + random.randint(1, 50)  # type: ignore[attr-defined]
        received += decoder.feed(stream[start:end])
        start = end
    assert received == sent


@given(st.binary(max_size=2000))
def test_garbage_is_frames_or_a_wire_error_and_never_kept_beyond_the_limit(data: bytes) -> None:
    decoder = Decoder(limit=100)
    try:
        decoder.feed(data)
    except WireError:
        return
    assert len(decoder._buffer) <= 100 + 9


def test_a_huge_frame_is_refused_by_its_header() -> None:
    with pytest.raises(WireError, match="at most"):
        Decoder(MAX_HELLO).feed(pack(0, 0, b"")[:5] + (MAX_HELLO + 1).to_bytes(4, "big"))


@given(fields)
def test_messages_are_read_or_refused(message: dict[str, object]) -> None:
    for kind in (Hello, Listening, Exited):
        try:
            read = kind.read(message)
        except ProtocolError:
            continue
        assert read


@given(st.binary(max_size=200) | fields.map(lambda message: json.dumps(message).encode()))
def test_payloads_are_messages_or_refused(payload: bytes) -> None:
    try:
        assert isinstance(unpack_message(payload)["type"], str)
    except WireError:
        pass


def test_a_deeply_nested_payload_is_refused() -> None:
    with pytest.raises(WireError):
        unpack_message(b'{"type":' + b"[" * 100_000)


def test_hello_shows_no_secret_and_unknown_fields_are_ignored() -> None:
    hello = Hello.read({**HELLO, "colour": "red", "capabilities": ["restart", 7, "fly"]})
    assert hello.capabilities == {"restart", "fly"}
    assert "TOKEN" not in repr(hello)
    assert "SECRET" not in repr(hello)
    assert not Hello.read({**HELLO, "versions": [3, 4]}).speaks


@pytest.mark.parametrize("port", [0, -1, 65536, "80", None, True, 1.5])
def test_a_port_is_a_port(port: object) -> None:
    with pytest.raises(ProtocolError):
        Listening.read({"type": "listening", "run": 1, "ports": {**PORTS, "hb_port": port}})


def test_exited_has_a_typed_reason() -> None:
    assert Exited.read({"type": "exited", "run": 1, "code": -9, "reason": "NoPort"}).reason is NO_PORT
    assert Exited.read({"type": "exited", "run": 1, "code": None, "reason": "FromTheFuture"}).reason is KERNEL_DIED


def test_secrets_are_kept_as_digests() -> None:
    kept = protocol.digest("token")
    assert "token" not in kept
    assert protocol.matches("token", kept)
    assert not protocol.matches("token2", kept)


def test_a_message_too_large_to_be_taken_is_refused_here() -> None:
    with pytest.raises(WireError, match="restart"):
        pack_message(protocol.restart(2, env={"A": "x" * 2_000_000}, argv=[], cwd=None))
