from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launcher_kit import Launcher, Server, make_certificate


@pytest.fixture(autouse=True, scope="session")
def hang_up():
    """Processes get SIGHUP as in a terminal, also if nohup started the tests: launchers leave it ignored then."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(certificate):
    server = Server(*certificate)
    yield server
    server.stop()


@pytest.fixture
def launch(tmp_path, server):
    launcher = Launcher(tmp_path, server)
    yield launcher
    launcher.close()
