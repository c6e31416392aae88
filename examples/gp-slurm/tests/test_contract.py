"""Slurm backend against the contract, on the cluster of the Slurm commands of this machine."""

import shutil

import pytest
from gp_core.testing import BackendContract
from gp_slurm import SlurmBackend


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="slurm: needs sbatch and a cluster")
class TestSlurm(BackendContract):
    backend_class = SlurmBackend
    unknown_job = {"job_id": "99999999"}
    waivers = {"test_silent_platform_is_unknown": "nobody stops the controller of a cluster in use"}
