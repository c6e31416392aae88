"""The options of kernels over ssh."""

from __future__ import annotations

from traitlets import CaselessStrEnum, Dict, HasTraits, Int, List, Unicode, Union

from gp_core import from_env


class SshOptions(HasTraits):
    """What operators and kernelspecs may say; those that are tagged ``operator`` only operators may."""

    remote_hosts = from_env(
        List(Union([Unicode(), Dict()]), help="Each a host, user@host:port, or {host, weight, labels}."),
        "GP_REMOTE_HOSTS",
    )
    host_selector = Dict(help="Labels that a host must have to be chosen, such as {'gpu': 'a100'}.").tag(config=True)
    load_balancing_algorithm = from_env(
        Unicode(
            "round-robin",
            help="Which host is next: round-robin, least-connection, random, weighted, sticky, least-load.",
        ),
        "GP_LOAD_BALANCING_ALGORITHM",
    )
    remote_python = from_env(
        Unicode(help="Python of the hosts, 3.8 or newer, to run launchers. Default: what is found there."),
        "GP_REMOTE_PYTHON",
    )
    callback = from_env(
        CaselessStrEnum(
            ["auto", "dial", "ssh"],
            "auto",
            help="How launchers call back: by dialling the server, through ssh, or as a first visit to the host finds.",
        ),
        "GP_SSH_CALLBACK",
    )
    ssh_config = from_env(Unicode(help="Configuration of ssh. Default: the user's own."), "GP_SSH_CONFIG")
    connector = from_env(
        CaselessStrEnum(["paramiko", "ssh"], "paramiko", help="This process connects, or the user's own ssh."),
        "GP_SSH_CONNECTOR",
    )
    remote_user = from_env(
        Unicode(help="Whom to log in as where remote_hosts does not say; {username}: the kernel's user.").tag(
            operator=True
        ),
        "GP_REMOTE_USER",
    )
    password_file = from_env(
        Unicode(help="File with the password of all hosts.").tag(operator=True), "GP_SSH_PASSWORD_FILE"
    )
    password_env = from_env(
        Unicode(help="Variable with the password of all hosts.").tag(operator=True), "GP_SSH_PASSWORD_ENV"
    )

    nice = Int(0, min=0, max=19, help="How far others come first on the host.").tag(config=True)
    cpu_affinity = Unicode(help="Processors that a kernel may use, such as 0-3,8. Default: all.").tag(config=True)
    memory_limit = Unicode(help="Memory that a kernel may have, such as 4Gi. Default: no limit.").tag(config=True)
