"""The options of kernels in containers."""

from __future__ import annotations

from traitlets import Bool, CaselessStrEnum, Dict, Float, HasTraits, Int, List, Unicode

from gp_core import from_env


class ContainerOptions(HasTraits):
    """What operators and kernelspecs may say of any container; what is tagged ``operator`` only operators may."""

    engine = Unicode(
        help="Address of an engine (unix://, tcp://, ssh://) or name of a docker context. Default: as docker finds it."
    ).tag(config=True)
    image_name = from_env(Unicode(help="Image that has the kernel."), "GP_IMAGE_NAME")
    image = Unicode(help="The same, and wins: what users choose by KERNEL_IMAGE if they may.").tag(config=True)
    allowed_images = List(
        Unicode(), help="Regular expressions; the whole name of every image must match one. Default: any image."
    ).tag(config=True, operator=True)
    pull_policy = CaselessStrEnum(["missing", "always", "never"], "missing", help="When an image is pulled.").tag(
        config=True
    )
    pull_timeout = Float(900.0, min=1, help="Seconds for a pull.").tag(config=True)
    platform = Unicode(help="Such as linux/arm64. Default: the engine's own.").tag(config=True)
    entrypoint = CaselessStrEnum(
        ["keep", "replace"], "keep", help="Run the launcher through the image's entrypoint, or instead of it."
    ).tag(config=True)
    python = Unicode("python3", help="A Python of the image, 3.8 or newer, that runs the launcher.").tag(config=True)

    user = Unicode(
        help="USER[:GROUP], names of the image or numbers. Default: the image's, or 1000:100 if that is prohibited."
    ).tag(config=True)
    uid = Unicode(help="User of the kernel (KERNEL_UID); wins over user.").tag(config=True)
    gid = Unicode(help="Group of the kernel (KERNEL_GID); wins over user.").tag(config=True)
    working_dir = Unicode(help="Folder that the kernel starts in. Default: the image's.").tag(config=True)
    environment = Dict(help="Variables of the container; docker inspect shows them.").tag(config=True)
    labels = Dict(help="More labels.").tag(config=True)

    cpus = Unicode(help="Processors that the kernel may use, such as 2 or 500m.").tag(config=True)
    memory = Unicode(help="Memory that it may use, such as 4Gi.").tag(config=True)
    gpus = Unicode(help='GPUs: "all", a number, or ids separated by commas.').tag(config=True)
    tmpfs = List(Unicode(), help="Folders in memory: PATH or PATH:size=1g.").tag(config=True)
    ulimits = Dict(help="Such as {'nofile': 65536} or {'nofile': '1024:65536'}.").tag(config=True)
    volumes = List(Unicode(), help="SOURCE:TARGET[:ro]: a path of the engine's machine, or a volume.").tag(config=True)
    allowed_volumes = List(
        Unicode(),
        help="Paths that may be mounted, with all below them; names of volumes. Default: no path, any volume.",
    ).tag(config=True, operator=True)
    mirror_working_dirs = from_env(
        Bool(False, help="Mount the kernel's working directory at its own path, if allowed_volumes has it.").tag(
            operator=True
        ),
        "GP_MIRROR_WORKING_DIRS",
    )
    networks = from_env(List(Unicode(), help="Networks to be in. Default: the engine's own."), "GP_DOCKER_NETWORK")
    host_network = Bool(False, help="Kernels may use the network of the engine's machine or of other containers.").tag(
        config=True, operator=True
    )

    stop_timeout = Int(10, min=0, help="Seconds for the container to end when the engine is told to stop it.").tag(
        config=True
    )
    read_only = Bool(False, help="Nothing of the image can be written.").tag(config=True)
    capabilities = List(Unicode(), help="Linux capabilities that kernels keep. Default: none.").tag(
        config=True, operator=True
    )
    pids_limit = Int(4096, min=-1, help="Processes and threads at a time; -1: no limit.").tag(
        config=True, operator=True
    )
    init = Bool(True, help="An init reaps the kernel's orphans.").tag(config=True, operator=True)


class DockerOptions(ContainerOptions):
    """What there is besides on one engine."""

    shm_size = Unicode(help="Size of /dev/shm, such as 1Gi. Default: the engine's, 64Mi as a rule.").tag(config=True)
    devices = List(Unicode(), help="Devices of the machine: PATH, or PATH:PATH:rwm.").tag(config=True, operator=True)
    security_opt = List(
        Unicode(), ["no-new-privileges"], help="As of docker run; without no-new-privileges, sudo works inside."
    ).tag(config=True, operator=True)
    log_driver = Unicode(
        "json-file", help="Where output goes; json-file is limited to 20 MB. Empty: the engine's."
    ).tag(config=True, operator=True)
    remove_container = from_env(
        Bool(True, help="Remove containers that have ended; those that are kept are found by jupyter gp gc."),
        "GP_REMOVE_CONTAINER",
    )


class SwarmOptions(ContainerOptions):
    """What there is besides of services."""

    constraints = List(Unicode(), help="Nodes that may run the kernel, such as node.labels.gpu==a100.").tag(config=True)
    preferences = List(Unicode(), help="Labels to spread kernels over, such as node.labels.zone.").tag(config=True)
    reserve_cpus = Unicode(help="Processors that a node must have free. Default: cpus.").tag(config=True)
    reserve_memory = Unicode(help="Memory that a node must have free. Default: memory.").tag(config=True)
    no_new_privileges = Bool(True, help="Nothing gains rights by setuid, such as sudo; from engine 25 on.").tag(
        config=True, operator=True
    )
