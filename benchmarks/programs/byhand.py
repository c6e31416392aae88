"""Launchers started by hand, with nothing around them: what a start costs at the very least.

The server is asyncio's own TLS with the certificate of gp; it knows three messages.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lines import serve
from ticker import Ticker

from gp_core.identity import Identity
from gp_launchers import bundle, wire

PACKAGE = "import sys; sys.path.insert(0, {path!r}); from gp_launchers.__main__ import main; sys.exit(main())"
INSTANT = str(Path(__file__).with_name("instant_kernel.py"))
WORK = Path(os.environ["GP_BENCH_WORK"])
ISOLATED = [sys.executable, "-I", "-S"]


class Connection(asyncio.Protocol):
    """One launcher's session."""

    def __init__(self) -> None:
        self._decoder = wire.Decoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for _, _, payload in self._decoder.feed(data):
            message = wire.unpack_message(payload)
            if message["type"] == "hello":
                self.launch = launches[message["kernel_id"]]
                self.launch.connection = self
                self.send({"type": "accepted", "version": 2, "orphan_timeout": 60, "linger": 1, "ping": 30})
            self.launch.happened(message["type"])

    def send(self, message: dict[str, Any]) -> None:
        self._transport.write(wire.pack_message(message))


class Launch:
    """One launcher: when it was started and what it said when."""

    def __init__(self, start: list[str], kernel: list[str]) -> None:
        self.kernel_id = secrets.token_hex(8)
        launches[self.kernel_id] = self
        self.connection: Connection | None = None
        self._events: dict[str, asyncio.Future[float]] = {}
        options = [f"--kernel-id={self.kernel_id}", f"--response-address=127.0.0.1:{port}"]
        options += [f"--public-key={','.join(identity.pins)}", f"--runtime-dir={WORK / 'run'}"]
        connection = {"transport": "tcp", "ip": "127.0.0.1", "key": secrets.token_hex(32)}
        bundle = {"token": secrets.token_hex(16), "connection": connection, "env": {}}
        env = {**os.environ, "GP_LAUNCH_SECRETS": json.dumps(bundle)}
        self.began = time.perf_counter()
        self.pid = _spawn([*start, *options, "--", *kernel], env)

    def _event(self, what: str) -> asyncio.Future[float]:
        return self._events.setdefault(what, asyncio.get_running_loop().create_future())

    def happened(self, what: str) -> None:
        if not self._event(what).done():
            self._event(what).set_result(time.perf_counter() - self.began)

    async def until(self, what: str) -> float:
        return await asyncio.wait_for(self._event(what), 60)

    def end(self) -> None:
        if self.connection is not None:
            self.connection.send({"type": "shutdown", "grace": 0})
        else:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        del launches[self.kernel_id]


def _spawn(argv: list[str], env: dict[str, str]) -> int:
    quiet = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)]
    return os.posix_spawnp(argv[0], argv, env, file_actions=quiet, setsid=True)


async def crowd(count: int) -> dict[str, Any]:
    """Start launchers of kernels that are ready at once, all at the same time; seconds until all kernels listen."""
    ticker = Ticker()  # as the host applications have one
    began = time.perf_counter()
    started = [Launch(forms["package"], [*ISOLATED, INSTANT, "{connection_file}"]) for _ in range(count)]
    await asyncio.gather(*(launch.until("listening") for launch in started))
    seconds = time.perf_counter() - began
    ticker.stop()
    for launch in started:
        await asyncio.get_running_loop().run_in_executor(None, launch.end)
    return {"seconds": seconds}


async def one(form: str) -> dict[str, float]:
    """Start one launcher: milliseconds until its kernel's exec and its hello, then its memory when all is quiet."""
    fifo, loop = WORK / "exec", asyncio.get_running_loop()
    with Fifo(fifo) as told:
        kernel = ["/bin/sh", "-c", f'echo >{fifo}; exec "$0" "$@"', *ISOLATED, INSTANT, "{connection_file}"]
        launch = Launch(forms[form], kernel)
        executed = await told.wait() - launch.began
        hello = await launch.until("hello")
        await launch.until("listening")
    await asyncio.sleep(0.5)
    memory = _memory(launch.pid)
    before = _switches(launch.pid)
    await asyncio.sleep(1)
    memory["wake_ups"] = _switches(launch.pid) - before
    await loop.run_in_executor(None, launch.end)
    return {"exec": 1000 * executed, "hello": 1000 * hello, **memory}


async def interpreter() -> dict[str, float]:
    """Start a bare interpreter that imports ssl, and a bare shell: milliseconds, and the interpreter's memory."""
    fifo = WORK / "exec"
    with Fifo(fifo) as told:
        code = f"import ssl; open({str(fifo)!r}, 'w').write('x'); import time; time.sleep(60)"
        began = time.perf_counter()
        pid = _spawn([*ISOLATED, "-c", code], dict(os.environ))
        imported = await told.wait() - began
    await asyncio.sleep(0.2)
    memory = _memory(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with Fifo(fifo) as told:
        began = time.perf_counter()
        pid = _spawn(["/bin/sh", "-c", f"echo >{fifo}"], dict(os.environ))
        shell = await told.wait() - began
    os.waitpid(pid, 0)
    return {"imported": 1000 * imported, "shell": 1000 * shell, **memory}


class Fifo:
    """Tells when somebody wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Fifo:
        os.mkfifo(self._path, 0o600)
        # opened for writing too, so that it has no end when the writer has gone
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        self._written: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._descriptor, self._read)
        return self

    def _read(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        self._written.set_result(time.perf_counter())

    async def wait(self) -> float:
        return await asyncio.wait_for(self._written, 60)

    def __exit__(self, *error: object) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        os.unlink(self._path)


def _memory(pid: int) -> dict[str, float]:
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            found[name.lower()] = int(rest.split()[0]) / 1024  # MiB
    return found


def _switches(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            return int(line.split()[1])
    return 0


launches: dict[str, Launch] = {}
identity = Identity.load(WORK / "key")
forms = {
    "package": [*ISOLATED, "-c", PACKAGE.format(path=str(Path(bundle.__file__).parents[1]))],
    "pyz": [*ISOLATED, bundle.build(WORK / "gp-launcher.pyz")],
}
port = 0


async def main() -> None:
    global port
    server = await asyncio.get_running_loop().create_server(
        Connection, "127.0.0.1", 0, ssl=identity.context(), backlog=1024
    )
    port = server.sockets[0].getsockname()[1]
    await serve({"crowd": crowd, "one": one, "interpreter": interpreter})


asyncio.run(main())
