import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from gp_core.errors import BackendError
from gp_core.runtime import blocking, run_command, runtime


async def _thread() -> str:
    return threading.current_thread().name


def test_work_runs_on_one_background_loop_whatever_loop_asks() -> None:
    async def ask() -> str:
        return await runtime().call(_thread())

    assert asyncio.run(ask()) == asyncio.run(ask()) == "gp-runtime"


async def test_errors_and_results_come_back() -> None:
    async def fail() -> None:
        raise BackendError("no")

    with pytest.raises(BackendError, match="no"):
        await runtime().call(fail())


async def test_cancelling_the_caller_cancels_the_work() -> None:
    seen = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.set()
            raise

    task = asyncio.create_task(runtime().call(endless()))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(seen.wait, 5)


async def test_blocking_work_stops_no_loop() -> None:
    started = time.monotonic()
    naps = [asyncio.create_task(runtime().call(_nap(0.2))) for _ in range(4)]
    await asyncio.sleep(0.01)
    assert await runtime().call(_thread()) == "gp-runtime"
    assert time.monotonic() - started < 0.15
    await asyncio.gather(*naps)


async def _nap(seconds: float) -> None:
    await blocking(time.sleep, seconds)


async def test_commands() -> None:
    async def run() -> tuple[int, str]:
        done = await run_command("sh", "-c", "cat; echo $GP_X; echo err >&2; exit 3", stdin="in\n", env={"GP_X": "x"})
        return done.code, done.output

    assert await runtime().call(run()) == (3, "in\nx\nerr\n")
    with pytest.raises(BackendError, match="nowhere-at-all cannot be run: No such file"):
        await runtime().call(run_command("nowhere-at-all"))
    with pytest.raises(BackendError, match="did not end within"):
        await runtime().call(run_command("sleep", "10", timeout=0.1))


def test_a_forked_child_starts_its_own() -> None:
    async def ask() -> str:
        return await runtime().call(_thread())

    asyncio.run(ask())
    before = runtime()
    child = os.fork()
    if child == 0:
        try:
            alright = runtime() is not before and asyncio.run(ask()) == "gp-runtime"
            os._exit(0 if alright else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert runtime() is before


SCRIPT = """
import asyncio, atexit, sys
from gp_core.runtime import blocking, runtime

async def work():
    await blocking(print, "worker")

def last():
    asyncio.run(runtime().call(work()))
    print("done", flush=True)

if "early" in sys.argv:
    atexit.register(last)
asyncio.run(runtime().call(work()))
if "late" in sys.argv:
    atexit.register(last)
if "exit" in sys.argv:
    sys.exit(0)
"""


@pytest.mark.parametrize("how", [["early"], ["late"], ["early", "exit"]])
def test_it_still_works_while_the_interpreter_exits(how: list[str]) -> None:
    argv = [sys.executable, "-W", "error", "-c", SCRIPT, *how]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["worker", "worker", "done"], "")


CLEANING = """
import asyncio
from gp_core.runtime import runtime

async def slow():
    await asyncio.sleep(0.3)
    print("cleaned", flush=True)

async def start():
    runtime().spawn(slow(), name="clean-up of kernel 1")

asyncio.run(runtime().call(start()))
"""


@pytest.mark.parametrize("what", ["clean-up", "record"])
def test_the_end_of_the_process_waits_for_clean_ups_and_records(what: str) -> None:
    code = CLEANING.replace("clean-up", what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "cleaned\n"


def test_nothing_is_started_by_an_import() -> None:
    code = "import gp_core.local, threading; assert threading.active_count() == 1, threading.enumerate()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


async def test_calls_that_hang_delay_no_others() -> None:
    free = threading.Event()

    async def many() -> None:
        hanging = [asyncio.ensure_future(blocking(free.wait, 20)) for _ in range(20)]
        await asyncio.sleep(0)
        began = time.monotonic()
        await blocking(int)
        assert time.monotonic() - began < 5
        free.set()
        await asyncio.gather(*hanging)

    await runtime().call(many())


def test_threads_that_come_together_share_one_server(installation: object) -> None:
    from gp_core.plugins import plugins
    from gp_core.server import kernel_server

    together, found = threading.Barrier(12), []

    def first() -> None:
        together.wait()
        found.append((kernel_server(), plugins()))

    threads = [threading.Thread(target=first) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
