"""A small server of protocol 2, kernels that do almost nothing, and launchers started against them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import queue
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

from gp_launchers import wire

SOURCES = Path(wire.__file__).resolve().parent.parent

# Binds what the connection file says; the first argument after the file changes what it does then.
KERNEL = textwrap.dedent(
    """
    import json, os, socket, sys, time
    path, mode = sys.argv[1], (sys.argv[2:] or [""])[0]
    info = json.load(open(path))
    out = os.environ.get("KERNEL_OUT")
    if out:
        with open(out + ".tmp", "w") as f:
            json.dump({"env": dict(os.environ), "argv": sys.argv, "info": info, "path": path, "pid": os.getpid(),
                       "mode": os.stat(path).st_mode & 0o777,
                       "folder_mode": os.stat(os.path.dirname(path)).st_mode & 0o777,
                       "cwd": os.getcwd(), "fds": sorted(os.listdir("/proc/self/fd")), "pgid": os.getpgid(0),
                       "status": open("/proc/self/status").read()}, f)
        os.replace(out + ".tmp", out)
    if mode == "die":
        sys.stderr.write("x" * 20000 + "the last words")
        sys.exit(3)
    if mode == "late":
        time.sleep(0.5)
    kept = []
    for name in ("shell", "iopub", "stdin", "control", "hb"):
        if info["transport"] == "ipc":
            s = socket.socket(socket.AF_UNIX)
            s.bind("%s-%d" % (info["ip"], info[name + "_port"]))
        else:
            s = socket.socket(socket.AF_INET6 if ":" in info["ip"] else socket.AF_INET)
            if mode != "plain":
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((info["ip"], info[name + "_port"]))
        s.listen()
        kept.append(s)
    if mode == "child":
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(out + ".child", "w").write(str(child.pid))
    if mode == "stubborn":
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(out + ".ready", "w").close()
    if mode == "signals":
        import signal
        def note(number, frame):
            with open(out + ".signals", "a") as f:
                f.write("%d\\n" % number)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
            signal.signal(number, note)
        open(out + ".ready", "w").close()
    if mode == "brief":
        time.sleep(float(sys.argv[3]))
        os.unlink(path)
        sys.exit(int(sys.argv[4]))
    while True:
        time.sleep(600)
    """
)


def make_certificate(folder: Path) -> tuple[Path, str]:
    """Write a self-signed certificate with its key; return the file and the pin."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path, hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


class Connection:
    """The server's end of a session."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.messages: queue.Queue = queue.Queue()
        self.closed = threading.Event()
        self.bytes = 0
        self._socket = plain
        self._context = context
        self._plain = plain
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            self._plain.settimeout(10)
            self._socket = self._context.wrap_socket(self._plain, server_side=True)
            self._socket.settimeout(None)
            decoder = wire.Decoder()
            while True:
                data = self._socket.recv(65536)
                if not data:
                    break
                self.bytes += len(data)
                for _kind, _stream, payload in decoder.feed(data):
                    self.messages.put(wire.unpack_message(payload))
        except (OSError, ValueError):
            pass
        finally:
            self.closed.set()
            self.messages.put(None)
            self._socket.close()

    def send(self, **message: object) -> None:
        self._socket.sendall(wire.pack_message(message))

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def accept(self, **fields: object) -> None:
        self.send(type="accepted", version=2, **fields)

    def next(self, kind: str, timeout: float = 10) -> dict:
        """Return the next message of a type, leaving pings out; fail on any other or the end."""
        message = self.messages.get(timeout=timeout)
        while message is not None and message["type"] in ("ping", "pong") and kind not in ("ping", "pong"):
            message = self.messages.get(timeout=timeout)
        assert message is not None, f"closed, but {kind} was expected"
        assert message["type"] == kind, message
        return message

    def silent(self, seconds: float) -> bool:
        """Say whether nothing comes for some seconds."""
        try:
            return self.messages.get(timeout=seconds) is None
        except queue.Empty:
            return True

    def cut(self) -> None:
        """End the TCP connection."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


class Server:
    """Takes connections on 127.0.0.1 and hands them to the test."""

    def __init__(self, certificate: Path, pin: str) -> None:
        self.pin = pin
        self.connections: queue.Queue = queue.Queue()
        self._all: list[Connection] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(certificate)
        self.port = 0
        self.start()

    def start(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(128)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            connection = Connection(plain, self._context)
            self._all.append(connection)
            self.connections.put(connection)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def next(self, timeout: float = 10) -> Connection:
        """Return the next connection."""
        return self.connections.get(timeout=timeout)

    def meet(self, timeout: float = 10, **accepted: object) -> tuple[Connection, dict]:
        """Return the next connection and its hello, accepted."""
        connection = self.next(timeout)
        hello = connection.next("hello", timeout)
        connection.accept(**accepted)
        return connection, hello

    def stop(self) -> None:
        """Close listener and connections; `start` opens the same port again."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept() up
        except OSError:
            pass
        self._listener.close()
        self._thread.join(5)
        for connection in self._all:
            connection.cut()
        self._all = []


class Launch:
    """A launcher process."""

    def __init__(self, process: subprocess.Popen, log: Path, out: Path, runtime: Path) -> None:
        self.process = process
        self.log_path = log
        self.out_path = out
        self.runtime = runtime

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def kernel(self, timeout: float = 10) -> dict:
        """Return what the test kernel says of itself, once."""
        eventually(self.out_path.exists, timeout, lambda: self.log)
        told = json.loads(self.out_path.read_text())
        self.out_path.unlink()
        return told

    def wait(self, timeout: float = 10) -> int:
        return self.process.wait(timeout)


def eventually(condition, timeout: float = 10, why=lambda: "") -> None:
    """Wait until something is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Say whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


CONNECTION = {
    "transport": "tcp",
    "ip": "127.0.0.1",
    "shell_port": 0,
    "iopub_port": 0,
    "stdin_port": 0,
    "control_port": 0,
    "hb_port": 0,
    "key": "the-hmac-key",
    "signature_scheme": "hmac-sha256",
    "kernel_name": "bare",
}
TOKEN = "the-launch-token-0123456789"


class Launcher:
    """Starts launchers in a folder and stops them at the end."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        self.script = folder / "kernel.py"
        self.script.write_text(KERNEL)
        self.runtime = folder / "run"
        self.launches: list[Launch] = []

    def command(self, mode: tuple | None = (), options: tuple = (), start: tuple | None = None) -> list[str]:
        """Return the command line of a launcher for the test kernel in a mode; None: without `--`."""
        command = [*(start or (sys.executable, "-m", "gp_launchers")), "--kernel-id", "kernel-1"]
        command += ["--response-address", self.server.address, "--public-key", self.server.pin]
        command += ["--runtime-dir", str(self.runtime), *options]
        if mode is not None:
            command += ["--", sys.executable, "-I", "-S", str(self.script), "{connection_file}", *mode]
        return command

    def tuned(self, *settings: str) -> tuple[str, ...]:
        """Return how to run a launcher with other constants, such as `supervisor.GRACE = 0.2`."""
        lines = ["import sys", "from gp_launchers import dialer, session, supervisor", *settings]
        lines += ["from gp_launchers.__main__ import main", "sys.exit(main())"]
        return (sys.executable, "-c", "\n".join(lines))

    def __call__(
        self,
        *mode: str,
        options: tuple = (),
        connection: dict | None = None,
        env: dict | None = None,
        environ: dict | None = None,
        secrets: object = ...,
        tuned: tuple = (),
        command: list[str] | None = None,
        **popen: object,
    ) -> Launch:
        number = len(self.launches)
        out = self.folder / f"out-{number}"
        log = self.folder / f"log-{number}"
        document = {"token": TOKEN, "connection": {**CONNECTION, **(connection or {})}}
        document["env"] = {"KERNEL_OUT": str(out), **(env or {})}
        environment = {**os.environ, "PYTHONPATH": str(SOURCES), **(environ or {})}
        environment["GP_LAUNCH_SECRETS"] = json.dumps(document if secrets is ... else secrets)
        with open(log, "wb") as stderr:
            process = subprocess.Popen(
                command or self.command(mode, options, self.tuned(*tuned) if tuned else None),
                env=environment,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                **popen,
            )
        launch = Launch(process, log, out, self.runtime)
        self.launches.append(launch)
        return launch

    def close(self) -> None:
        for launch in self.launches:
            if launch.process.poll() is None:
                launch.process.kill()
            launch.process.wait(10)
