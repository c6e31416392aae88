"""Docker engines, their registries and Swarms."""

from clusters.docker.engine import IMAGE, Engine, Swarm, hides_ports, offered
from clusters.docker.registry import LOGIN, Registry

__all__ = ["IMAGE", "LOGIN", "Engine", "Registry", "Swarm", "hides_ports", "offered"]
