"""What is asked of one host: `far` runs there and answers."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import logging
import math
import os
import shlex
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gp_core import BackendError, LaunchRequest, Reason, blocking
from gp_core.balancing import Ledger
from gp_core.runtime import runtime
from gp_launchers import survey

from .connection import ConnectionFailed
from .forward import Forward
from .hosts import Client, Entry
from .pool import Line, Pool, Shared
from .questions import LOADER, NoAnswer, Questions, by

log = logging.getLogger(__name__)
T = TypeVar("T")

SURVEY = inspect.getsource(survey).encode()
CANDIDATES = (
    "python3", *(f"python3.{minor}" for minor in range(14, 7, -1)), "python", "/usr/libexec/platform-python",
    "~/miniforge3/bin/python", "~/miniconda3/bin/python", "~/anaconda3/bin/python", "/opt/conda/bin/python",
)  # fmt: skip
LOOK = 5.0  # seconds between two looks at a connection that launchers call through
SHORTEST, LONGEST = 1.0, 15.0  # seconds until the next attempt to mend it
LOAD_HOLDS, LOAD_WITHIN = 2.0, 5.0  # seconds for which an answer is good, and may take
TOGETHER = 0.02  # seconds in which questions for the state of kernels are gathered into one
NO_PYTHON = Reason("NoPython", "Install Python 3.8 or newer on the host, or say where it is by remote_python.")
DENIED = Reason(
    "UserProhibited", "Choose another user, or have the operator look at prohibited_uids and prohibited_gids."
)


@dataclass(frozen=True)
class Facts:
    """What a first visit finds.

    Args:
        python: Path of the interpreter that runs launchers.
        version: Its version.
        home: The user's.
        clock: Seconds since the epoch over there.
        free: Bytes free in the home.
    """

    python: str
    version: tuple[int, ...]
    home: str
    clock: float
    free: int


@dataclass(frozen=True)
class Launcher:
    """The launcher's file: what it is called over there, its hash and its bytes."""

    name: str
    sha256: str
    data: bytes = field(repr=False)

    @classmethod
    async def read(cls, path: Path) -> Launcher:
        """Read a file of this machine."""
        data = await blocking(path.read_bytes)
        digest = hashlib.sha256(data).hexdigest()
        return cls(f"gp-launcher-{digest[:16]}.pyz", digest, data)


class RemoteHost:
    """A host with a user to log in as.

    Args:
        line: The way there.
        python: Interpreter to use; empty: the first of `CANDIDATES` that is there.
        user: Whom to become there by sudo, for everything; empty: nobody else.
    """

    def __init__(self, line: Line, python: str = "", user: str = "") -> None:
        self.line = line
        self.user = user
        self.facts: Facts | None = None
        self._python = python
        self._questions = Questions(line, user)
        self._reached: dict[tuple[tuple[str, int], ...], bool] = {}
        self._reaching: dict[tuple[tuple[str, int], ...], Shared[dict[str, Any]]] = {}
        self.look = Shared(self._look)  #: goes there in any case
        self._load = (-math.inf, math.inf)  # when it was asked for, and what it was
        self._ask_load = Shared(lambda: self.ask("load", {}))
        self._ended: deque[Mapping[str, Any]] = deque(maxlen=100)  # notes
        self._gathered: list[tuple[Mapping[str, Any], asyncio.Future[bool]]] = []
        # by listener, and the port that was asked for: a server may have taken kernels over from several others
        self._forwards: dict[tuple[tuple[str, int], int], Forward] = {}

    @property
    def name(self) -> str:
        return self.line.target.name

    # -- questions

    async def visit(self) -> Facts:
        """Find a Python there; the first visit only, as long as it stays what it is.

        Raises:
            ConnectionFailed: The host cannot be reached, or has no Python that can be used.
        """
        return self.facts or await self.look()

    async def _look(self) -> Facts:
        search = _search([self._python] if self._python else CANDIDATES)
        answer = await self._questions.ask_alone(search, {"ask": "look"})
        if "pythons" in answer:
            found = answer["pythons"].strip() or "none"
            raise ConnectionFailed(f"{self.name} has no Python that can be used; found: {found}", NO_PYTHON)
        self.facts = Facts(**{**answer, "version": tuple(answer["version"])})
        return self.facts

    async def reaches(self, addresses: Sequence[tuple[str, int]]) -> bool:
        """Whether a launcher there could dial one of the server's addresses; asked once."""
        key = tuple(addresses)
        if key not in self._reached:  # one question for all that start now: each may take seconds for an address
            asked = self._reaching.setdefault(key, Shared(lambda: self.ask("reach", {"addresses": list(key)})))
            self._reached[key] = bool((await asked())["reached"])
        return self._reached[key]

    async def load(self) -> float:
        """How busy the host is: 0 idle, 1 and more busy, infinite if it does not answer soon; asked now and then."""
        now = time.monotonic()
        if now - self._load[0] > LOAD_HOLDS:
            try:
                busy = await asyncio.wait_for(self._ask_load(), LOAD_WITHIN)
                self._load = (now, max(map(float, busy.values())))
            except (BackendError, ValueError, asyncio.TimeoutError) as error:
                log.debug("the load of %s: %r", self.name, error)
                self._load = (now, math.inf)
        return self._load[1]

    async def ask(self, question: str, request: Mapping[str, Any], more: bytes = b"") -> dict[str, Any]:
        """Ask a question of `far`.

        Raises:
            ConnectionFailed: The host cannot be reached.
            BackendError: It answered with an error.
        """
        python, asked = (await self.visit()).python, {**request, "ask": question}
        try:
            if more:
                return await self._questions.ask_alone(by(python), asked, more)
            return await self._questions.ask(python, asked)
        except NoAnswer:
            self.facts = None  # its Python may have gone: look again
            raise

    async def start(
        self,
        request: LaunchRequest,
        argv: Sequence[str],
        installation: str,
        *,
        dial_first: str = "",
        own_choice: bool = False,
    ) -> dict[str, Any]:
        """Start a launcher, and bring ours there if the host does not have it; returns the note of its process.

        Args:
            request: Of the kernel.
            argv: The kernel's command, or one that starts a launcher itself.
            installation: Whose the kernel is.
            dial_first: ``host:port`` that our launcher tries before the server's own addresses.
            own_choice: The user over there is the kernel's, so it must not be a prohibited one.
        """
        asked = {
            "installation": installation,
            "kernel_id": request.kernel_id,
            "prohibited": [list(request.prohibited_uids), list(request.prohibited_gids)] if own_choice else [],
        }
        ways: list[tuple[dict[str, Any], bytes]]
        if request.wrapped:
            launcher = await Launcher.read(request.launcher_file)
            ours = {
                "launcher": launcher.name,
                "sha256": launcher.sha256,
                "arguments": [*request.launcher_arguments(dial_first=dial_first), "--", *argv],
                "secrets": request.secrets["GP_LAUNCH_SECRETS"],
            }
            ways = [(ours, b""), (ours, launcher.data)]
        else:
            theirs = {"argv": list(argv), "cwd": request.cwd, "env": dict(request.env), "secrets": request.secrets}
            ways = [(theirs, b"")]
        for more, data in ways:
            answer = await self.ask("start", {**asked, **more}, data)
            if "prohibited" in answer:
                raise ConnectionFailed(
                    f"no kernel may run as {self.user or self.line.target.user} of {self.name}: {answer['prohibited']}",
                    DENIED,
                    of_host=False,
                )
            if "note" in answer:
                note: dict[str, Any] = answer["note"]
                return note
        raise BackendError(f"{self.name}: the launcher is not there though it was brought")

    async def environments(self) -> list[dict[str, Any]]:
        """Find kernels that could be started there; see `survey.found`."""
        found: list[dict[str, Any]] = (await self.ask("environments", {}, SURVEY))["found"]
        return found

    async def kill(self, note: Mapping[str, Any], signum: int) -> None:
        """Send a signal to the launcher of a note; if that ends it, `runs` need not ask."""
        if (await self.ask("kill", {"note": dict(note), "signal": signum}))["gone"]:
            self._ended.append(dict(note))

    async def runs(self, note: Mapping[str, Any]) -> bool:
        """Whether the launcher of a note runs; all that is asked at the same time is one question to the host."""
        if note in self._ended:
            return False
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._gathered.append((note, answer))
        if len(self._gathered) == 1:
            runtime().spawn(self._ask_for_all(), name="look at a host")  # no caller's own: it may be cancelled
        return await answer

    async def _ask_for_all(self) -> None:
        await asyncio.sleep(TOGETHER)
        gathered, self._gathered = self._gathered, []
        said: Sequence[bool | Exception]
        try:
            said = (await self.ask("status", {"notes": [dict(note) for note, _ in gathered]}))["running"]
            if len(said) != len(gathered):
                raise BackendError(f"{self.name} does not answer what it is asked")
        except Exception as error:
            said = [error] * len(gathered)
        for (_, waiting), it in zip(gathered, said, strict=True):
            if waiting.done():
                continue
            if isinstance(it, Exception):
                waiting.set_exception(it)
            else:
                waiting.set_result(it)

    # -- launchers that call back through ssh

    async def forward(self, listener: tuple[str, int], kernel_id: str, port: int = 0) -> int:
        """Let a kernel's launcher call through ssh, until `release`; the way is mended when the connection is lost.

        Args:
            listener: Of this machine.
            kernel_id: The kernel's.
            port: Of the host, if its launcher knows one already.

        Returns:
            The port of the host's loopback.

        Raises:
            BackendError: The host cannot be reached, or does not allow it.
        """
        key = (listener, port)
        forward = self._forwards.get(key)
        if forward is None:
            forward = self._forwards[key] = Forward(listener, port)
            runtime().spawn(self._hold(key, forward), name="forward of a host")
        forward.callers.add(kernel_id)
        await blocking(forward.attach, await self.line.connection())
        return forward.port

    def release(self, kernel_id: str) -> None:
        """Forget a kernel that has ended."""
        for forward in self._forwards.values():
            forward.callers.discard(kernel_id)

    async def _hold(self, key: tuple[tuple[str, int], int], forward: Forward) -> None:
        pause = SHORTEST
        while True:
            await asyncio.sleep(pause)
            if not forward.callers:
                await blocking(forward.detach)
                if not forward.callers:  # else somebody came meanwhile
                    break
            try:
                await blocking(forward.attach, await self.line.checked())
                pause = LOOK if pause <= LOOK else SHORTEST
            except Exception as error:  # whatever it is, kernels call back this way
                level = logging.DEBUG if isinstance(error, BackendError) else logging.WARNING
                log.log(level, "the way back from %s: %s", self.name, error)
                pause = min(2 * pause, LONGEST)
        del self._forwards[key]
        forward.close()


@dataclass
class Known:
    """What all objects of the backend in one process share: connections, and what is known of hosts."""

    pool: Pool = field(default_factory=Pool)
    ledger: Ledger = field(default_factory=Ledger)
    hosts: dict[tuple[Entry, Client, str, str], RemoteHost] = field(default_factory=dict)

    async def host(self, entry: Entry, client: Client, python: str, user: str) -> RemoteHost:
        """Return a host; nobody may have been there yet."""
        key = (entry, client, python, user)
        if key not in self.hosts:
            line = await self.pool.line(entry, client)
            self.hosts.setdefault(key, RemoteHost(line, python, user))
        return self.hosts[key]


@functools.lru_cache(maxsize=1)
def _known(pid: int) -> Known:
    return Known()


def known() -> Known:
    """Return what this process knows; a forked child begins anew, for it has none of the threads."""
    return _known(os.getpid())


async def load_of(host: Awaitable[RemoteHost]) -> float:
    """Return `RemoteHost.load`, infinite for a host to which no way can be told."""
    try:
        return await (await host).load()
    except BackendError:
        return math.inf


async def ask_all(
    hosts: Sequence[tuple[T, Awaitable[RemoteHost]]], question: str, asked: Mapping[str, Any]
) -> list[tuple[T, dict[str, Any]]]:
    """Ask hosts at the same time; return the answers with whatever the hosts that gave one came with.

    Raises:
        BackendError: None did.
    """

    async def of(host: Awaitable[RemoteHost]) -> dict[str, Any]:
        return await (await host).ask(question, asked)

    said = await asyncio.gather(*(of(host) for _, host in hosts), return_exceptions=True)
    good = [(key, answer) for (key, _), answer in zip(hosts, said, strict=True) if isinstance(answer, dict)]
    if hosts and not good:
        raise BackendError("; ".join(str(answer).splitlines()[0] for answer in said))
    return good


def _search(candidates: Sequence[str]) -> str:
    """Return a line for the shell that continues in the first Python that is new enough, or tells what it has found."""
    check = "import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 8))"
    names = " ".join(_shell(name) for name in candidates)
    return (
        f"l={shlex.quote(LOADER)}; c={shlex.quote(check)}; f=; for p in {names}; do "
        'command -v "$p" >/dev/null 2>&1 || continue; v=$("$p" -I -S -c "$c" </dev/null 2>/dev/null) && '
        'exec "$p" -I -S -c "$l"; f="$f $p ${v:-broken}"; done; '
        'printf "\\n@mark@ [{\\"pythons\\": \\"%s\\"}]\\n" "$f"'
    )


def _shell(name: str) -> str:
    return f'"$HOME"/{shlex.quote(name[2:])}' if name.startswith("~/") else shlex.quote(name)
