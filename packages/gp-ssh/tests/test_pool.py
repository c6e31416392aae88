"""Lines to hosts, with connections that are made up."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from gp_ssh import pool as module
from gp_ssh.connection import ConnectionFailed
from gp_ssh.hosts import Client, Entry, Target
from gp_ssh.pool import Line, Pool

TARGET = Target("h1", "10.0.0.1", 22, "me")


class Made:
    """A connection to nowhere."""

    def __init__(self, target: Target, through: Made | None = None) -> None:
        self.target, self.through, self.is_open = target, through, True

    def close(self) -> None:
        self.is_open = False


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "connect", Made)
    monkeypatch.setattr(module, "blocking", asyncio.to_thread)  # the tests' own loop


async def closes(connection: Any, within: float) -> bool:
    deadline = time.monotonic() + within
    while connection.is_open and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return not connection.is_open


async def test_a_connection_that_nobody_uses_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.3)
    gate = Line(TARGET)
    line = Line(replace(TARGET, hostname="10.0.0.2"), gate)
    connection: Any = await line.connection()
    for _ in range(5):
        await asyncio.sleep(0.1)
        assert await line.connection() is connection, "it is in use"
    assert connection.is_open
    assert connection.through.is_open, "what it goes through is in use, too"
    assert await closes(connection, 2)
    assert await closes(connection.through, 2)
    assert await line.connection() is not connection


async def test_jumps_follow_their_own_configuration_and_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = {"inner": "a,b", "b": "ignored", "a": "gate", "gate": ""}

    async def resolved(entry: Entry, client: Client) -> Target:
        return Target(entry.text, entry.host, 22, "me", proxy_jump=jumps[entry.host])

    monkeypatch.setattr(module, "resolve", resolved)
    hop: Any = await (await Pool().line(Entry.read("inner"), Client())).connection()
    hops = []
    while hop is not None:
        hops.append(hop.target.hostname)
        hop = hop.through
    assert hops == ["inner", "b", "a", "gate"]


async def test_jumps_in_a_circle_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolved(entry: Entry, client: Client) -> Target:
        return Target(entry.text, entry.host, 22, "me", proxy_jump="b" if entry.host == "a" else "a")

    monkeypatch.setattr(module, "resolve", resolved)
    with pytest.raises(ConnectionFailed, match="never ends"):
        await Pool().line(Entry.read("a"), Client())
