"""Run Jupyter kernels as Slurm jobs."""

import re
import shlex

from traitlets import List, Unicode

import gp_core as gp
from gp_core import Reason, State

REFUSED = Reason("SlurmRefused", "Correct partition and options of this kernelspec; sinfo shows what there is.")
QUEUED = Reason("SlurmQueued", "Wait for free nodes, choose another partition, or raise launch_timeout.")
ENDED = Reason("SlurmJobEnded", "Ask for more time or memory, or ask who cancelled the job.")
STATES = dict.fromkeys(["PENDING", "CONFIGURING", "REQUEUED"], (State.PENDING, QUEUED))
STATES |= dict.fromkeys(["RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT"], (State.RUNNING, None))


class SlurmProvisioner(gp.RemoteProvisioner):
    backend_name = "slurm"


class SlurmBackend(gp.Backend):
    name = "slurm"
    partition = Unicode(help="Partition to submit to; default: the cluster's.").tag(config=True)
    sbatch_options = List(Unicode(), help="More options of sbatch, such as --mem=4G.").tag(config=True)
    python = Unicode("python3", help="Python of the nodes, 3.8 or newer, to run the launcher.").tag(config=True)

    async def launch(self, request):
        script = f"#!/bin/sh\nunset SLURM_EXPORT_ENV\nexec {shlex.join(request.command(python=self.python))}\n"
        # variables are named and not written out: argv is seen by everybody; all others are those of a login
        options = [f"--job-name=gp-{self.installation}-{request.kernel_id}", "--no-requeue"]
        options += [f"--export={','.join(request.secrets)}", *["--partition", self.partition] * bool(self.partition)]
        options += [f"--output={request.launcher_file.parent}/slurm-{request.kernel_id}.log", *self.sbatch_options]
        done = await gp.run_command("sbatch", "--parsable", *options, stdin=script, env=request.secrets)
        if done.code != 0:
            raise gp.LaunchFailed(f"Slurm refused kernel {request.kernel_id}", reason=REFUSED, log=done.output)
        return {"kernel_id": request.kernel_id, "job_id": done.output.strip().partition(";")[0]}

    async def status(self, handle):
        job = {"JobState": "FORGOTTEN", "ExitCode": "0:0"} | await show("job", handle["job_id"])
        state, reason = STATES.get(job["JobState"], (State.GONE, ENDED))
        host = (await show("node", job["BatchHost"]))["NodeAddr"] if state is State.RUNNING else None
        code, signum = map(int, job["ExitCode"].split(":"))
        detail = f"Slurm job {handle['job_id']} is {job['JobState']} (reason: {job.get('Reason')})"
        return gp.Status(state=state, host=host, exit_code=-signum or code, reason=reason, detail=detail)

    async def signal(self, handle, signum):
        # --batch is the job's first process alone: the launcher, which hands it on
        return (await slurm("scancel", "--batch", f"--signal={signum}", handle["job_id"])).code == 0

    async def terminate(self, handle, *, force):
        await slurm("scancel", *["--full", "--signal=KILL"] * force, handle["job_id"])

    async def logs(self, handle, *, tail=50):
        job = await show("job", handle["job_id"])
        return (await gp.run_command("tail", f"--lines={tail}", job["StdOut"])).output if job else ""

    async def discover(self, kernel_id=None):
        jobs = (await slurm("squeue", "--me", "--noheader", "--format=%i %j")).output
        found = re.findall(rf"^(\d+) gp-{self.installation}-(\S+)$", jobs, re.MULTILINE)
        return [{"kernel_id": kernel, "job_id": job} for job, kernel in found if kernel_id in (None, kernel)]

    async def check(self):
        done = await gp.run_command("sinfo", "--noheader", "--format=%P %D %T")
        advice = "See that slurmctld runs and that SLURM_CONF is right." * (done.code != 0)
        return [gp.Finding(ok=not advice, subject="Slurm", text=done.output.strip(), advice=advice)]


async def slurm(*command):
    done = await gp.run_command(*command)
    if done.code != 0 and not re.search("Invalid job id|already complet", done.output):
        raise gp.BackendError(done.output.strip())
    return done


async def show(kind, name):
    out = (await slurm("scontrol", "--oneliner", "show", kind, name)).output
    return dict(reversed(re.findall(r"(\w+)=(\S*)", out)))  # the first of a name wins: a job's own texts come last


@gp.hookimpl
def gp_backends():
    return [SlurmBackend]
