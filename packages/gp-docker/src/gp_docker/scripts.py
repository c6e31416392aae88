"""Kernelspecs whose argv is a script that makes the container itself: what such a script finds in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gp_core import LaunchRequest

from .container import check_image, check_networks, user_of
from .images import Accounts, Image, checked_reference
from .options import ContainerOptions, DockerOptions

USER = "1000:100"  #: where nothing else is said


def for_script(options: ContainerOptions, request: LaunchRequest, *, url: str) -> LaunchRequest:
    """Return a request whose environment tells a submit script the options, as gateway_provisioners does.

    Args:
        options: Of the backend; what users sent themselves does not count.
        request: Of the core.
        url: Of the engine.

    Raises:
        ConfigError: An option cannot work.
        LaunchDenied: The operator does not allow it.
    """
    name = checked_reference(options.image or options.image_name)
    check_image(options, name, request.kernel_id)
    check_networks(options, request.kernel_id)
    user = user_of(options, Image(name, "", name, USER, {}, ()), Accounts(), request)
    told = {
        "KERNEL_IMAGE": name,
        "KERNEL_UID": str(user.uid),
        "KERNEL_GID": str(user.gid),
        "GP_DOCKER_MODE": "swarm",
        "GP_DOCKER_NETWORK": options.networks[0] if options.networks else "bridge",
        "DOCKER_HOST": url,
    }
    if isinstance(options, DockerOptions):
        # removed by us: the engine would do it before anybody has read why a kernel did not start
        told |= {"GP_DOCKER_MODE": "docker", "GP_REMOVE_CONTAINER": "False"}
    hidden = {"REMOVE_CONTAINER", "DOCKER_MODE", "DOCKER_NETWORK"}  # other names of them, which would win
    if not options.mirror_working_dirs:
        hidden.add("KERNEL_WORKING_DIR")

    def changed(variables: Mapping[str, str]) -> dict[str, str]:
        return {**{name: value for name, value in variables.items() if name not in hidden}, **told}

    # the secrets of an old launcher are the whole environment
    return replace(request, env=changed(request.env), secrets=changed(request.secrets))
