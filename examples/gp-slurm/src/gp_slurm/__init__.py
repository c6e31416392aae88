"""Run Jupyter kernels as Slurm jobs."""

import re
import shlex

from gp_core import Backend, BackendError, Finding, LaunchFailed, Reason, RemoteProvisioner, State, Status, hookimpl, run_command
from traitlets import List, Unicode

STATES = dict.fromkeys(["PENDING", "CONFIGURING", "REQUEUED"], State.PENDING)
STATES |= dict.fromkeys(["RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT"], State.RUNNING)  # others: GONE
REFUSED = Reason("SlurmRefused", "Correct partition and options of this kernelspec; sinfo shows what there is.")
REASONS = {
    State.PENDING: Reason("SlurmQueued", "Wait for free nodes, choose another partition, or raise launch_timeout."),
    State.GONE: Reason("SlurmJobEnded", "Ask for more time or memory, or ask who cancelled the job."),
    State.RUNNING: None,
}


class SlurmProvisioner(RemoteProvisioner):
    backend_name = "slurm"


class SlurmBackend(Backend):
    name = "slurm"
    partition = Unicode(help="Partition to submit to; default: the cluster's.").tag(config=True)
    sbatch_options = List(Unicode(), help="More options of sbatch, such as --mem=4G.").tag(config=True)
    python = Unicode("python3", help="Python of the nodes, 3.8 or newer, to run the launcher.").tag(config=True)

    async def launch(self, request):
        # a login environment and the secrets, by name; what kernels get of the server's environment is in there
        options = ["--parsable", "--no-requeue", f"--export={','.join(request.secrets)}", f"--job-name=gp-{request.kernel_id}"]
        options += [f"--output={request.launcher_file.parent}/slurm-{request.kernel_id}.log", *self.sbatch_options]
        options += [f"--partition={self.partition}"] * bool(self.partition) + [f"--chdir={request.cwd}"] * bool(request.cwd)
        script = f"#!/bin/sh\nunset SLURM_EXPORT_ENV\nexec {shlex.join(request.command(python=self.python))}\n"
        done = await run_command("sbatch", *options, stdin=script, env=request.secrets)
        if done.code != 0:
            raise LaunchFailed(f"Slurm refused kernel {request.kernel_id}", reason=REFUSED, log=done.output)
        return {"kernel_id": request.kernel_id, "job_id": done.output.strip().partition(";")[0]}

    async def status(self, handle):
        job = await show("job", handle["job_id"])
        state = STATES.get(job.get("JobState"), State.GONE)
        node = await show("node", job["BatchHost"]) if state is State.RUNNING else {}
        code, signum = map(int, job.get("ExitCode", "0:0").split(":"))
        detail = f"Slurm job {handle['job_id']} is {job.get('JobState', 'forgotten')} (reason: {job.get('Reason')})"
        exit_code = (-signum or code) if state is State.GONE else None
        return Status(state=state, host=node.get("NodeAddr"), exit_code=exit_code, reason=REASONS[state], detail=detail)

    async def signal(self, handle, signum):
        # to the job's first process only: that is the launcher, which hands it on
        return (await slurm("scancel", "--batch", f"--signal={signum}", handle["job_id"])).code == 0

    async def terminate(self, handle, *, force):
        await slurm("scancel", *["--full", "--signal=KILL"] * force, handle["job_id"])

    async def logs(self, handle, *, tail=50):
        job = await show("job", handle["job_id"])
        return (await run_command("tail", f"--lines={tail}", job["StdOut"])).output if job else ""

    async def discover(self, kernel_id=None):
        jobs = (await slurm("squeue", "--me", "--noheader", "--format=%i %j")).output
        found = [{"job_id": job, "kernel_id": name[3:]} for job, name in map(str.split, jobs.splitlines()) if name[:3] == "gp-"]
        return [handle for handle in found if kernel_id in (None, handle["kernel_id"])]

    async def check(self):
        done = await run_command("sinfo", "--noheader", "--format=%P %D %T")
        advice = "" if done.code == 0 else "See that slurmctld runs and that SLURM_CONF is right."
        return [Finding(ok=done.code == 0, subject="Slurm", text=done.output.strip(), advice=advice)]


async def slurm(*command):
    done = await run_command(*command)
    if done.code != 0 and not re.search("Invalid job id|already complet", done.output):
        raise BackendError(done.output.strip())
    return done


async def show(kind, name):
    out = (await slurm("scontrol", "--oneliner", "show", kind, name)).output
    return dict(reversed(re.findall(r"(\w+)=(\S*)", out)))  # a job's own texts come last and do not win


@hookimpl
def gp_backends():
    return [SlurmBackend]
