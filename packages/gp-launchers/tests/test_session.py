"""The conversation with the server, and what happens without one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import sys
import time

import pytest
from launcher_kit import Server, alive, eventually, make_certificate

from gp_launchers import wire


def test_a_lost_session_is_dialled_again_and_the_report_repeated(launch, server):
    running = launch()
    connection, hello = server.meet()
    listening = connection.next("listening")
    connection.cut()
    connection, again = server.meet()
    assert (again["token"], again["secret"], again["pid"]) == (hello["token"], hello["secret"], running.pid)
    assert connection.next("listening") == listening
    os.kill(listening["pid"], signal.SIGKILL)
    exited = connection.next("exited")
    connection.cut()
    connection, _ = server.meet()
    assert connection.next("exited") == exited
    connection.send(type="restart", run=2)
    assert connection.next("listening")["run"] == 2


def test_sessions_that_have_lived_for_a_while_are_dialled_again_soon(launch, server):
    launch(tuned=("supervisor.STEADY = 0.1", "dialer.LONGEST_PAUSE = 1000.0"))
    began = time.monotonic()
    for _ in range(10):  # with pauses that double, the last one alone would take a minute
        connection, _ = server.meet(60)
        connection.next("listening")
        time.sleep(0.25)
        connection.cut()
    assert time.monotonic() - began < 12


def test_a_server_that_comes_back_on_its_port(launch, server):
    running = launch()
    connection, _ = server.meet()
    kernel = connection.next("listening")["pid"]
    server.stop()
    time.sleep(0.7)
    assert alive(kernel)
    server.start()
    connection, hello = server.meet()
    assert connection.next("listening")["pid"] == kernel
    assert hello["pid"] == running.pid


def test_an_exit_without_a_session_is_told_later(launch, server):
    running = launch(tuned=("supervisor.Supervisor._nobody_there = lambda self: None",))
    connection, _ = server.meet()
    kernel = connection.next("listening")["pid"]
    server.stop()
    os.kill(kernel, signal.SIGKILL)
    eventually(lambda: not alive(kernel))
    server.start()
    connection, _ = server.meet()
    assert connection.next("exited")["code"] == -9
    connection.send(type="shutdown")
    assert running.wait() == 137


def test_a_lost_accepted(launch, server):
    launch()
    connection = server.next()
    hello = connection.next("hello")
    connection.cut()  # the server had accepted, but the launcher never heard of it
    connection, again = server.meet()
    assert again["secret"] == hello["secret"]
    assert connection.next("listening")


def test_no_answer_to_hello(launch, server):
    launch(tuned=("session.DEADLINE = 0.3",))
    connection = server.next()
    connection.next("hello")
    assert connection.closed.wait(5)
    connection, _ = server.meet()
    assert connection.next("listening")


def test_a_silent_listener(launch, server):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        addresses = f"127.0.0.1:{silent.getsockname()[1]},{server.address}"
        launch(options=("--response-address", addresses), tuned=("session.DEADLINE = 0.3",))
        connection, _ = server.meet()
        assert connection.next("listening")


def test_nothing_is_sent_to_a_server_with_another_certificate(launch, server, tmp_path):
    (tmp_path / "other").mkdir()
    impostor = Server(*make_certificate(tmp_path / "other"))
    try:
        addresses = f"{impostor.address},{server.address}"
        running = launch(options=("--response-address", addresses))
        stranger = impostor.next()
        connection, _ = server.meet()
        assert connection.next("listening")
        assert stranger.closed.wait(5)
        assert stranger.bytes == 0
        assert impostor.pin in running.log
    finally:
        impostor.stop()


def test_a_second_pin(launch, server):
    launch(options=("--public-key", "00" * 32 + "," + server.pin))
    connection, _ = server.meet()
    assert connection.next("listening")


def test_a_server_by_name(launch, server):
    launch(options=("--response-address", f"no-such-host.invalid:1,localhost:{server.port}"))
    connection, _ = server.meet(20)
    assert connection.next("listening")


def test_an_address_of_a_family_that_the_machine_lacks_is_passed_over(launch, server):
    nowhere = "dialer._literal = lambda host, port: (9999 if host == '192.0.2.1' else 2, (host, port))"
    running = launch(options=("--response-address", f"192.0.2.1:1,127.0.0.1:{server.port}"), tuned=(nowhere,))
    for _ in range(2):
        connection, _ = server.meet()
        connection.cut()
    assert "not supported" in running.log


def test_a_resolver_that_can_have_no_thread(launch, server):
    none = "def none(*rest): raise RuntimeError('no more threads')"
    running = launch(
        options=("--response-address", f"somewhere.invalid:1,127.0.0.1:{server.port}"),
        tuned=("import _thread", none, "_thread.start_new_thread = none"),
    )
    for _ in range(2):
        connection, _ = server.meet()
        connection.cut()
    assert "no more threads" in running.log
    assert alive(running.pid)


def test_refused_but_not_for_good(launch, server):
    running = launch()
    for reason in ("not_here", "unknown_kernel"):
        connection = server.next()
        connection.next("hello")
        connection.send(type="refused", reason=reason, text="somewhere else", final=False)
    connection, _ = server.meet()
    assert connection.next("listening")
    assert "refused: somewhere else" in running.log


def test_refused_for_good(launch, server):
    running = launch()
    connection = server.next()
    connection.next("hello")
    kernel = running.kernel()["pid"]
    connection.send(type="refused", reason="bad_token", text="no", final=True)
    assert running.wait() == 77
    assert not alive(kernel)


def test_nothing_but_the_answer_counts_before_it(launch, server):
    running = launch()
    connection = server.next()
    connection.next("hello")
    kernel = running.kernel()["pid"]
    connection.send(type="signal", signum=9)
    connection.send(type="shutdown", grace=0)
    connection.send(type="restart", run=2)
    connection.send(type="ping", n=3)
    assert connection.next("pong")["n"] == 3
    assert alive(kernel)
    connection.accept()
    assert connection.next("listening")["run"] == 1


def test_what_is_not_known_is_ignored(launch, server):
    launch()
    connection, _ = server.meet(orphan_timeout="long", linger=None, ping=[], more={"x": 1})
    connection.next("listening")
    connection.send(type="dance", how="well")
    connection.send_raw(wire.pack(9, 4, b"\0" * 1000))
    connection.send_raw(wire.pack(wire.MESSAGE, 4, b"not json"))
    connection.accept()
    connection.send(type="ping", n="a", extra=True)
    assert connection.next("pong")["n"] == "a"


@pytest.mark.parametrize(
    "data", [wire.pack(wire.MESSAGE, 0, b"nonsense"), wire.pack(0, 0, b"[]"), b"\0" * 5 + b"\xff" * 4, os.urandom(4096)]
)
def test_garbage_ends_the_session_not_the_launcher(launch, server, data):
    launch()
    connection, _ = server.meet()
    connection.next("listening")
    data = data if data[:1] == b"\0" else b"\0" * 5 + b"\xff" + data
    connection.send_raw(data)
    assert connection.closed.wait(5)
    connection, _ = server.meet()
    assert connection.next("listening")


def test_connections_that_are_reset_at_the_end_of_their_handshake(launch, server, certificate):
    """What has been read by then ends it, but hello, which goes out right after, finds no connection any more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[0])
    server.stop()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", server.port))
        listener.listen()
        listener.settimeout(5)
        running = launch(tuned=("dialer.LONGEST_PAUSE = 0.01",))
        for _ in range(20):
            connection, _ = listener.accept()
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_side=True)
            incoming.write(connection.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(outgoing.read())
            connection.close()
    server.start()
    connection, _ = server.meet()
    assert connection.next("listening")
    assert "Traceback" not in running.log


def test_an_error_of_the_sessions_own_costs_the_session_and_not_the_kernel(launch, server):
    running = launch(tuned=("session.Session._decrypt = lambda self, *rest: 1 / 0", "dialer.LONGEST_PAUSE = 0.01"))
    for _ in range(3):
        server.next().next("hello")
    assert "ZeroDivisionError" in running.log
    assert alive(running.pid)


def test_pings_and_a_dead_peer(launch, server):
    launch()
    connection, _ = server.meet(ping=0.2)
    begin = time.monotonic()
    connection.next("listening")
    assert connection.next("ping")["n"] == 1
    assert connection.closed.wait(5)  # nobody answered
    assert 0.4 < time.monotonic() - begin < 1.5
    connection, _ = server.meet(ping=0.2)
    connection.next("listening")
    for _ in range(4):
        connection.send(type="pong", n=connection.next("ping")["n"])
    assert not connection.closed.is_set()


def test_idle_means_idle(launch, server):
    running = launch()
    connection, _ = server.meet(ping=30)
    connection.next("listening")
    time.sleep(0.2)

    def switches():
        with open(f"/proc/{running.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt"))

    before = switches()
    time.sleep(1)
    assert switches() - before <= 1


def test_nobody_ever_accepts(launch, server):
    server.stop()
    running = launch(tuned=("supervisor.FIRST_ACCEPTANCE = 0.5",))
    kernel = running.kernel()["pid"]
    begin = time.monotonic()
    assert running.wait() == 75
    assert time.monotonic() - begin < 5
    assert not alive(kernel)


@pytest.mark.parametrize("source", ["option", "server"])
def test_an_orphan_ends_itself(launch, server, source):
    running = launch(options=("--orphan-timeout", "0.5" if source == "option" else "300"))
    connection, _ = server.meet(**({"orphan_timeout": 0.5} if source == "server" else {}))
    kernel = connection.next("listening")["pid"]
    time.sleep(0.7)  # it does not count while the session lasts
    assert alive(kernel)
    server.stop()
    assert running.wait(5) == 75
    assert not alive(kernel)


def test_a_reconnect_stops_the_orphan_clock(launch, server):
    launch(options=("--orphan-timeout", "1"))
    connection, _ = server.meet()
    kernel = connection.next("listening")["pid"]
    connection.cut()
    connection, _ = server.meet()
    time.sleep(1.3)
    assert alive(kernel)


def test_linger_after_an_exit(launch, server):
    running = launch("brief", "1", "5")
    connection, _ = server.meet(linger=0.5)
    connection.next("listening")
    assert connection.next("exited")["code"] == 5
    begin = time.monotonic()
    assert running.wait() == 5
    assert 0.4 < time.monotonic() - begin < 2


def test_no_linger_when_the_server_is_gone(launch, server):
    running = launch("brief", "1", "5")
    connection, _ = server.meet(linger=60)
    connection.next("listening")
    connection.next("exited")
    begin = time.monotonic()
    server.stop()
    assert running.wait() == 5
    assert time.monotonic() - begin < 3


def test_no_linger_when_the_server_went_first(launch, server):
    running = launch("brief", "0.5", "0")
    connection, _ = server.meet(linger=60)
    connection.next("listening")
    server.stop()
    assert running.wait(5) == 0


def test_no_linger_when_the_server_does_not_know_the_kernel(launch, server):
    running = launch("brief", "1", "5")
    connection, _ = server.meet(linger=60)
    connection.next("listening")
    connection.next("exited")
    connection.cut()
    connection = server.next()
    connection.next("hello")
    connection.send(type="refused", reason="unknown_kernel", text="?", final=False)
    assert running.wait(5) == 5


def test_a_network_that_does_not_answer_waits_out_the_linger(launch, server):
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # its queue is full: further connections get no answer
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        running = launch(
            "brief",
            "0.3",
            "5",
            options=("--response-address", f"{server.address},127.0.0.1:{full.getsockname()[1]}"),
            tuned=("session.DEADLINE = 0.2",),
        )
        connection, _ = server.meet(linger=1.5)
        connection.next("listening")
        connection.next("exited")
        begin = time.monotonic()
        server.stop()
        assert running.wait(10) == 5
        assert 1.2 < time.monotonic() - begin < 5


def test_two_launchers_with_one_kernel_id_do_not_meet(launch, server):
    first, second = launch(), launch()
    ports = set()
    for _ in range(2):
        connection, _ = server.meet()
        ports |= set(connection.next("listening")["ports"].values())
    assert len(ports) == 10
    assert os.path.dirname(first.kernel()["path"]) != os.path.dirname(second.kernel()["path"])


def test_a_python_without_tls_13(launch, server):
    running = launch(tuned=("import ssl", "ssl.HAS_TLSv1_3 = False"))
    assert running.wait() == 78
    assert "TlsUnsupported: " in running.log
    eventually(lambda: list(launch.runtime.iterdir()) == [])


def test_a_message_that_cannot_be_handled_costs_nothing(launch, server):
    running = launch(tuned=("supervisor.Supervisor._on_signal = lambda self, message: 1 / 0",))
    connection, _ = server.meet()
    connection.next("listening")
    connection.send(type="signal", signum=2)
    connection.send(type="ping", n=1)
    assert connection.next("pong")
    assert "signal cannot be handled: ZeroDivisionError" in running.log


def test_a_crash_of_the_launcher_leaves_no_kernel(launch, server):
    running = launch(tuned=("supervisor.Supervisor._abandoned = lambda self: 1 / 0",))
    connection, _ = server.meet(orphan_timeout=0)
    kernel = connection.next("listening")["pid"]
    connection.cut()
    assert running.wait() == 70
    assert not alive(kernel)
    assert "ZeroDivisionError" in running.log


def test_standard_streams_that_are_closed(launch, server):
    def close():
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    running = launch(preexec_fn=close)
    connection, _ = server.meet()
    connection.next("listening")
    assert running.kernel()["fds"] == ["0", "1", "2", "3", "4"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(launch, server):
    running = launch()
    connection, _ = server.meet()
    connection.next("listening")
    with open(f"/proc/{running.pid}/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    assert resident <= 24 * 1024
