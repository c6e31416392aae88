"""The contract against the embedded backend, with real launchers and processes."""

from __future__ import annotations

import pytest

from gp_core.local import LocalBackend
from gp_core.testing import BackendContract

pytestmark = pytest.mark.contract


class TestLocal(BackendContract):
    backend_class = LocalBackend
    unknown_job = {"pid": 2**22 + 1}
    start_timeout = 30.0
    end_timeout = 15.0
    settle = 0.3
    waivers = {"test_silent_platform_is_unknown": "the process table of this machine always answers"}


class TestLocalDirect(TestLocal):
    channels = "direct"
