"""Connections that are processes of ssh: what is run, what goes through, what is said of failures."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gp_core.errors import ConfigError
from gp_core.runtime import runtime
from gp_docker.connection import Endpoint
from gp_docker.engine import Engine
from gp_docker.reasons import EngineUnreachable
from gp_docker.through_ssh import command_of

DIAL = "docker system dial-stdio"
ENGINE = """
import sys
while sys.stdin.readline():
    while sys.stdin.readline().strip():
        pass
    body = '{"ApiVersion": "1.44", "Version": "27"}'
    print("HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r" % len(body))
    print(body, end="", flush=True)
"""


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://GPU", ["--", "GPU", DIAL]),
        ("ssh://ada@gpu:2222", ["-l", "ada", "-p", "2222", "--", "gpu", DIAL]),
        (
            "ssh://gpu/run/user/1000/docker.sock",
            ["--", "gpu", f"docker --host unix:///run/user/1000/docker.sock {DIAL[7:]}"],
        ),
        ("ssh://gpu/a b;reboot", ["--", "gpu", f"docker --host unix://'/a b;reboot' {DIAL[7:]}"]),
        ("ssh://-oProxyCommand=reboot", ["--", "-oProxyCommand=reboot", DIAL]),
    ],
)
def test_what_is_run(url: str, expected: list[str]) -> None:
    command = command_of(url)
    assert command[-len(expected) :] == expected
    assert "BatchMode=yes" in command


@pytest.mark.parametrize("url", ["ssh://", "ssh:///path", "ssh://gpu:port", "ssh://ada:secret@gpu", "ssh://gpu?x=1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="ssh://"):
        command_of(url)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Engine]:
    """Make a program the ssh of this user, and return the engine behind it."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def made(program: str) -> Engine:
        path = tmp_path / "ssh"
        path.write_text(f"#!{sys.executable}\n{program}")
        path.chmod(0o755)
        return Engine(Endpoint("ssh://gpu", "ssh://gpu"))

    return made


def version(engine: Engine) -> str:
    async def asked() -> str:
        told = await asyncio.gather(*(engine.do(lambda client: client.version()["Version"]) for _ in range(5)))
        return ",".join(told)

    return runtime().submit(asked()).result(30)


def test_an_engine_answers(ssh: Callable[[str], Engine]) -> None:
    assert version(ssh(ENGINE)) == "27,27,27,27,27"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('ada@gpu: Permission denied (publickey).')", "Permission denied (publickey)."),
        ("import sys; print('sh: docker: not found', file=sys.stderr); sys.exit(127)", "docker: not found"),
        ("import sys; sys.stdin.readline()", "without response"),
        ("print('Welcome to gpu!', flush=True)", "Welcome to gpu!"),
    ],
)
def test_what_ssh_says_is_told(ssh: Callable[[str], Engine], program: str, said: str) -> None:
    with pytest.raises(EngineUnreachable, match="engine ssh://gpu does not answer") as caught:
        version(ssh(program))
    assert said in str(caught.value)


def test_one_that_hangs_is_given_up(ssh: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gp_docker.engine.PATIENCE", 0.5)
    monkeypatch.setattr("gp_docker.connection.LONGEST", 1.0)
    began = time.monotonic()
    with pytest.raises(EngineUnreachable, match="within"):
        version(ssh("import time; time.sleep(60)"))
    assert time.monotonic() - began < 10
