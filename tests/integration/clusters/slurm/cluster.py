"""A real Slurm on this machine - controller, authentication, two nodes - or a cluster that the tester has.

Debian packages: `slurm-wlm munge`, installed with a `/usr/sbin/policy-rc.d` that exits 101, so that none of
their services starts by itself. Nothing here touches those services, their key or `/etc/slurm`.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from clusters.availability import Unavailable
from clusters.isolated import IsolatedNode, make_instance_folder, sweep_instance_folders

_FOLDER_PREFIX = "gp-slurm-"
_CONTROLLER = "slurm-controller"
_ADDRESS = "127.0.0.1"
_START_DEADLINE = 30.0
"""Seconds; an idle machine takes 0.2."""
_PORT_ATTEMPTS = 5
# Below the ephemeral range (ip_local_port_range starts at 32768), so that no outgoing connection takes one.
_PORTS = range(20000, 32000)

_CONFIG = """\
ClusterName=gp
SlurmctldHost={controller}({address})
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
# pgid and no cgroups: a container's cgroup tree is read-only
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
# least loaded node first, so that a few jobs are on both
SelectTypeParameters=CR_Core,CR_LLN
SchedulerType=sched/backfill
# sbatch would wait for more jobs to schedule together, up to three seconds
SchedulerParameters=batch_sched_delay=0
# the tester's limits may be higher than a node may set
PropagateResourceLimits=NONE
# promise more cores than this machine has: the tests start many kernels that sleep
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class _DidNotStart(RuntimeError):
    """A daemon ended while it was starting; most likely somebody took its port."""


class SlurmCluster:
    """A context manager around a Slurm of our own, or around one that exists.

    Nodes share this machine's network and files, but have process tables and host names of their own: a job's
    kernel is not a process that the test could signal by the pid it reports.
    """

    def __init__(
        self,
        *,
        existing_config: Path | None = None,
        node_names: Sequence[str] = ("n1", "n2"),
        cpus_per_node: int = 16,
        node_timeout: int = 10,
    ) -> None:
        """Describe the cluster; `up` or `with` starts it.

        Args:
            existing_config: `slurm.conf` of a running cluster to use; nothing is started then.
            node_names: Names of our own nodes, which are also their host names.
            cpus_per_node: What each node promises; not what the machine has.
            node_timeout: Seconds without an answer after which the controller calls a node DOWN.
        """
        self.owned = existing_config is None
        self.node_names = tuple(node_names)
        self._config = existing_config
        self._cpus_per_node = cpus_per_node
        self._node_timeout = node_timeout
        self._folder: Path | None = None
        self._controller_port = 0
        self._munge: IsolatedNode | None = None
        self._controller: IsolatedNode | None = None
        self._nodes: dict[str, IsolatedNode] = {}

    # -- life

    def __enter__(self) -> SlurmCluster:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Start the cluster and wait until every node is idle; an existing one only has to answer.

        Raises:
            Unavailable: Binaries or rights are missing, or the existing cluster does not answer.
            RuntimeError: The cluster did not come up; the text has the ends of its logs.
        """
        if not self.owned:
            self._adopt()
            return
        _check_binaries(["munged", "slurmctld", "slurmd", "sbatch"])
        IsolatedNode.check_available()
        sweep_instance_folders(_FOLDER_PREFIX)
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._start()
                return
            except _DidNotStart:
                logs = self._log_tails()
                self.down()
                if attempt == _PORT_ATTEMPTS:
                    raise RuntimeError(f"Slurm did not start after {attempt} attempts:\n{logs}") from None
            except BaseException:
                self.down()
                raise

    def down(self) -> None:
        """End what `up` started, jobs too, and remove its files; an existing cluster stays. Idempotent."""
        for node in [*self._nodes.values(), self._controller, self._munge]:
            if node is not None:
                node.power_off()
        self._nodes, self._controller, self._munge = {}, None, None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # -- what tests and backends see

    @property
    def config(self) -> Path:
        """The cluster's `slurm.conf`, the value of `SLURM_CONF`."""
        if self._config is not None:
            return self._config
        if self._folder is None:
            raise RuntimeError("the Slurm cluster is not up")
        return self._folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """What to add to an environment so that Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.config)}

    def run(self, *argv: str, timeout: float = 60) -> str:
        """Run one of Slurm's commands and return what it prints.

        Args:
            argv: Command and arguments.
            timeout: Seconds.

        Raises:
            subprocess.CalledProcessError: It failed; `stderr` says why.
        """
        # A test run that is a Slurm job itself has variables that sbatch would take for options.
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        done = subprocess.run(argv, env=clean | self.env, check=True, text=True, capture_output=True, timeout=timeout)
        return done.stdout

    def address_of(self, node: str) -> str:
        """The address at which this machine reaches a node, whose name need not resolve here."""
        for field in self.run("scontrol", "--oneliner", "show", "node", node).split():
            name, _, value = field.partition("=")
            if name == "NodeAddr":
                return value
        raise LookupError(f"Slurm knows no address of node {node!r}")

    def jobs(self) -> list[str]:
        """The ids of the jobs that are pending, running or completing."""
        return self.run("squeue", "--noheader", "--states=PD,CF,R,S,CG", "--format=%A").split()

    def wait_for_nodes(self, states: Sequence[str] = ("idle",), *, timeout: float = _START_DEADLINE) -> None:
        """Wait until every node is in one of the states (as `sinfo --format=%T` names them).

        Raises:
            TimeoutError: They were not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            found = self._node_states()
            if found and set(found) <= set(states):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm nodes are {found}, not {tuple(states)}\n{self._log_tails()}")
            time.sleep(0.05)

    # -- faults

    def power_off(self, node: str) -> None:
        """End a node with all its jobs. The controller calls it DOWN after two to three `node_timeout`."""
        self._own_node(node).power_off()

    def power_on(self, node: str) -> None:
        """Start a node again; `wait_for_nodes` tells when it is back."""
        self._own_node(node).start()

    def freeze(self, node: str) -> None:
        """Stop every process of a node; `thaw` goes on."""
        self._own_node(node).freeze()

    def thaw(self, node: str) -> None:
        """Undo `freeze`."""
        self._own_node(node).thaw()

    def stop_controller(self) -> None:
        """Shut the controller down in good order; its jobs run on.

        Commands fail only after nine seconds of trying, which is how real clusters feel.
        """
        controller = self._own_controller()
        # "controller" is the keyword for "slurmctld alone"; the default would end the nodes' daemons too.
        self.run("scontrol", "shutdown", "controller")
        controller.wait_for_end(timeout=_START_DEADLINE)

    def start_controller(self) -> None:
        """Start the controller again, which finds its jobs in its saved state; returns when it answers."""
        self._own_controller().start()
        self._wait_until(self._controller_listens, "the controller listens")

    def freeze_controller(self) -> None:
        """Stop the controller in its tracks: commands connect and wait; `thaw_controller` goes on."""
        self._own_controller().freeze()

    def thaw_controller(self) -> None:
        """Undo `freeze_controller`."""
        self._own_controller().thaw()

    # -- how it comes up

    def _adopt(self) -> None:
        if self._config is None or not self._config.is_file():
            raise Unavailable(f"needs: the slurm.conf of an existing cluster; {self._config} is no file")
        _check_binaries(["sbatch", "squeue", "scancel", "sinfo"])
        try:
            names = self.run("sinfo", "--noheader", "--Node", "--format=%N").split()
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"the Slurm of {self._config} does not answer: {error.stderr.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"the Slurm of {self._config} does not answer") from error
        self.node_names = tuple(sorted(set(names)))

    def _start(self) -> None:
        self._folder = folder = make_instance_folder(_FOLDER_PREFIX)
        # munge refuses other users' clients otherwise; the secrets inside have modes of their own.
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        (folder / "state").mkdir()
        names = " ".join([_CONTROLLER, *self.node_names])
        (folder / "hosts").write_text(f"127.0.0.1 localhost {names}\n::1 localhost\n")
        self._controller_port, *node_ports = _free_ports(1 + len(self.node_names))
        (folder / "slurm.conf").write_text(
            _CONFIG.format(
                folder=folder,
                address=_ADDRESS,
                controller=_CONTROLLER,
                controller_port=self._controller_port,
                node_timeout=self._node_timeout,
                nodes="\n".join(
                    f"NodeName={name} NodeHostname={name} NodeAddr={_ADDRESS} Port={port}"
                    f" CPUs={self._cpus_per_node} RealMemory=4000 State=UNKNOWN"
                    for name, port in zip(self.node_names, node_ports, strict=True)
                ),
            )
        )
        self._munge = self._daemon(
            "munge",
            [
                *("munged", "--foreground", "--force"),
                *(f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/munged.pid"),
                *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"),
            ],
        )
        self._controller = self._daemon(_CONTROLLER, ["slurmctld", "-D"])
        self._nodes = {name: self._daemon(name, ["slurmd", "-D", "-N", name]) for name in self.node_names}
        self._munge.start()
        self._wait_until((folder / "munge.socket").exists, "munge has its socket")
        self._controller.start()
        # A node that registers before the controller listens tries again only a second later.
        self._wait_until(self._controller_listens, "the controller listens")
        for node in self._nodes.values():
            node.start()
        self._wait_until(lambda: set(self._node_states()) == {"idle"}, "every node is idle")

    def _daemon(self, name: str, argv: list[str]) -> IsolatedNode:
        assert self._folder is not None
        log = self._folder / f"{name}.out"
        # A node's environment is the environment of its jobs' prologues only: a plain one is enough.
        env = {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin", "LANG": "C.UTF-8"} | self.env
        return IsolatedNode(name, argv, hosts_file=self._folder / "hosts", log=log, env=env)

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a step of the start; a daemon that ends meanwhile is noticed at once."""
        deadline = time.monotonic() + _START_DEADLINE
        while not condition():
            for daemon in [self._munge, self._controller, *self._nodes.values()]:
                if daemon is not None and daemon.ended:
                    raise _DidNotStart(daemon.name)
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm: {what} still not true after {_START_DEADLINE:g} s\n{self._log_tails()}")
            time.sleep(0.02)

    def _controller_listens(self) -> bool:
        try:
            socket.create_connection((_ADDRESS, self._controller_port), timeout=1).close()
        except OSError:
            return False
        return True

    def _node_states(self) -> list[str]:
        try:
            return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        except subprocess.CalledProcessError:
            return []

    def _own_node(self, name: str) -> IsolatedNode:
        if name not in self._nodes:
            raise LookupError(f"{name!r} is no node of a Slurm that these tests started: {sorted(self._nodes)}")
        return self._nodes[name]

    def _own_controller(self) -> IsolatedNode:
        if self._controller is None:
            raise LookupError("these tests have not started this Slurm's controller")
        return self._controller

    def _log_tails(self, lines: int = 15) -> str:
        if self._folder is None:
            return ""
        logs = sorted([*self._folder.glob("*.log"), *self._folder.glob("*.out")])
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs
        )


def _check_binaries(names: Sequence[str]) -> None:
    # Debian's daemons are in /usr/sbin, which is not on every user's PATH.
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing:
        install = "apt-get install --no-install-recommends slurm-wlm munge"
        raise Unavailable(f"needs: {install} (missing: {', '.join(missing)})")


def _free_ports(count: int) -> list[int]:
    """Ports that are free now. Another run may still take one before it is used: then `up` tries others."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free TCP ports between {_PORTS.start} and {_PORTS.stop}")
