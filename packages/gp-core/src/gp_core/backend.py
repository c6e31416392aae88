"""What a backend is: something that starts a kernel somewhere, looks at it, and stops it.

Write one by subclassing `Backend`: set ``name``, implement ``launch``, ``status`` and ``terminate``.
Everything is called on the background event loop of `gp_core.runtime`; a blocking client library goes through
`gp_core.runtime.blocking`, a command through `gp_core.runtime.run_command`.
"""

from __future__ import annotations

import asyncio
import enum
import os
import random
from abc import ABCMeta, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from traitlets import MetaHasTraits
from traitlets.config import LoggingConfigurable

from .command import expanded, placeholders
from .errors import BackendError, ConfigError, LaunchFailed, Reason
from .ports import PortRange

if TYPE_CHECKING:
    from .environments import Environment

Handle = dict[str, Any]
"""All that a backend needs to find its kernel again, in any process: must survive ``json.dumps``, holds no secret."""


class State(enum.Enum):
    """Where a kernel's job is in its life, as its platform tells."""

    PENDING = "pending"  #: accepted, not running yet
    RUNNING = "running"  #: the job runs; the kernel in it may not have called back yet
    GONE = "gone"  #: finished, failed, removed, or never heard of
    UNKNOWN = "unknown"  #: the platform does not answer: says nothing about the kernel, and never ends it


@dataclass(frozen=True, kw_only=True)
class Status:
    """One look at a kernel's job.

    Args:
        state: See `State`.
        host: Address that clients reach the kernel at, once it is known.
        exit_code: Of the job, negative for a signal, if it is gone and the platform tells.
        reason: Typed reason for waiting or for the end.
        terminal: The reason cannot heal by waiting: a start fails at once.
        detail: One line of the platform's own words, shown to the user.
    """

    state: State
    host: str | None = None
    exit_code: int | None = None
    reason: Reason | None = None
    terminal: bool = False
    detail: str = ""


TOLD = "--response-address="  # the launcher's option


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of a check for ``jupyter gp doctor``.

    Args:
        ok: Whether the checked thing works.
        subject: What was checked.
        text: What was found.
        advice: What to do about it; empty if it is ok.
    """

    ok: bool
    subject: str
    text: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class KernelInfo:
    """A kernel as hooks see it: who asks for what, where.

    Args:
        kernel_id: Identifier that jupyter_client gave, a uuid as a rule.
        kernel_name: Name of the kernelspec.
        user: The one user name that all policy goes by (see ``user_source``).
        backend: Name of the backend.
    """

    kernel_id: str
    kernel_name: str
    user: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class LaunchRequest(KernelInfo):
    """All that a backend gets to start one kernel.

    Args:
        argv: The kernelspec's command; all placeholders but ``{connection_file}`` are filled.
        wrapped: The command does not name a launcher: `command` puts ours in front.
        env: Variables of the kernel on top of those of the far side, where ``${X}`` is filled. The launcher has them
            already; a submit script may want them.
        secrets: One variable with the launch token, the kernel's keys and its environment. It must reach the launcher's
            environment (or its ``--secrets-file``, ``-`` for standard input) and nobody else: not argv, no log, no file
            that others can read.
        cwd: Working directory on the far side, if it exists there.
        submit: "api": the backend creates the job and ``command()`` runs inside; "script": argv runs here and submits.
        impersonate: The kernel has to run as ``user``; only a backend that ``impersonates`` is asked.
        prohibited_uids: What that user must not be, which only the far side knows.
        prohibited_gids: Likewise.
        parameters: Typed values that the user chose, already checked.
        port_range: Where the kernel may listen.
        launcher_file: The launcher on this machine as one executable zip file.
        launcher_options: Arguments of the launcher, without secrets.
        listener: Where this process listens for launchers, for a backend that brings their calls here itself.
        progress: Tells people what `launch` is about, in one line: a ``progress`` event.
    """

    argv: Sequence[str]
    wrapped: bool = True
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    submit: Literal["api", "script"] = "api"
    impersonate: bool = False
    prohibited_uids: Collection[int] = (0,)
    prohibited_gids: Collection[int] = (0,)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    port_range: PortRange = field(default_factory=PortRange)
    launcher_file: Path = Path("gp-launcher.pyz")
    launcher_options: Sequence[str] = ()
    listener: tuple[str, int] = ("127.0.0.1", 0)
    progress: Callable[[str], object] = field(default=lambda text: None, repr=False, compare=False)

    def command(self, launcher: str | Path | None = None, *, python: str = "python3") -> list[str]:
        """Return the argv to run on the far side.

        Args:
            launcher: Where the launcher file lies over there; default: the same path as here (a shared file system).
            python: A Python >= 3.8 over there.

        Returns:
            The launcher followed by the kernelspec's command, or the latter alone if it brings its own launcher.
        """
        if not self.wrapped:
            return list(self.argv)
        # -I -S: the launcher needs only the standard library, and site-packages on a network disk cost seconds
        start = [python, "-I", "-S", str(launcher or self.launcher_file)]
        return [*start, *self.launcher_arguments(), "--", *self.argv]

    @property
    def response_address(self) -> str:
        """Where the launcher dials: ``host:port``, several separated by commas."""
        return next((word[len(TOLD) :] for word in self.launcher_options if word.startswith(TOLD)), "")

    def launcher_arguments(self, *, dial_first: str = "") -> list[str]:
        """Return the launcher's options, for a backend that starts it in a way of its own.

        Args:
            dial_first: ``host:port`` that the launcher tries before the server's own addresses.
        """
        options = [word for word in self.launcher_options if not (dial_first and word.startswith(TOLD))]
        if dial_first:
            options.append(f"{TOLD}{dial_first},{self.response_address}")
        return [*options, *([f"--cwd={self.cwd}"] if self.cwd else [])]

    def script_environment(self) -> dict[str, str]:
        """Return the variables that a command on this machine needs on top of the server's, secrets included."""
        return {**expanded(self.env, os.environ), **self.secrets}


class _Meta(ABCMeta, MetaHasTraits):
    pass


class Backend(LoggingConfigurable, metaclass=_Meta):
    """Base of all backends; every configurable trait is also a ``config`` key of kernel.json."""

    name: ClassVar[str]
    bind_address: ClassVar[str] = "0.0.0.0"  #: what kernels bind on the far side when clients connect directly
    runs_here: ClassVar[bool] = False  #: kernels run on this machine as this user; its paths and interpreter are theirs
    impersonates: ClassVar[bool] = False  #: can start a kernel as ``request.user``
    submits_launchers: ClassVar[Literal["api", "script"]] = "script"  #: how argv that starts a launcher itself is run
    poll_interval: ClassVar[tuple[float, float]] = (
        0.25,
        10.0,
    )  #: seconds; fastest and slowest look of the default ``watch``

    @classmethod
    def submission(cls, argv: Iterable[str], chosen: str | None = None) -> Literal["api", "script"]:
        """Return how a kernelspec's command is submitted: by the backend, or by itself on this machine.

        Args:
            argv: The command with its placeholders.
            chosen: ``submit`` of the kernelspec, if it says so.
        """
        if chosen:
            return "script" if chosen == "script" else "api"
        return cls.submits_launchers if "response_address" in placeholders(argv) else "api"

    @classmethod
    def runs_command_here(cls, argv: Iterable[str], chosen: str | None = None) -> bool:
        """Whether a kernelspec's command names programs and files of this machine; arguments as for `submission`."""
        return cls.runs_here or cls.submission(argv, chosen) == "script"

    @property
    def installation(self) -> str:
        """Name of this installation: put it into names or labels of jobs, so that `discover` finds nobody else's."""
        from .identity import installation
        from .server import data_folder

        return installation(data_folder())

    async def recorded(self) -> list[Handle]:
        """Return the handles of this backend's kernels that this installation has records of, of any of its servers."""
        from .runtime import blocking
        from .server import kernel_server

        records = await blocking(kernel_server(self.config).store.list)
        return [record.handle for record in records if record.backend == self.name and record.handle]

    async def launch(self, request: LaunchRequest) -> Handle:
        """Start a kernel's job and return as soon as its handle is known; do not wait for the kernel.

        The default runs the command on this machine, for kernelspecs with ``"submit": "script"``: argv is then a submit
        script, and the job is found by `discover`.

        Raises:
            LaunchFailed: The platform refused; give it a typed reason.
            BackendError: The platform did not answer.
        """
        from .runtime import run_command

        done = await run_command(*request.command(), env=request.script_environment(), cwd=request.cwd)
        if done.code != 0:
            raise LaunchFailed(
                f"the submit script of kernel {request.kernel_id} ended with {done.code}", log=done.output
            )
        for handle in await self.discover(request.kernel_id):
            return handle
        return {"kernel_id": request.kernel_id}

    def kernel_command(self, argv: Sequence[str]) -> Sequence[str]:
        """Return what `launch` makes of ``request.argv``, for a restart inside the launcher.

        For a backend that puts limits around it, for example; the default changes nothing.
        """
        return argv

    async def adopt(self, handle: Handle, listener: tuple[str, int]) -> None:
        """Prepare for the launcher of a kernel that this process has taken over from another one.

        For a backend that brings the launchers' calls here itself; the default does nothing.

        Args:
            handle: Of the job.
            listener: Where this process listens for launchers.

        Raises:
            BackendError: The calls cannot be brought here; the launcher may still come by another way.
        """

    @abstractmethod
    async def status(self, handle: Handle) -> Status:
        """Look at a kernel's job; never change anything. A handle that the platform does not know is GONE.

        Raises:
            BackendError: The platform did not answer; the core turns it into UNKNOWN.
        """

    @abstractmethod
    async def terminate(self, handle: Handle, *, force: bool) -> None:
        """Stop a kernel's job and free all that it holds. Calling it again, or for a job that is gone, is harmless.

        Args:
            handle: Of the job.
            force: Kill instead of asking.
        """

    async def look(self, handle: Handle) -> Status:
        """Call `status`; an API error or a surprise in the backend becomes UNKNOWN, with the error as detail."""
        try:
            return await self.status(handle)
        except Exception as error:
            self.log.debug("status of %s by %s failed", handle, self.name, exc_info=True)
            kept = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
            return Status(state=State.UNKNOWN, detail=kept)

    async def watch(self, handle: Handle) -> AsyncIterator[Status]:
        """Yield a status whenever it may have changed, until the job is GONE.

        The default looks often while something changes and ever more rarely while nothing does, with jitter so that
        many kernels do not ask in step. Override it where the platform can push.
        """
        fastest, slowest = self.poll_interval
        interval, last = fastest, None
        while True:
            status = await self.look(handle)
            yield status
            if status.state is State.GONE:
                return
            interval = fastest if status != last else min(interval * 1.5, slowest)
            last = status
            await asyncio.sleep(interval * random.uniform(0.8, 1.2))

    async def signal(self, handle: Handle, signum: int) -> bool:
        """Send a signal without the launcher session. Returns False if the platform cannot (the default)."""
        return False

    async def logs(self, handle: Handle, *, tail: int = 50) -> str:
        """Return the last ``tail`` lines of the job's output; empty if the platform keeps none (the default).

        A handle with only ``kernel_id`` asks for a kernel that is gone, as its record is, if the platform can tell.
        """
        return ""

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        """Find kernels of this installation that exist out there, by label, tag or name; handles have ``kernel_id``.

        Args:
            kernel_id: Only this one; None: all that this installation could have started.
        """
        return []

    async def environments(self, where: str) -> list[Environment]:
        """Find kernels that could be started somewhere, for ``jupyter gp install --discover``.

        Args:
            where: What `Environment.config` leads to then: a host, for example.

        Raises:
            ConfigError: ``where`` is no such thing, or this backend cannot look (the default).
            BackendError: There was no answer from there.
        """
        raise ConfigError(f"backend {self.name} cannot look for environments: name a kernelspec by --from")

    async def check(self) -> list[Finding]:
        """Check that the platform can be used, for ``jupyter gp doctor``."""
        return []
