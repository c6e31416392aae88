"""`--spark-context-initialization-mode` with PyPI's pyspark in local mode, in the launcher alone: no cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clusters.availability import Unavailable, offer
from clusters.kernels.cache import cached
from jupyter_client.blocking.client import BlockingKernelClient

KIT = Path(__file__).parents[2] / "packages" / "gp-launchers" / "tests"
PYSPARK_VERSION = "3.5.9"
ENVIRONMENT = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_SUBMIT_ARGS": "--master local[1] pyspark-shell"}


def _environment_with_pyspark() -> Path:
    if shutil.which("java") is None:
        raise Unavailable("needs: apt-get install --no-install-recommends openjdk-17-jre-headless")

    def build(folder: Path) -> None:
        commands = [
            [getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(folder / "venv")],
            [f"{folder}/venv/bin/python", "-m", "pip", "install", "-q", f"pyspark=={PYSPARK_VERSION}", "ipykernel"],
        ]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            if done.returncode:
                raise Unavailable(f"needs: pyspark from PyPI: {(done.stderr or done.stdout).strip()[-500:]}")

    version = f"py{sys.version_info[0]}.{sys.version_info[1]}"
    return cached(f"pyspark-{PYSPARK_VERSION}-{version}", build) / "venv/bin/python"


@pytest.fixture(scope="session")
def spark_python() -> Path:
    """A Python with pyspark and ipykernel, kept outside the checkout."""
    return offer("pyspark", _environment_with_pyspark)


class Kernel:
    """A kernel behind a launcher."""

    def __init__(self, client: BlockingKernelClient, log: Callable[[], str]) -> None:
        self.client = client
        self.log = log

    def run(self, code: str) -> str:
        """Return what a cell prints, or its error."""
        printed: list[str] = []

        def hook(message: dict) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=120, output_hook=hook)["content"]
        return "".join(printed).strip() if reply["status"] == "ok" else f"{reply['ename']}: {reply['evalue']}"


@pytest.fixture
def start(spark_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Starts kernels with Spark options."""
    monkeypatch.syspath_prepend(str(KIT))
    from launcher_kit import Launcher, Server, make_certificate

    server = Server(*make_certificate(tmp_path))
    launcher = Launcher(tmp_path, server)

    @contextmanager
    def start(*options: str, **env: str) -> Iterator[Kernel]:
        argv = [str(spark_python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        running = launcher(
            command=[*launcher.command(None, options), "--", *argv],
            env={**ENVIRONMENT, **env, "IPYTHONDIR": str(tmp_path / "ipython")},
        )
        connection, _ = server.meet()
        ports = connection.next("listening", 60)["ports"]
        client = BlockingKernelClient(ip="127.0.0.1", transport="tcp", **ports)
        client.session.key = b"the-hmac-key"
        client.start_channels()
        try:
            client.wait_for_ready(timeout=120)
            yield Kernel(client, lambda: running.log)
        finally:
            client.stop_channels()
            connection.send(type="shutdown", grace=10)
            assert running.wait(30) == 0

    yield start
    launcher.close()
    server.stop()


MODE = "--spark-context-initialization-mode"


def test_eager(start: Callable) -> None:
    with start(MODE, "eager") as kernel:
        # the kernel answers only when they are there
        assert kernel.run("print(type(spark).__name__, type(sc).__name__)") == "SparkSession SparkContext"
        assert kernel.run("print(sc.parallelize(range(100)).sum(), spark.range(7).count())") == "4950 7"
        assert kernel.run("%who") == "Interactive namespace is empty."


def test_lazy(start: Callable) -> None:
    begin = time.monotonic()
    with start(MODE, "lazy") as kernel:
        assert kernel.run("print(1 + 1)") == "2"
        before_spark = time.monotonic() - begin
        assert kernel.run("print(type(spark).__name__)") in ("Pending", "SparkSession")
        assert kernel.run("print(spark.range(7).count(), sc.parallelize([1, 2]).sum())") == "7 3"
        assert time.monotonic() - begin > before_spark
        # once it is there, the names are the real things
        assert kernel.run("print(type(spark).__name__, type(sc).__name__)") == "SparkSession SparkContext"


def test_names_that_the_user_set_meanwhile_stay(start: Callable) -> None:
    with start(MODE, "lazy") as kernel:
        kernel.run("session, spark = spark, 'mine'")
        assert kernel.run("print(session.range(3).count(), spark)") == "3 mine"


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_without_pyspark_the_kernel_works_all_the_same(start: Callable, tmp_path: Path, mode: str) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "pyspark.py").write_text("raise ImportError('there is no pyspark here')")
    with start(MODE, mode, PYTHONPATH=str(tmp_path / "hidden")) as kernel:
        assert kernel.run("print(1 + 1)") == "2"
        text = "spark and sc are not available: ImportError: there is no pyspark here"
        assert kernel.run("spark.range(3)") == f"RuntimeError: {text}"
        assert kernel.run("print('still here')") == "still here"
        assert text in kernel.log()


def test_kernel_class(start: Callable, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "my_kernel.py").write_text(
        "from ipykernel.ipkernel import IPythonKernel\nclass MyKernel(IPythonKernel):\n    banner = 'mine'\n"
    )
    with start("--kernel-class-name", "my_kernel.MyKernel", PYTHONPATH=str(tmp_path / "lib")) as kernel:
        assert kernel.run("print(type(get_ipython().kernel).__name__)") == "MyKernel"
        assert "NameError" in kernel.run("spark")
