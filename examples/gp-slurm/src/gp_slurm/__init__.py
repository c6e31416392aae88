"""Run Jupyter kernels as Slurm jobs."""

import re
import shlex

from gp_core import Backend, BackendError, Finding, LaunchFailed, Reason, RemoteProvisioner, State, Status
from gp_core import hookimpl, run_command
from traitlets import List, Unicode

PENDING = {"PENDING", "CONFIGURING", "REQUEUED"}
ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
REFUSED = Reason("SlurmRefused", "Correct the options of this kernelspec; sinfo shows the partitions.")
ENDED = Reason("SlurmJobEnded", "Slurm ended the job: ask for more time or memory, or see who cancelled it.")


class SlurmProvisioner(RemoteProvisioner):
    """Selected by ``"provisioner_name": "slurm-provisioner"``."""

    backend_name = "slurm"


class SlurmBackend(Backend):
    name = "slurm"
    partition = Unicode(help="Partition to submit to; default: the cluster's.").tag(config=True)
    sbatch_options = List(Unicode(), help='More options of sbatch, such as ["--mem=4G"].').tag(config=True)
    python = Unicode("python3", help="Python of the nodes, 3.8 or newer, that runs the launcher.").tag(config=True)

    async def launch(self, request):
        command = shlex.join(request.command(python=self.python))  # the launcher's file is on a shared file system
        script = f"#!/bin/sh\nunset SLURM_EXPORT_ENV\nexec {command}\n"
        options = [f"--partition={self.partition}"] if self.partition else []
        options += [f"--job-name=gp-{request.kernel_id}", f"--chdir={request.cwd}" if request.cwd else "--no-kill"]
        options += ["--no-requeue", f"--output={request.launcher_file.parent}/slurm-{request.kernel_id}.log"]
        exported = f"--export={','.join(request.secrets)}"  # names only; the rest is the user's login environment
        try:
            job = await slurm("sbatch", "--parsable", *options, *self.sbatch_options, exported, stdin=script, env=request.secrets)
        except BackendError as error:
            if "submission failed" in str(error) and "contact" not in str(error):
                raise LaunchFailed(f"kernel {request.kernel_id}: {error}", reason=REFUSED) from None
            raise
        return {"kernel_id": request.kernel_id, "job_id": job.split(";")[0]}

    async def status(self, handle):
        if not (job := await show("job", handle["job_id"])):
            return Status(state=State.GONE)
        word, (code, signum) = job["JobState"], map(int, job["ExitCode"].split(":"))
        detail = f"Slurm job {handle['job_id']} is {word} ({job['Reason']})"
        if word in PENDING:
            return Status(state=State.PENDING, detail=detail)
        if word in ALIVE:
            return Status(state=State.RUNNING, host=(await show("node", job["BatchHost"]))["NodeAddr"], detail=detail)
        return Status(state=State.GONE, exit_code=-signum or code, reason=ENDED, detail=detail)

    async def signal(self, handle, signum):
        # --batch: the launcher alone, which hands it on
        return not await slurm("scancel", "--batch", f"--signal={signum}", handle["job_id"])

    async def terminate(self, handle, *, force):
        if force:
            await slurm("scancel", "--quiet", "--full", "--signal=KILL", handle["job_id"])
        await slurm("scancel", "--quiet", handle["job_id"])

    async def logs(self, handle, *, tail=50):
        job = await show("job", handle["job_id"])
        return await slurm("tail", f"--lines={tail}", job["StdOut"]) if job else ""

    async def discover(self, kernel_id=None):
        jobs = await slurm("squeue", "--me", "--noheader", "--format=%i gp-%j" % () if False else "--format=%i %j")
        found = [{"kernel_id": name[3:], "job_id": job} for job, name in map(str.split, jobs.splitlines()) if name[:3] == "gp-"]
        return [handle for handle in found if kernel_id in (None, handle["kernel_id"])]
