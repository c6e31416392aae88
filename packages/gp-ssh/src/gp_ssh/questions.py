"""Questions that `far` answers on a host; many that come at the same time travel together."""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from gp_core import BackendError, Reason
from gp_core.runtime import runtime

from . import far
from .connection import ConnectionFailed
from .pool import Line

SCRIPT = inspect.getsource(far).encode()
LOADER = (
    "import json,sys;i=sys.stdin.buffer;a,b,c=map(int,i.readline().split());"
    'exec(compile(i.read(a),"far","exec"));r=json.loads(i.read(b));main(r,i.read(c))'
)
UNDER_WAY = 3  # scripts on one host, until further questions wait for each other
TOGETHER = 16  # questions of one script: it answers all or none
NO_SUDO = Reason(
    "ImpersonationFailed",
    "Let the user of the ssh connection become the kernel's without a password (NOPASSWD in sudoers of the host).",
)
FAR_FAILED = Reason("HostFailed", "The host's own message is above; often its disk is full or the home is read-only.")


class NoAnswer(BackendError):
    """The script did not run to its end."""


class Questions:
    """Asks one host, as one user.

    Args:
        line: The way there.
        user: Whom to become there by sudo; empty: nobody else.
    """

    def __init__(self, line: Line, user: str = "") -> None:
        self.line = line
        self.user = user
        self._waiting: deque[tuple[str, Mapping[str, Any], asyncio.Future[dict[str, Any]]]] = deque()
        self._under_way = 0

    async def ask(self, python: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask one question, soon and not necessarily alone.

        Args:
            python: Interpreter to answer it.
            request: With ``ask``, the question's name.

        Raises:
            ConnectionFailed: The host cannot be reached.
            BackendError: It answered with an error.
        """
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((python, request, answer))
        if self._under_way < UNDER_WAY:
            self._under_way += 1
            runtime().spawn(self._deliver(), name=f"questions to {self.line.target.name}")
        return self._read(await answer)

    async def ask_alone(self, command: str, request: Mapping[str, Any], more: bytes = b"") -> dict[str, Any]:
        """Ask one question with data, or by a command of its own for the shell; raises as `ask` does."""
        return self._read((await self._answers(command, [request], more))[0])

    async def _deliver(self) -> None:
        try:
            while self._waiting:
                python = self._waiting[0][0]
                some = [self._waiting.popleft() for _ in range(min(TOGETHER, len(self._waiting)))]
                some = [one for one in some if not one[2].done()]  # whose callers are still there
                try:
                    answers = await self._answers(by(python), [request for _, request, _ in some]) if some else []
                except Exception as error:
                    for _, _, answer in some:
                        if not answer.done():
                            answer.set_exception(error)
                else:
                    for (_, _, answer), it in zip(some, answers, strict=True):
                        if not answer.done():
                            answer.set_result(it)
        finally:
            self._under_way -= 1

    def _read(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "error" in answer:
            raise ConnectionFailed(f"{self.line.target.name}: {answer['error']}", FAR_FAILED, of_host=not self.user)
        return answer

    async def _answers(
        self, command: str, requests: Sequence[Mapping[str, Any]], more: bytes = b""
    ) -> list[dict[str, Any]]:
        mark = secrets.token_hex(8)
        asked = json.dumps({"mark": mark, "requests": requests}).encode()
        data = b"%d %d %d\n" % (len(SCRIPT), len(asked), len(more)) + SCRIPT + asked + more
        command = command.replace("@mark@", mark)
        if self.user:
            command = f"exec sudo -n -H -u {shlex.quote(self.user)} -- /bin/sh -c {shlex.quote(command)}"
        done = await self.line.run(command, data)
        for text in done.output.decode("utf-8", "replace").splitlines():  # login shells print whatever they like
            if text.startswith(mark):
                answers: list[dict[str, Any]] = json.loads(text[len(mark) :])
                if len(answers) == len(requests):
                    return answers
        name, said = self.line.target.name, (done.errors or done.output).decode("utf-8", "replace").strip()
        if self.user and "sudo" in said:
            text = f"{name} does not let us run kernels as {self.user}: {said[-500:]}"
            raise ConnectionFailed(text, NO_SUDO, of_host=False)
        raise NoAnswer(f"{name} gave no answer (exit code {done.code}): {said[-500:]}")


def by(python: str) -> str:
    """Return the command for the shell that lets an interpreter answer."""
    return f"exec {shlex.quote(python)} -I -S -c {shlex.quote(LOADER)}"
