"""Why a container did not start or ended, as typed reasons; and which of them an engine's error means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from gp_core import BackendError, LaunchFailed, Reason
from gp_core.errors import COMMAND_NOT_FOUND

ENGINE_UNREACHABLE = Reason(
    "EngineUnreachable", "Check that the engine runs and DOCKER_HOST or the docker context is right (docker version)."
)
IMAGE_NOT_FOUND = Reason("ImageNotFound", "Correct image_name, or build or pull the image on that engine.")
PULL_DENIED = Reason("PullDenied", "Log in to the registry (docker login) as the user that runs this server.")
PULL_TIMEOUT = Reason("PullTimeout", "Pull the image beforehand, or raise pull_timeout.")
REGISTRY_UNREACHABLE = Reason(
    "RegistryUnreachable", "The engine cannot reach the registry: check its network or proxy."
)
EXEC_FORMAT = Reason("ExecFormat", "The image is for another processor: choose another image, or set platform.")
NO_SUCH_DEVICE = Reason("NoSuchDevice", "The engine's machine lacks that device or its driver: choose another engine.")
PORT_CONFLICT = Reason("PortConflict", "Another container or program has that port: remove it from the options.")
NAME_TAKEN = Reason("NameTaken", "A container of this kernel exists already: end it by jupyter gp stop.")
NO_SUCH_NETWORK = Reason("NoSuchNetwork", "Correct networks, or make the network on that engine.")
NO_SUCH_USER = Reason("NoSuchUser", "Name a user that the image has, or a number, such as 1000:100.")
BAD_OPTION = Reason("BadOption", "The engine's own words say which option it refused.")
CONTAINER_ENDED = Reason(
    "ContainerEnded", 'Read its output above; an entrypoint that runs no command needs "entrypoint": "replace".'
)
DISK_FULL = Reason(
    "DiskFull",
    "Free space on the engine's machine: docker system df shows what has it, docker system prune frees some.",
)
NOT_A_MANAGER = Reason("NotAManager", "Name a manager of the Swarm: docker node ls works there.")
ENGINE_TOO_OLD = Reason("EngineTooOld", "Update the engine, or do without that option.")

_TEXTS: tuple[tuple[str, Reason], ...] = (
    (r"executable file not found|no such file or directory: unknown|permission denied: unknown", COMMAND_NOT_FOUND),
    (r"not a swarm manager", NOT_A_MANAGER),
    (r"no space left on device|disk quota exceeded", DISK_FULL),
    (r"exec format error|does not match the (detected|specified)|no matching manifest", EXEC_FORMAT),
    (
        r"select device driver|gathering device information|no such device|nvidia-container|(GPU|CDI) (vendor|device)",
        NO_SUCH_DEVICE,
    ),
    (r"port is already allocated|address already in use", PORT_CONFLICT),
    (r"unauthorized|denied|credentials store|docker-credential-|authentication required|no basic auth", PULL_DENIED),
    (
        r"no such host|connection refused|i/o timeout|tls:|x509|network is unreachable|request canceled|EOF$",
        REGISTRY_UNREACHABLE,
    ),
    (r"network .*not found", NO_SUCH_NETWORK),
    (r"no such image|manifest unknown|not found|repository does not exist|invalid reference", IMAGE_NOT_FOUND),
    (r"unable to find (user|group)|no matching entries in (passwd|group)", NO_SUCH_USER),
    (r"is already in use by container|name conflicts", NAME_TAKEN),
)


class EngineUnreachable(BackendError):
    """An engine did not answer; says nothing about its kernels."""


class Refused(BackendError):
    """An engine answered with an error.

    Args:
        status: Of HTTP, such as 404; 0: in the middle of an answer.
        said: The engine's own words.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status
        self.said = said

    def as_failure(
        self, kernel_id: str, doing: str, otherwise: Reason = BAD_OPTION, *, pulling: bool = False
    ) -> LaunchFailed:
        """Return it as a failed start.

        Args:
            kernel_id: The kernel's.
            doing: What the engine was asked, such as ``create the container``.
            otherwise: Reason if the engine's words are not known.
            pulling: It may have talked to a registry.
        """
        text = f"kernel {kernel_id}: the engine did not {doing}: {self.said}"
        return LaunchFailed(text, reason=reason_of(self.said, otherwise, pulling=pulling))


@contextmanager
def launching(kernel_id: str) -> Iterator[None]:
    """Give whatever an engine says, or that it says nothing, a typed reason.

    Args:
        kernel_id: Of the kernel that is to start.
    """
    try:
        yield
    except Refused as error:
        raise error.as_failure(kernel_id, "start it") from None
    except EngineUnreachable as error:
        raise LaunchFailed(f"kernel {kernel_id}: {error}", reason=ENGINE_UNREACHABLE) from None


def reason_of(text: str, otherwise: Reason, *, pulling: bool = False) -> Reason:
    """Return what an engine's words mean.

    Args:
        text: Of its error.
        otherwise: If they are not known.
        pulling: It may have talked to a registry; else "denied" is of a file, and "refused" of a log driver.
    """
    known = _TEXTS if pulling else [one for one in _TEXTS if one[1] not in (PULL_DENIED, REGISTRY_UNREACHABLE)]
    return next((reason for words, reason in known if re.search(words, text, re.IGNORECASE)), otherwise)
