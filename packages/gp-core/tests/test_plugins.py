import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from gp_core import plugins as plugins_module
from gp_core._markers import hookimpl
from gp_core.backend import Backend, Handle, KernelInfo, LaunchRequest, State, Status
from gp_core.balancing import Host
from gp_core.errors import LaunchDenied, LaunchFailed, PluginError
from gp_core.events import Event, KernelEvent
from gp_core.plugins import Plugins
from gp_core.startup import FAIL, WAIT, Verdict

KERNEL = KernelInfo(kernel_id="k1", kernel_name="python3", user="ann", backend="fake")
REQUEST = LaunchRequest(kernel_id="k1", kernel_name="python3", user="ann", backend="fake", argv=["x"])


class FakeBackend(Backend):
    name = "fake"

    async def status(self, handle: Handle) -> Status:
        return Status(state=State.GONE)

    async def terminate(self, handle: Handle, *, force: bool) -> None: ...

    async def discover(self, kernel_id: str | None = None) -> list[Handle]:
        return [{"kernel_id": "k1"}]


def plugin(**functions: object) -> types.SimpleNamespace:
    """A plugin whose hooks are the given functions."""
    return types.SimpleNamespace(**{name: hookimpl(function) for name, function in functions.items()})  # type: ignore[call-overload]


@pytest.fixture
def loaded() -> Plugins:
    made = Plugins()
    made.load()
    return made


def installed(monkeypatch: pytest.MonkeyPatch, **found: object) -> None:
    """Make entry points that load the given objects, or raise the given errors."""

    class Entry(EntryPoint):
        def load(self) -> object:
            value = found[self.name]
            if isinstance(value, Exception):
                raise value
            return value

    entries = [Entry(name, f"{name}.module", "gp_core") for name in found]
    monkeypatch.setattr(plugins_module, "entry_points", lambda group: entries)


def test_the_embedded_backend_is_always_there(loaded: Plugins) -> None:
    assert "local" in loaded.backends
    assert loaded.owners["local"].startswith("gp-core")


def test_a_broken_plugin_is_reported_by_name_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def asynchronous(kernel: object, phase: str) -> float:
        return 1.0

    def nothing() -> list[type[Backend]]:
        return []

    installed(
        monkeypatch,
        missing=ModuleNotFoundError("No module named 'kubernetes'"),
        crashing=ZeroDivisionError("at import"),
        misspelt=plugin(gp_backend=nothing),
        asynchronous=plugin(gp_timeout=asynchronous),
        first=plugin(gp_backends=lambda: [FakeBackend]),
        second=plugin(gp_backends=lambda: [FakeBackend]),
        failing=plugin(gp_backends=lambda: 1 / 0),
        disabled=plugin(gp_backends=nothing),
    )
    loaded = Plugins(disabled=["disabled"])
    loaded.load()
    reasons = {problem.plugin: problem.reason for problem in loaded.problems}
    assert "No module named 'kubernetes'" in reasons.pop("missing")
    assert "ZeroDivisionError" in reasons.pop("crashing")
    assert "unknown hook 'gp_backend'" in reasons.pop("misspelt")
    assert "gp_timeout must not be async" in reasons.pop("asynchronous")
    assert reasons.pop("second") == "backend 'fake' is offered by first.module and by second.module"
    assert "division by zero" in reasons.pop("failing")
    assert "GP_DISABLED_PLUGINS" in reasons.pop("disabled")
    assert reasons == {}
    assert loaded.backend("fake") is FakeBackend
    assert loaded.timeout(KERNEL, "launch", 5.0) == 5.0  # the refused plugin is really gone


def test_an_unknown_backend_says_what_is_there_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, k8s=ModuleNotFoundError("No module named 'kubernetes'"))
    loaded = Plugins()
    loaded.load()
    with pytest.raises(
        PluginError, match=r"(?s)no backend 'kubernetes'; installed: local.*plugin k8s is not used.*No module"
    ):
        loaded.backend("kubernetes")


async def test_before_launch_collects_additions_of_sync_and_async_plugins(loaded: Plugins) -> None:
    async def later(request: LaunchRequest) -> dict[str, str]:
        return {"B": request.user}

    loaded.register(plugin(gp_before_launch=lambda request: {"A": "1"}), "one")
    loaded.register(plugin(gp_before_launch=later), "two")
    loaded.register(plugin(gp_before_launch=lambda: None), "three")
    assert await loaded.before_launch(REQUEST) == {"A": "1", "B": "ann"}


async def test_before_launch_can_deny_and_a_policy_that_fails_forbids(loaded: Plugins) -> None:
    def deny(request: LaunchRequest) -> None:
        raise LaunchDenied("Pete has used up his allotment")

    loaded.register(plugin(gp_before_launch=deny), "quota")
    with pytest.raises(LaunchDenied, match="allotment"):
        await loaded.before_launch(REQUEST)

    other = Plugins()
    other.register(plugin(gp_before_launch=lambda request: 1 / 0), "buggy")
    with pytest.raises(LaunchFailed, match="plugin buggy failed"):
        await other.before_launch(REQUEST)


def test_select_host(loaded: Plugins) -> None:
    hosts = [Host(name="a", kernels=3), Host(name="b")]
    assert loaded.select_host("least-connection", hosts, KERNEL) == "b"
    loaded.register(plugin(gp_select_host=lambda hosts: hosts[0].name), "mine")
    assert loaded.select_host("least-connection", hosts, KERNEL) == "a"
    loaded.register(plugin(gp_select_host=lambda hosts: "elsewhere"), "wrong")
    with pytest.raises(PluginError, match="'elsewhere', which is not one of the hosts"):
        loaded.select_host("random", hosts, KERNEL)


def test_timeout_and_confirm_startup_ask_plugins_first(loaded: Plugins) -> None:
    def patient(kernel: KernelInfo, status: Status, elapsed: float) -> Verdict | None:
        return WAIT if status.detail == "autoscaling" else None

    gone = Status(state=State.GONE, detail="gone")
    loaded.register(plugin(gp_timeout=lambda kernel, phase: 99 if phase == "launch" else None), "slow")
    loaded.register(plugin(gp_confirm_startup=patient), "patient")
    assert loaded.timeout(KERNEL, "launch", 5) == 99
    assert loaded.timeout(KERNEL, "shutdown", 5) == 5
    assert loaded.confirm_startup(KERNEL, Status(state=State.GONE, detail="autoscaling"), 1.0) is WAIT
    assert loaded.confirm_startup(KERNEL, gone, 1.0) == FAIL(loaded.confirm_startup(KERNEL, gone, 0).reason, "gone")


async def test_discover_asks_the_backend_and_plugins(loaded: Plugins) -> None:
    loaded.register(plugin(gp_discover=lambda backend, kernel_id: [{"kernel_id": "k2"}, {"kernel_id": "k1"}]), "more")
    loaded.register(plugin(gp_discover=lambda backend: 1 / 0), "failing")
    found = await loaded.discover(FakeBackend(), None)
    assert sorted(handle["kernel_id"] for handle in found) == ["k1", "k2"]


async def test_events_reach_everybody_whatever_one_does(loaded: Plugins, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []

    async def hear(kernel: KernelInfo, event: KernelEvent) -> None:
        heard.append(event.event)

    assert not loaded.hear_events()
    loaded.register(plugin(gp_kernel_event=hear), "one")
    assert loaded.hear_events()
    loaded.register(plugin(gp_kernel_event=lambda event: 1 / 0), "broken")
    await loaded.kernel_event(KERNEL, KernelEvent(event=Event.LISTENING))
    assert heard == [Event.LISTENING]
    assert "plugin broken failed on event listening" in caplog.text


def test_spec_templates(loaded: Plugins) -> None:
    assert "python" in [template.name for template in loaded.spec_templates()]


def test_loading_is_lazy_and_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def entries(group: str) -> Iterator[EntryPoint]:
        loads.append(group)
        return iter(())

    monkeypatch.setattr(plugins_module, "entry_points", entries)
    plugins_module.plugins()
    plugins_module.plugins()
    assert loads == ["gp_core"]
