"""Isolated loading of plugins, and one typed method per hook; nothing else touches the plugin manager."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from ._markers import PROJECT
from .errors import REFUSED_BY_HOOK, LaunchDenied, LaunchFailed, PluginError

if TYPE_CHECKING:
    from .backend import Backend, Handle, KernelInfo, LaunchRequest, Status
    from .balancing import Host
    from .events import KernelEvent
    from .install import SpecTemplate
    from .startup import Verdict

log = logging.getLogger(__name__)
BUILTIN = ("balancing", "policies", "local", "install")


@dataclass(frozen=True)
class Problem:
    """A plugin that is not used, and why."""

    plugin: str
    reason: str


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class Plugins:
    """The plugins of this process.

    Args:
        disabled: Names of entry points to leave out.
    """

    def __init__(self, disabled: Iterable[str] = ()) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._disabled = frozenset(disabled)
        self.problems: list[Problem] = []
        self.owners: dict[str, str] = {}  #: backend name -> "package version" that offers it
        self.backends: dict[str, type[Backend]] = {}

    # -- loading

    def register(self, plugin: object, name: str, owner: str = "") -> None:
        """Add one plugin, whole or not at all.

        Raises:
            PluginError: Unknown hook, an async ``firstresult`` hook, or a backend name that is taken.
        """
        if self._manager.register(plugin, name) is None:
            raise PluginError(f"plugin {name!r} is blocked")
        try:
            self._check(plugin, name)
            self._offer(plugin, owner or name)
        except Exception:
            self._manager.unregister(plugin)
            raise

    def _check(self, plugin: object, name: str) -> None:
        try:
            self._manager.check_pending()  # a misspelt hook registers silently otherwise
        except pluggy.PluginValidationError as error:
            raise PluginError(str(error)) from None
        for caller in self._manager.get_hookcallers(plugin) or ():
            for impl in caller.get_hookimpls():
                first = caller.spec is not None and caller.spec.opts["firstresult"]
                if impl.plugin is plugin and first and inspect.iscoroutinefunction(impl.function):
                    # a coroutine is "not None": it would win over the plugin that really has an answer
                    raise PluginError(f"{name}: {caller.name} must not be async")

    def _offer(self, plugin: object, owner: str) -> None:
        function: Callable[[], Iterable[type[Backend]]] | None = getattr(plugin, "gp_backends", None)
        if function is None or self._manager.parse_hookimpl_opts(plugin, "gp_backends") is None:
            return
        offered = {backend.name: backend for backend in function()}
        for name in offered:
            if name in self.backends:
                raise PluginError(f"backend {name!r} is offered by {self.owners[name]} and by {owner}")
        self.backends |= offered
        self.owners |= dict.fromkeys(offered, owner)

    def load(self) -> None:
        """Load the built-in plugins and every installed one; a broken one is noted in ``problems``."""
        for module in BUILTIN:
            self.register(
                __import__(f"{PROJECT}.{module}", fromlist=[module]), f"gp-core-{module}", _owner_of("gp-core")
            )
        for entry in entry_points(group=PROJECT):
            if entry.name in self._disabled:
                self.problems.append(Problem(entry.name, "disabled by GP_DISABLED_PLUGINS"))
                continue
            try:
                self.register(_loaded(entry), entry.name, _owner(entry))
            except Exception as error:
                reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
                self.problems.append(Problem(entry.name, reason))
                log.warning("plugin %s (%s) is not used: %s", entry.name, entry.value, reason)

    def backend(self, name: str) -> type[Backend]:
        """Return a backend's class.

        Raises:
            PluginError: No such backend; the text names those that exist and the plugins that failed to load.
        """
        if name in self.backends:
            return self.backends[name]
        failed = "".join(f"\n  plugin {problem.plugin} is not used: {problem.reason}" for problem in self.problems)
        raise PluginError(f"no backend {name!r}; installed: {', '.join(sorted(self.backends)) or 'none'}{failed}")

    # -- one method per hook

    async def before_launch(self, request: LaunchRequest) -> dict[str, str]:
        """Ask every plugin about a launch; returns additions to the environment, later plugins win.

        Raises:
            LaunchDenied: A plugin refused.
            LaunchFailed: A plugin failed; a policy that cannot be asked forbids.
        """
        additions: dict[str, str] = {}
        for name, result in await self._each("gp_before_launch", request=request):
            if isinstance(result, LaunchDenied):
                raise result
            if isinstance(result, Exception):
                text = f"plugin {name} failed before the launch of kernel {request.kernel_id}: {result}"
                raise LaunchFailed(text, reason=REFUSED_BY_HOOK) from result
            additions |= result or {}
        return additions

    def select_host(self, algorithm: str, hosts: Sequence[Host], kernel: KernelInfo) -> str:
        """Choose one of ``hosts`` for a kernel."""
        chosen = self._manager.hook.gp_select_host(algorithm=algorithm, hosts=hosts, kernel=kernel)
        if chosen not in {host.name for host in hosts}:
            raise PluginError(f"load balancing {algorithm!r} chose {chosen!r}, which is not one of the hosts")
        return str(chosen)

    def timeout(self, kernel: KernelInfo, phase: str, default: float) -> float:
        """Seconds allowed for a phase of a kernel's life."""
        try:
            seconds = self._manager.hook.gp_timeout(kernel=kernel, phase=phase)
            return default if seconds is None else float(seconds)
        except Exception as error:
            text = f"kernel {kernel.kernel_id}: a plugin failed to say how long {phase!r} may take"
            raise PluginError(f"{text}: {type(error).__name__}: {error}") from error

    def confirm_startup(self, kernel: KernelInfo, status: Status, elapsed: float) -> Verdict:
        """Judge one look at a starting kernel."""
        verdict: Verdict = self._manager.hook.gp_confirm_startup(kernel=kernel, status=status, elapsed=elapsed)
        return verdict

    async def discover(self, backend: Backend, kernel_id: str | None) -> list[Handle]:
        """Find kernels that exist out there; a plugin that fails is logged."""
        found: list[Handle] = []
        for name, result in await self._each("gp_discover", backend=backend, kernel_id=kernel_id):
            if isinstance(result, Exception):
                log.warning("plugin %s could not discover kernels of %s: %s", name, backend.name, result)
            else:
                found += [handle for handle in result or () if handle not in found]
        return found

    def hear_events(self) -> bool:
        """Whether any plugin listens to events."""
        return bool(self._manager.hook.gp_kernel_event.get_hookimpls())

    async def kernel_event(self, kernel: KernelInfo, event: KernelEvent) -> None:
        """Tell every plugin of an event; one that fails is logged."""
        for name, result in await self._each("gp_kernel_event", kernel=kernel, event=event):
            if isinstance(result, Exception):
                log.error("plugin %s failed on event %s: %s", name, event.event.value, result)

    def spec_templates(self) -> list[SpecTemplate]:
        """Kernelspec templates of all plugins."""
        return [template for offered in self._manager.hook.gp_spec_templates() for template in offered]

    async def _each(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        # not one call of the hook: pluggy stops a list hook at the first implementation that raises
        results: list[tuple[str, Any]] = []
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                value: Awaitable[Any] | Any = impl.function(*(arguments[name] for name in impl.argnames))
                results.append((impl.plugin_name, await _settled(value)))
            except Exception as error:
                results.append((impl.plugin_name, error))
        return results


def _owner_of(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _loaded(entry: EntryPoint) -> object:
    try:
        plugin: object = entry.load()
        return plugin
    except Exception as error:
        raise PluginError(f"{entry.value} cannot be imported: {type(error).__name__}: {error}") from error


_lock = threading.RLock()  # a cache alone lets several threads load at the same time


@functools.cache
def _loaded_once() -> Plugins:
    loaded = Plugins(name.strip() for name in os.environ.get("GP_DISABLED_PLUGINS", "").split(","))
    loaded.load()
    return loaded


def plugins() -> Plugins:
    """Return the plugins of this process, loaded at first use."""
    with _lock:
        return _loaded_once()


plugins.cache_clear = _loaded_once.cache_clear  # type: ignore[attr-defined]  # for tests
