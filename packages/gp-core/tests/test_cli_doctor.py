"""`jupyter gp doctor`: what it finds, and that it says what to do."""

# ruff: noqa: F401, F811  fixtures are imported, and arguments of the same name

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gp_core import plugins
from gp_core.cli import doctor
from gp_core.store import FileStore

from .cli_fixtures import PLAIN, Gp, distribution, far, gp, site, stanza, write_spec
from .test_install import PEER, SCHEMA

Finding = dict[str, Any]


def examine(gp: Gp, *argv: str) -> list[Finding]:
    """All findings; the exit code must fit them, and whatever is not right must come with advice."""
    ran = gp("doctor", "--json", *argv)
    findings: list[Finding] = ran.data["findings"]
    assert ran.data["ok"] == all(finding["ok"] for finding in findings)
    assert ran.code == (0 if ran.data["ok"] else 1)
    for finding in findings:
        assert bool(finding["advice"]) != finding["ok"], finding
    return findings


def wrong(gp: Gp, *argv: str) -> Finding:
    """The one finding that is not right."""
    bad = [finding for finding in examine(gp, *argv) if not finding["ok"]]
    assert len(bad) == 1, bad
    return bad[0]


def about(findings: list[Finding], subject: str) -> str:
    return " ".join(finding["text"] for finding in findings if finding["subject"].startswith(subject))


@pytest.fixture(autouse=True)
def no_kernelspecs_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only = tmp_path / "jupyter_data_dir/kernels"
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_path", lambda *names: [str(only)])


def test_a_healthy_installation(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "k", metadata=stanza("gp-local-provisioner"))
    findings = examine(gp)
    assert [finding for finding in findings if not finding["ok"]] == []
    assert "local (gp-core" in about(findings, "backends")
    assert "1 of them started by a backend of gp" in about(findings, "kernelspecs")
    out = gp("doctor").out
    assert "Everything is fine." in out
    assert max(map(len, out.splitlines())) <= 80


def test_people_see_what_is_wrong_beside_their_prompt_and_what_to_do(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "k", metadata=stanza("docker-provisioner"))
    ran = gp("doctor")
    assert ran.code == 1
    *_, found, advice, _, summary = ran.out.splitlines()
    assert found.startswith("BAD  kernelspec k")
    assert "-> pip install gp-docker" in advice
    assert "1 of" in summary


class TestInstalled:
    """Plugins and provisioners."""

    def test_a_broken_plugin(self, gp: Gp, site: Path) -> None:
        distribution(site, "gp-broken", "[gp_core]\nbroken = gp_broken\n")
        plugins.plugins.cache_clear()
        assert wrong(gp)["subject"] == "plugin broken"

    def test_a_disabled_plugin_is_fine(self, gp: Gp, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GP_DISABLED_PLUGINS", "far")
        plugins.plugins.cache_clear()
        assert "GP_DISABLED_PLUGINS" in about(examine(gp), "plugin far")

    def test_two_packages_with_the_same_provisioner(self, gp: Gp, far: Path, site: Path) -> None:
        points = "[jupyter_client.kernel_provisioners]\nfar-provisioner = gateway_provisioners.far:Far\n"
        distribution(site, "gateway_provisioners", points, "0.5.0")
        finding = wrong(gp)
        assert finding["subject"] == "provisioner far-provisioner"
        assert "gp-far" in finding["text"]
        assert finding["advice"] == "pip uninstall gateway-provisioners"

    @pytest.mark.parametrize(
        ("provisioner", "advice"),
        [
            ("distributed-provisioner", "pip install gp-ssh"),
            ("docker-swarm-provisioner", "pip install gp-docker"),
            ("kubernetes-provisioner", "pip install gp-k8s"),
            ("spark-operator-provisioner", "pip install gp-k8s"),
            ("yarn-provisioner", "pip install gp-yarn"),
            ("somebody-elses", "remove the stanza"),
        ],
    )
    def test_a_provisioner_that_is_missing(self, gp: Gp, tmp_path: Path, provisioner: str, advice: str) -> None:
        write_spec(tmp_path, "k", metadata=stanza(provisioner))
        assert advice in wrong(gp, "k")["advice"]

    def test_the_peers_provisioner_under_a_name_of_ours(self, gp: Gp, site: Path, tmp_path: Path) -> None:
        (site / "gateway_provisioners.py").write_text("class Yarn: pass\n")
        points = "[jupyter_client.kernel_provisioners]\nyarn-provisioner = gateway_provisioners:Yarn\n"
        distribution(site, "gateway_provisioners", points)
        write_spec(tmp_path, "k", metadata=stanza("yarn-provisioner"))
        finding = wrong(gp, "k")
        assert "comes from gateway_provisioners" in finding["text"]
        assert "gp-yarn" in finding["advice"]


class TestKernelspec:
    """One kernelspec in detail."""

    def test_a_good_one(self, gp: Gp, tmp_path: Path, far: Path) -> None:
        metadata = {**stanza("far-provisioner", cpus=2, poll_interval=1), "parameters": SCHEMA}
        write_spec(tmp_path, "k", argv=["python3"], metadata=metadata)
        text = about(examine(gp, "k"), "kernelspec k")
        for seen in ("cpus=2", "poll_interval has no effect", "KERNEL_CPUS", "KERNEL_QUEUE"):
            assert seen in text

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"metadata": stanza("far-provisioner", remote_host=[])}, "did you mean remote_hosts?"),
            ({"metadata": stanza("far-provisioner", cpus="x")}, "cpus"),
            ({"metadata": {**stanza("far-provisioner"), "parameters": {"type": "array"}}}, "parameters"),
            ({"metadata": stanza("far-provisioner"), "argv": PEER}, "older kind"),
            ({"metadata": stanza("far-provisioner", launcher_protocol=1), "argv": PEER}, "protocol 1"),
            ({"metadata": stanza("far-provisioner"), "argv": ["{resource_dir}/run.sh"]}, "{resource_dir}"),
            ({"metadata": {}, "argv": PEER}, "no provisioner is named"),
        ],
    )
    @pytest.mark.usefixtures("far")
    def test_a_bad_one(self, gp: Gp, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
        write_spec(tmp_path, "k", **changes)
        assert said in wrong(gp, "k")["text"]
        assert said in wrong(gp)["text"]

    def test_an_old_launcher_is_answered_with_the_command_that_helps(self, gp: Gp, tmp_path: Path, far: Path) -> None:
        write_spec(tmp_path, "k", argv=PEER, metadata=stanza("far-provisioner"))
        command = wrong(gp, "k")["advice"]
        assert command.startswith("jupyter gp install far-provisioner --from k")
        gp.json(*command.split()[2:], "--name", "new")
        assert [finding for finding in examine(gp, "new") if not finding["ok"]] == []

    def test_protocol_1_where_it_is_allowed(
        self, gp: Gp, tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GP_ALLOW_PROTOCOL_1", "true")
        write_spec(tmp_path, "k", argv=PEER, metadata=stanza("far-provisioner", launcher_protocol=1))
        assert all(finding["ok"] for finding in examine(gp, "k"))

    def test_its_backend_is_checked_with_its_options(self, gp: Gp, tmp_path: Path, far: Path) -> None:
        write_spec(tmp_path, "k", metadata=stanza("far-provisioner", remote_hosts=["up", "down"]))
        assert wrong(gp, "k")["subject"] == "host down"
        assert all(finding["ok"] for finding in examine(gp))

    @pytest.mark.parametrize("name", ["far", "far-provisioner"])
    def test_a_backend_is_checked_with_all_its_kernelspecs(self, gp: Gp, tmp_path: Path, far: Path, name: str) -> None:
        alone = gp.json("doctor", name)["findings"]
        assert [one["subject"] for one in alone if one["subject"].startswith("host")] == ["host localhost"]
        write_spec(tmp_path, "one", metadata=stanza("far-provisioner", remote_hosts=["h1", "h2"]))
        write_spec(tmp_path, "two", metadata=stanza("far-provisioner", remote_hosts=["h2", "h3"]))
        write_spec(tmp_path, "other", metadata=stanza("twin-one-provisioner", remote_hosts=["h4"]))
        subjects = [one["subject"] for one in gp.json("doctor", name)["findings"]]
        assert [one for one in subjects if one.startswith("host")] == ["host h1", "host h2", "host h3"]

    def test_one_that_starts_locally(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        assert "without gp" in about(examine(gp, "k"), "kernelspec k")

    def test_one_that_is_not_there(self, gp: Gp) -> None:
        assert "no kernelspec" in gp.fails("doctor", "nope")

    @pytest.mark.parametrize(
        "changes",
        [
            {"argv": ["python", 3]},
            {"metadata": ["x"]},
            {"metadata": {"kernel_provisioner": "local"}},
            {"metadata": {"kernel_provisioner": {"provisioner_name": 1}}},
            {"metadata": {"kernel_provisioner": {"provisioner_name": "gp-local-provisioner", "config": "x"}}},
            {"env": ["A=1"]},
        ],
        ids=str,
    )
    def test_one_whose_parts_are_of_the_wrong_kind(self, gp: Gp, tmp_path: Path, changes: dict[str, Any]) -> None:
        write_spec(tmp_path, "odd", **changes)
        assert "is no kernelspec" in wrong(gp)["text"]
        assert gp("doctor", "odd").code == 1
        assert gp("install", "local", "--from", "odd").code == 1

    def test_one_that_cannot_be_read_does_not_hide_the_others(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "a", "{")
        write_spec(tmp_path, "b")
        assert wrong(gp)["subject"] == "kernelspec a"
        assert "2 found" in about(examine(gp), "kernelspecs")  # b, and ipykernel's own


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


class TestProcess:
    """User, listener, folder."""

    def test_the_callback_address_of_local_launchers_is_tried(self, gp: Gp) -> None:
        assert "can be connected to" in about(examine(gp), "callback 127.0.0.1:")

    def test_addresses_for_launchers_elsewhere(self, gp: Gp, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GP_RESPONSE_IP", "127.0.0.1,127.0.0.2")
        monkeypatch.setenv("GP_BIND_IP", "127.0.0.1")
        bad = [finding for finding in examine(gp) if not finding["ok"]]
        assert [finding["subject"].split(":")[0] for finding in bad] == ["callback 127.0.0.2", "callback"]
        assert "cannot be connected to" in bad[0]["text"]
        assert "GP_RESPONSE_IP" in bad[1]["advice"]

    def test_a_port_that_is_taken(self, gp: Gp, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GP_RESPONSE_PORT", str(taken))
        assert f"{taken} is taken" in about(examine(gp), "listener")
        monkeypatch.setenv("GP_RESPONSE_PORT_RETRIES", "0")
        finding = wrong(gp)
        assert finding["subject"] == "listener"
        assert "GP_RESPONSE_PORT" in finding["advice"]

    def test_a_user_who_may_not(self, gp: Gp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GP_AUTHORIZED_USERS", "somebody-else")
        assert wrong(gp)["subject"] == "user"

    def test_a_variable_without_effect(self, gp: Gp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GP_POLL_INTERVAL", "0.5")
        assert about(examine(gp), "environment").startswith("GP_POLL_INTERVAL has no effect")

    def test_a_folder_that_others_may_read(self, gp: Gp, installation: Path) -> None:
        installation.mkdir(mode=0o755)
        finding = wrong(gp)
        assert finding["advice"] == f"chmod 700 {installation}"
        installation.chmod(0o700)
        for name in ("server.pem", "seal.key"):
            (installation / name).write_text("key")
            (installation / name).chmod(0o644)
            assert wrong(gp)["advice"] == f"chmod 600 {installation / name}"
            (installation / name).unlink()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
    def test_a_folder_of_somebody_else(self, gp: Gp, installation: Path) -> None:
        installation.mkdir(mode=0o700)
        os.chown(installation, 12345, -1)
        assert "belongs to user 12345" in wrong(gp)["text"]

    def test_strange_files_among_the_records(self, gp: Gp, installation: Path) -> None:
        installation.mkdir(mode=0o700)
        store = FileStore(installation / "kernels")
        store.folder.mkdir(mode=0o700)
        (store.folder / "x.json").write_text("{")
        assert wrong(gp)["subject"] == "records"


class TestBackends:
    """Each backend's own check."""

    @pytest.mark.parametrize(
        ("hosts", "said"), [("crash", "unforeseen"), ("hang", "did not end"), ("down", "looked at")]
    )
    def test_that_fails(
        self, gp: Gp, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: str, said: str
    ) -> None:
        monkeypatch.setattr(doctor, "DEADLINE", 0.2)
        write_spec(tmp_path, "k", {**PLAIN, "metadata": stanza("far-provisioner", remote_hosts=[hosts])})
        assert said in wrong(gp, "k")["text"]
