import asyncio

import pytest

from gp_core import gate as gate_module
from gp_core.gate import Gate
from gp_core.runtime import runtime


async def third(*, begins: bool) -> tuple[bool, bool]:
    """Whether the third of three can pass a gate for two at once, and whether soon after."""

    async def use() -> tuple[bool, bool]:
        gate, begun = Gate(2), [asyncio.Event() for _ in range(3)]
        for event in begun[:2]:
            await asyncio.wait_for(gate.enter(event), 1)
        entering = asyncio.create_task(gate.enter(begun[2]))
        await asyncio.sleep(0.05)
        early = entering.done()
        if begins:
            begun[0].set()
        await asyncio.wait({entering}, timeout=0.5)
        return early, entering.done()

    return await runtime().call(use())


async def test_the_next_one_passes_when_one_has_begun() -> None:
    assert await third(begins=True) == (False, True)


async def test_a_launcher_that_never_calls_back_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await third(begins=False) == (False, False)
    monkeypatch.setattr(gate_module, "PATIENCE", 0.2)
    assert await third(begins=False) == (False, True)
