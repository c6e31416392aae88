"""Between kernel and server: what happens to one is told to the other, and both have their deadlines."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from . import __version__, wire
from .attached import Attached
from .dialer import Dialer
from .kernel import Kernel
from .loop import READ, Loop
from .relay import Relay
from .secrets_input import environment_is_valid
from .session import Session, TlsUnsupported, make_context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict

    Message = Dict[str, Any]

    from .errors import StartError
    from .launch import Launch
    from .log import Log
    from .loop import Timer
    from .options import Options
    from .process import Child


FIRST_ACCEPTANCE = 120.0  # seconds until some server must have taken us
LINGER = 60.0  # seconds that a kernel's exit waits for a restart, unless the server says otherwise
PING = 30.0
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
STEADY = 5.0  # a session that lived this long resets the backoff: on a line that often breaks, channels stand still
GOODBYE = 1.0  # seconds for the last words to get through
NO_SERVER, REFUSED, NO_TLS = 75, 77, 78  # exit codes

_FORWARDED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def watch(launch: Launch, outcome: Child | StartError | None) -> Kernel | Attached:
    """Return the kernel of a first start, or of an attached process if there is no outcome."""
    if outcome is None:
        return Attached(launch)
    kernel = Kernel(launch)
    kernel.started(outcome)
    return kernel


class Supervisor:
    """Runs until the kernel is done with.

    Args:
        options: The command line.
        token: What the server gave this launch.
        kernel: Started already.
        log: Takes every change of state.
    """

    def __init__(self, options: Options, token: str, kernel: Kernel | Attached, log: Log) -> None:
        self._options = options
        self._token = token
        self._secret = os.urandom(32).hex()  # the server knows by it that a redial is the same launcher
        self._kernel = kernel
        self._log = log
        self._loop = Loop()
        self._dialer = Dialer(self._loop, options.response_address, self._connect, self._nobody_there, log)
        self._relay = Relay(self._loop, self._accepted_session, kernel.launch.private_folder, log)
        self._orphan_timeout = options.orphan_timeout
        self._linger = LINGER
        self._orphaned: Timer | None = None
        self._lingering: Timer | None = None
        self._probe: Timer | None = None
        self._steady: Timer | None = None
        self._killer: Timer | None = None
        self._stopping = False
        self._exit_code: int | None = None  # None: the kernel's
        self._restart: Message | None = None  # waits for the end of the kernel's former run
        self._started_at = 0.0
        self._handlers = {
            "accepted": self._on_accepted,
            "refused": self._on_refused,
            "signal": self._on_signal,
            "shutdown": self._on_shutdown,
            "restart": self._on_restart,
            "ping": self._on_ping,
        }

    def run(self) -> int:
        """Return the exit code of the launcher."""
        try:
            self._context = make_context()
        except TlsUnsupported as error:
            self._log("TlsUnsupported: %s", error)
            return NO_TLS
        self._watch_signals()
        self._orphaned = self._loop.after(min(FIRST_ACCEPTANCE, self._orphan_timeout), self._abandoned)
        self._dialer.round()
        if self._kernel.exit is not None:
            self._kernel_exited()
        else:
            self._kernel_started()
        return self._loop.run()

    # -- the kernel

    def _watch_signals(self) -> None:
        for number in _FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                self._loop.on_signal(number, lambda number=number: self._kernel.signal(number))  # type: ignore[misc]
        self._loop.on_signal(signal.SIGTERM, lambda: self._stop(GRACE, None))
        self._loop.on_signal(signal.SIGCHLD, self._reap)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_FORWARDED, signal.SIGTERM))  # held back since the start
        if isinstance(self._kernel, Attached) and self._kernel.exit is None:
            if self._kernel.pidfd >= 0:
                self._loop.watch(self._kernel.pidfd, READ, self._attached_ended)
            else:
                self._poll_attached()

    def _kernel_started(self) -> None:
        if isinstance(self._kernel, Kernel):
            self._kernel.confirm()
            self._loop.watch(self._kernel.stderr, READ, self._stderr_ready)
        self._started_at = time.monotonic()
        self._loop.cancel(self._probe)
        self._look()
        self._reap()  # it may have ended before anybody watched

    def _look(self) -> None:
        if self._kernel.exit is not None:
            return
        if self._kernel.is_listening():
            self._log("run %d: listening", self._kernel.run)
            assert self._kernel.launch.ports is not None
            self._relay.kernel_listens(self._kernel.launch.ports)
            self._report()
            return
        age = time.monotonic() - self._started_at
        self._probe = self._loop.after(0.01 if age < 2 else 0.02 if age < 5 else 0.2, self._look)

    def _stderr_ready(self, _events: int) -> None:
        assert isinstance(self._kernel, Kernel)
        if not self._kernel.read_stderr():
            self._forget_stderr(self._kernel)

    def _forget_stderr(self, kernel: Kernel) -> None:
        if kernel.stderr >= 0:
            self._loop.unwatch(kernel.stderr)
            kernel.close_stderr()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)  # as PID 1 we inherit everybody's orphans
            except OSError:
                return
            if pid == 0:
                return
            if pid == self._kernel.pid and isinstance(self._kernel, Kernel):
                code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                self._kernel.read_stderr()
                self._kernel.ended(code)
                self._kernel_exited()

    def _poll_attached(self) -> None:
        assert isinstance(self._kernel, Attached)
        if self._kernel.is_alive():
            self._loop.after(1.0, self._poll_attached)
        else:
            self._attached_ended(0)

    def _attached_ended(self, _events: int) -> None:
        assert isinstance(self._kernel, Attached)
        if self._kernel.pidfd >= 0:
            self._loop.unwatch(self._kernel.pidfd)
        self._kernel.ended(None)
        self._kernel_exited()

    def _kernel_exited(self) -> None:
        assert self._kernel.exit is not None
        self._relay.kernel_ended()
        if isinstance(self._kernel, Kernel):
            if self._restart is not None:
                self._start_again(self._kernel, self._restart)
                return
            if self._kernel.died_of_ports() and not self._stopping:
                self._forget_stderr(self._kernel)
                self._kernel.start_elsewhere()
                self._continue()
                return
        self._loop.cancel(self._probe)
        self._log("run %d: ended, code %s", self._kernel.run, self._kernel.exit.code)
        self._report()
        self._wait_for_word()

    def _wait_for_word(self) -> None:
        """After the kernel's end: `restart` or `shutdown` may come; what cannot restart has only to be told."""
        if self._stopping or (not self._kernel.can_restart and self._accepted_session()):
            self._end()
        else:
            self._loop.cancel(self._lingering)
            self._lingering = self._loop.after(self._linger, self._end)

    def _start_again(self, kernel: Kernel, message: Message) -> None:
        self._restart = None
        self._loop.cancel(self._killer)
        self._loop.cancel(self._lingering)
        self._forget_stderr(kernel)
        self._log("run %d: restart in place", message["run"])
        kernel.start(message["run"], message.get("argv"), message.get("env"), message.get("cwd"))
        self._continue()

    def _continue(self) -> None:
        if self._kernel.exit is not None:
            self._kernel_exited()
        else:
            self._kernel_started()

    # -- the end

    def _stop(self, grace: float, code: int | None) -> None:
        """End kernel and launcher; ``code`` None: exit with the kernel's."""
        if self._stopping:
            grace = 0  # asked twice: somebody is in a hurry
        else:
            self._exit_code = code
        self._stopping = True
        self._restart = None
        if self._kernel.exit is not None:
            self._end()
            return
        if grace > 0:
            self._kernel.signal(signal.SIGTERM)
        self._loop.cancel(self._killer)
        self._killer = self._loop.after(grace, self._kill)

    def _kill(self) -> None:
        self._kernel.signal(signal.SIGKILL)
        self._killer = self._loop.after(GRACE, self._end)  # it does not even die of that: hung in the system

    def _abandoned(self) -> None:
        self._log("no server has accepted this launcher in time: kernel and launcher end")
        self._stop(GRACE, NO_SERVER)

    def _end(self) -> None:
        self._dialer.stop()
        self._relay.pump(everything=True)
        self._relay.close()
        if self._dialer.session is not None:
            self._dialer.session.finish(GOODBYE)
        code = self._exit_code
        if code is None:
            code = self._kernel.exit.status if self._kernel.exit is not None else 128 + signal.SIGKILL
        self._loop.stop(code)

    # -- the session

    def _connect(self, address: tuple[int, Any]) -> Session:
        hello = {
            "type": "hello",
            "versions": [wire.VERSION],
            "kernel_id": self._options.kernel_id,
            "token": self._token,
            "secret": self._secret,
            "launcher": __version__,
            "python": "{}.{}.{}".format(*sys.version_info),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "capabilities": ["relay", "signal", *(["restart"] if self._kernel.can_restart else [])],
            "relay": self._relay.hello(),
            "run": self._kernel.run,
            "ports": self._kernel.launch.ports.numbers if self._kernel.launch.ports is not None else None,
        }
        return Session(self._loop, self._context, address, self._options.public_key, hello, self)

    def _accepted_session(self) -> Session | None:
        session = self._dialer.session
        return session if session is not None and session.accepted else None

    def _send(self, message: Message) -> None:
        session = self._accepted_session()
        if session is not None:
            session.send(message)

    def _report(self) -> None:
        """Say how the current run is doing; repeated in every new session, so that a lost one loses nothing."""
        kernel = self._kernel
        if kernel.exit is not None:
            self._send(
                {
                    "type": "exited",
                    "run": kernel.run,
                    "code": kernel.exit.code,
                    "stderr": kernel.stderr_tail.decode("utf-8", "replace"),
                    "listened": kernel.listened,
                    "reason": kernel.exit.reason,
                    "detail": kernel.exit.detail,
                }
            )
        elif kernel.listened and kernel.launch.ports is not None:
            self._send(
                {"type": "listening", "run": kernel.run, "pid": kernel.pid, "ports": kernel.launch.ports.numbers}
            )

    def on_frame(self, session: Session, kind: int, stream: int, payload: bytes) -> None:
        """Take a frame; messages of types that are not known yet are ignored."""
        if kind != wire.MESSAGE:
            if session is self._accepted_session():
                self._relay_or_close(session, lambda: self._relay.streams.receive(kind, stream, payload))
            return
        if stream != 0:
            return
        message = wire.unpack_message(payload)
        known = session.accepted or message["type"] in ("accepted", "refused", "ping")
        handler = self._handlers.get(message["type"])
        if handler is not None and known and session is self._dialer.session:
            try:
                handler(message)
            except Exception as error:  # whatever a message does to us, the user's kernel is worth more
                self._log("%s cannot be handled: %s: %s", message["type"], type(error).__name__, error)

    def _relay_or_close(self, session: Session, act: Callable[[], object]) -> bool:
        try:
            act()
            return True
        except wire.WireError as error:
            self._relay.forget()
            session.close(f"the channels are broken: {error}")
            return False

    def on_sent(self, session: Session) -> None:
        """Send more of the kernel's channels."""
        if session is self._accepted_session():
            self._relay.pump()

    def on_closed(self, session: Session, why: str, refused: bool) -> None:
        """Dial again; from now on the kernel is an orphan."""
        if session is not self._dialer.session:
            return
        self._loop.cancel(self._steady)
        if not session.accepted:
            self._dialer.failed(session.name, why, refused)
            return
        self._log("session with %s %s", session.name, why)
        self._loop.cancel(self._orphaned)
        self._orphaned = self._loop.after(self._orphan_timeout, self._abandoned)
        self._dialer.lost()

    def _nobody_there(self) -> None:
        if self._kernel.exit is not None and not self._stopping:
            self._log("the kernel has ended and no server is left")
            self._end()

    def _on_accepted(self, message: Message) -> None:
        session = self._dialer.session
        assert session is not None
        if session.accepted:
            return
        self._log("accepted by %s", session.name)
        self._orphan_timeout = _number(message, "orphan_timeout", self._orphan_timeout)
        self._linger = _number(message, "linger", self._linger)
        self._loop.cancel(self._orphaned)
        session.accept(max(0.05, _number(message, "ping", PING)))
        if not self._relay_or_close(session, lambda: self._relay.accepted(message.get("relay"))):
            return
        self._relay.report()
        self._loop.cancel(self._steady)
        self._steady = self._loop.after(STEADY, self._dialer.reset)
        self._report()
        if self._kernel.exit is not None:
            self._wait_for_word()

    def _on_refused(self, message: Message) -> None:
        session = self._dialer.session
        assert session is not None
        text = f"refused: {message.get('text') or message.get('reason')}"
        if message.get("final") is True:
            self._log("%s, for good: kernel and launcher end", text)
            self._stop(GRACE, REFUSED)
        else:
            session.close(text, refused=True)

    def _on_signal(self, message: Message) -> None:
        number = message.get("signum")
        if type(number) is int and 0 < number < signal.NSIG and self._kernel.exit is None:
            self._kernel.signal(number)

    def _on_shutdown(self, message: Message) -> None:
        # Asked for, so not a failure - unless the kernel had ended by itself.
        self._stop(_number(message, "grace", GRACE), 0 if self._kernel.exit is None else None)

    def _on_restart(self, message: Message) -> None:
        run, argv, env, cwd = (message.get(name) for name in ("run", "argv", "env", "cwd"))
        newest = self._restart["run"] if self._restart is not None else self._kernel.run
        kernel = self._kernel
        if not isinstance(run, int) or run <= newest or not isinstance(kernel, Kernel) or self._stopping:
            return  # said again after a lost session, for example
        argv_is_valid = isinstance(argv, list) and argv and all(isinstance(w, str) and "\0" not in w for w in argv)
        if not (
            (argv is None or argv_is_valid)
            and (env is None or environment_is_valid(env))
            and (cwd is None or isinstance(cwd, str))
        ):
            self._log("run %d: the restart message is malformed", run)
            return
        if self._kernel.exit is None:
            self._restart = message  # its end is not told: the server has given that run up
            kernel.signal(signal.SIGKILL)
        else:
            self._start_again(kernel, message)

    def _on_ping(self, message: Message) -> None:
        session = self._dialer.session
        if session is not None:
            session.send({"type": "pong", "n": message.get("n")})


def _number(message: Message, name: str, default: float) -> float:
    value = message.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    return default
