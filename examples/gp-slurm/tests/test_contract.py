"""The Slurm backend against the contract, on the cluster that this machine's Slurm commands talk to."""

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from gp_core.testing import BackendContract
from gp_slurm import SlurmBackend


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="slurm: needs the commands of a cluster")
class TestSlurm(BackendContract):
    backend_class = SlurmBackend
    unknown_job: ClassVar = {"job_id": "99999999"}
    waivers: ClassVar = {"test_silent_platform_is_unknown": "nobody stops the controller of a cluster in use"}

    @pytest.fixture
    def data_dir(self):
        with tempfile.TemporaryDirectory(prefix=".gp-test-", dir=Path.home()) as folder:  # nodes share the home folders
            yield Path(folder)
