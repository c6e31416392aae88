"""`jupyter gp install` and `jupyter gp params`."""

# ruff: noqa: F401, F811  fixtures are imported, and arguments of the same name

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .cli_fixtures import PLAIN, Gp, far, gp, site, stanza, write_spec

pytestmark = pytest.mark.usefixtures("far")

PEER = [
    "python",
    "{resource_dir}/scripts/launch_ipykernel.py",
    "--kernel-id",
    "{kernel_id}",
    "--port-range",
    "{port_range}",
    "--response-address",
    "{response_address}",
    "--public-key",
    "{public_key}",
]
IPYKERNEL = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]


def installed(tmp_path: Path, name: str) -> dict[str, Any]:
    text = (tmp_path / "jupyter_data_dir/kernels" / name / "kernel.json").read_text()
    spec: dict[str, Any] = json.loads(text)
    return spec


def test_the_stanza_is_added_to_a_copy(gp: Gp, tmp_path: Path) -> None:
    source = write_spec(tmp_path, "py")
    before = (source / "kernel.json").read_text()
    data = gp.json("install", "far", "--from", "py", "--set", "remote_hosts=h1, h2", "--set", "cpus=4")
    assert (data["name"], data["provisioner"], data["backend"]) == ("py-far", "far-provisioner", "far")
    spec = installed(tmp_path, "py-far")
    assert spec["metadata"] == {"debugger": True, **stanza("far-provisioner", remote_hosts=["h1", "h2"], cpus=4)}
    assert spec["argv"] == ["python3", *IPYKERNEL]
    assert spec["display_name"] == "Python 3 (far)"
    assert spec["something_new"] == [1]
    assert (Path(data["path"]) / "logo-64x64.png").read_bytes() == b"logo"
    assert (source / "kernel.json").read_text() == before


def test_people_are_told_what_was_changed_and_what_to_do_next(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "py", env={"DATA": str(tmp_path)})
    out = gp("install", "far", "--from", "py", "--name", "Big", "--display-name", "Big one").out
    text = " ".join(out.split())
    assert "Installed big (Big one)" in text
    assert "/opt/env/bin/python becomes python3" in text
    assert "is a path of this machine" in text
    assert "jupyter gp doctor big" in text


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("remote_host=h1", "did you mean remote_hosts?"),
        ("colour=red", "no option 'colour'"),
        ("cpus=many", "cpus"),
        ("launch_timeout=0", "launch_timeout"),
        ("submit=both", "submit"),
        ("novalue", "key=value"),
        ("response_port=1", "belongs to the whole server"),
        ("env_passthrough=HOME", "operator"),
        ("user_source=client", "operator"),
        ("client_parameters={}", "operator"),
        ("port_range=2000..2001", "at least"),
        ("max_kernels_per_user=0", "max_kernels_per_user"),
    ],
)
def test_options_that_cannot_work_are_refused(gp: Gp, tmp_path: Path, setting: str, said: str) -> None:
    write_spec(tmp_path, "py")
    assert said in gp.fails("install", "far", "--from", "py", "--set", setting)
    assert not (tmp_path / "jupyter_data_dir/kernels/py-far").exists()


def test_values_get_the_type_of_their_option(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "py")
    settings = {
        "authorized_users": ("alice,bob", ["alice", "bob"]),
        "prohibited_uids": ("0,1000", ["0", "1000"]),
        "max_kernels_per_user": ("3", 3),
        "launch_timeout": ("90", 90.0),
        "impersonation_enabled": ("true", True),
        "port_range": ("40000..41999", "40000..41999"),
        "remote_hosts": ('["h1"]', ["h1"]),
    }
    gp.json("install", "far", "--from", "py", *(f"--set={key}={text}" for key, (text, _) in settings.items()))
    config = installed(tmp_path, "py-far")["metadata"]["kernel_provisioner"]["config"]
    assert config == {key: value for key, (_, value) in settings.items()}


def test_an_option_of_the_peer_that_does_nothing_is_left_out_with_a_note(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "py")
    data = gp.json("install", "far", "--from", "py", "--set", "poll_interval=1")
    assert data["spec"]["metadata"]["kernel_provisioner"]["config"] == {}
    assert any("poll_interval" in note for note in data["notes"])


@pytest.mark.parametrize(
    ("backend", "python", "before", "after"),
    [
        ("far", None, "/opt/env/bin/python3.11", "python3"),
        ("far", None, "python", "python3"),
        ("far", None, "python3.12", "python3.12"),
        ("far", None, "/usr/lib/R/bin/R", "R"),
        ("far", "/far/python", "/opt/env/bin/python", "/far/python"),
        ("local", None, "/opt/env/bin/python", "/opt/env/bin/python"),
        ("local", None, "python", "python"),
        ("local", "/far/python", "python3", "/far/python"),
    ],
)
def test_the_interpreter_is_one_of_the_far_side(
    gp: Gp, tmp_path: Path, backend: str, python: str | None, before: str, after: str
) -> None:
    write_spec(tmp_path, "k", argv=[before, "x"])
    gp.json("install", backend, "--from", "k", "--name", "made", *(["--python", python] if python else []))
    assert installed(tmp_path, "made")["argv"] == [after, "x"]


def test_python_is_no_answer_for_another_language(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "ir", argv=["R", "--slave"])
    assert "which is no Python" in gp.fails("install", "far", "--from", "ir", "--python", "python3.12")


def test_files_of_the_kernelspec_are_refused_by_name_for_another_machine(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "k", argv=["bash", "{resource_dir}/bin/run.sh", "{connection_file}"])
    assert "bin/run.sh" in gp.fails("install", "far", "--from", "k")
    gp.json("install", "local", "--from", "k")
    assert "{prefix}" in gp.fails("install", "far", "--from", str(write_spec(tmp_path, "p", argv=["{prefix}/bin/k"])))


def test_a_stanza_of_another_provisioner_is_replaced_with_a_note(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "k", argv=["python3"], metadata=stanza("docker-provisioner", image_name="i"))
    data = gp.json("install", "far", "--from", "k")
    assert data["spec"]["metadata"] == stanza("far-provisioner")
    assert any("docker-provisioner" in note for note in data["notes"])


def test_the_config_of_the_same_provisioner_is_kept_for_variants(gp: Gp, tmp_path: Path) -> None:
    write_spec(tmp_path, "k", argv=["python3"], metadata=stanza("far-provisioner", remote_hosts=["h1"], cpus=1))
    data = gp.json("install", "far", "--from", "k", "--name", "large", "--set", "cpus=64")
    assert data["spec"]["metadata"] == stanza("far-provisioner", remote_hosts=["h1"], cpus=64)


class TestPeer:
    """Kernelspecs in the style of gateway_provisioners and Enterprise Gateway."""

    @pytest.mark.parametrize("prefix", ["--", "--RemoteProcessProxy."])
    def test_plain_ipykernel_takes_the_place_of_its_launcher(self, gp: Gp, tmp_path: Path, prefix: str) -> None:
        argv = [part.replace("--", prefix) for part in PEER]
        write_spec(tmp_path, "k", argv=argv, metadata=stanza("distributed-provisioner", remote_hosts=["h"]))
        data = gp.json("install", "far", "--from", "k")
        assert data["spec"]["argv"] == ["python3", *IPYKERNEL]
        assert any("launch_ipykernel.py" in note for note in data["notes"])

    def test_so_it_does_of_its_script_for_containers(self, gp: Gp, tmp_path: Path) -> None:
        argv = [part.replace("launch_ipykernel", "launch_docker") for part in PEER]
        write_spec(tmp_path, "k", argv=argv, language="python", metadata=stanza("docker-provisioner"))
        assert gp.json("install", "far", "--from", "k")["spec"]["argv"] == ["python3", *IPYKERNEL]
        write_spec(tmp_path, "r", argv=argv, language="R", metadata=stanza("docker-provisioner"))
        assert "in a way that is not known" in gp.fails("install", "far", "--from", "r")

    def test_its_kernel_class_is_kept(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k", argv=[*PEER, "--kernel-class-name", "my.Kernel"])
        argv = gp.json("install", "far", "--from", "k")["spec"]["argv"]
        assert argv == ["python3", *IPYKERNEL, "--IPKernelApp.kernel_class=my.Kernel"]

    @pytest.mark.parametrize(
        "argv",
        [
            [*PEER, "--spark-context-initialization-mode", "lazy"],
            [*PEER, "--something-else", "1"],
            ["bash", "{resource_dir}/bin/run.sh", *PEER[2:]],
            ["python", "{resource_dir}/scripts/launch_kubernetes.py", *PEER[2:]],
        ],
        ids=["spark", "unknown option", "script", "pod"],
    )
    def test_what_is_not_recognised_is_refused_with_a_way_out(self, gp: Gp, tmp_path: Path, argv: list[str]) -> None:
        write_spec(tmp_path, "k", argv=argv)
        assert "take another kernelspec" in gp.fails("install", "far", "--from", "k")

    def test_the_operator_may_keep_the_old_launcher(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k", argv=PEER)
        data = gp.json("install", "far", "--from", "k", "--set", "launcher_protocol=1")
        assert data["spec"]["argv"] == PEER

    def test_our_launcher_in_argv_is_left_as_it_is(self, gp: Gp, tmp_path: Path) -> None:
        argv = ["spark-submit", "gp-launcher.pyz", "--response-address={response_address}"]
        write_spec(tmp_path, "k", argv=argv)
        assert gp.json("install", "far", "--from", "k")["spec"]["argv"] == argv


class TestSource:
    """What is named, and what is not there."""

    def test_a_folder_may_be_named(self, gp: Gp, tmp_path: Path) -> None:
        folder = tmp_path / "elsewhere/mine"
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(PLAIN))
        assert gp.json("install", "far", "--from", str(folder))["name"] == "mine-far"

    def test_one_whose_provisioner_is_not_installed_may_be_named(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k", metadata=stanza("kubernetes-provisioner"))
        gp.json("install", "far", "--from", "k")

    def test_that_of_ipykernel_may_be_named(self, gp: Gp) -> None:
        assert gp.json("install", "far", "--from", "python3")["spec"]["language"] == "python"

    @pytest.mark.parametrize("content", ["{", "[]", '{"display_name": "x"}', '{"argv": []}'])
    def test_a_broken_one_is_named(self, gp: Gp, tmp_path: Path, content: str) -> None:
        write_spec(tmp_path, "k", content)
        assert "k/kernel.json" in gp.fails("install", "far", "--from", "k")

    def test_unknown_names_get_the_nearest(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "mypython")
        assert "did you mean mypython?" in gp.fails("install", "far", "--from", "mypthon")
        assert "did you mean far?" in gp.fails("install", "fra", "--from", "mypython")

    def test_a_backend_with_two_provisioners_must_be_named_by_one(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        said = gp.fails("install", "twin", "--from", "k")
        assert "twin-one-provisioner or twin-two-provisioner" in said
        assert gp.json("install", "twin-two-provisioner", "--from", "k")["provisioner"] == "twin-two-provisioner"

    def test_nothing_named_gets_the_choice(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "one")
        said = gp.fails("install", "local")
        assert "one" in said
        assert "--template" in said

    def test_a_template_is_filled_in(self, gp: Gp) -> None:
        data = gp.json("install", "local", "--template", "python", "--set", "launch_timeout=5")
        assert data["spec"]["metadata"] == stanza("gp-local-provisioner", launch_timeout=5.0)
        assert "there are: python" in gp.fails("install", "local", "--template", "zebra")


class TestPlace:
    """Where it goes."""

    def test_an_existing_one_goes_only_when_told(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        assert "--replace" in gp.fails("install", "far", "--from", "k", "--name", "k")
        gp.json("install", "far", "--from", "k", "--name", "k", "--replace")
        assert installed(tmp_path, "k")["metadata"]["kernel_provisioner"]["provisioner_name"] == "far-provisioner"
        assert (tmp_path / "jupyter_data_dir/kernels/k/logo-64x64.png").exists()

    def test_prefix_and_a_note_when_jupyter_does_not_look_there(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        data = gp.json("install", "far", "--from", "k", "--prefix", str(tmp_path / "opt"))
        assert Path(data["path"]) == tmp_path / "opt/share/jupyter/kernels/k-far"
        assert any("JUPYTER_PATH" in note for note in data["notes"])
        ran = gp("install", "far", "--from", "k", "--prefix", str(tmp_path / "opt"), "--replace")
        assert ran.err == ""
        assert f"doctor {data['path']}" in " ".join(ran.out.split())

    def test_sys_prefix(self, gp: Gp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_spec(tmp_path, "k")
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
        path = gp.json("install", "far", "--from", "k", "--sys-prefix")["path"]
        assert path == str(tmp_path / "env/share/jupyter/kernels/k-far")

    def test_a_place_that_cannot_be_written_is_one_line(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        (tmp_path / "file").write_text("")
        assert "cannot be written" in gp.fails("install", "far", "--from", "k", "--prefix", str(tmp_path / "file"))

    def test_a_name_must_be_one(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        assert "letters" in gp.fails("install", "far", "--from", "k", "--name", "../k")


SCHEMA = {
    "type": "object",
    "properties": {
        "cpus": {"type": "integer", "minimum": 1, "maximum": 8, "default": 2, "description": "Processors."},
        "queue": {"type": "string", "enum": ["short", "long"]},
    },
}


class TestParameters:
    """What clients may choose."""

    def test_are_put_into_the_kernelspec_and_shown(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        file = tmp_path / "schema.json"
        file.write_text(json.dumps(SCHEMA))
        gp.json("install", "far", "--from", "k", "--parameters", str(file))
        assert installed(tmp_path, "k-far")["metadata"]["parameters"] == SCHEMA
        cpus, queue, timeout = gp.json("params", "k-far")["parameters"]
        assert cpus == {
            "name": "cpus",
            "variable": "KERNEL_CPUS",
            "kind": "int",
            "rule": "a whole number, at least 1, at most 8",
            "default": 2,
            "minimum": 1,
            "maximum": 8,
            "pattern": None,
            "title": "",
            "choices": [],
            "description": "Processors.",
            "opened_by": "kernelspec",
        }
        assert queue["choices"] == ["short", "long"]
        assert (timeout["variable"], timeout["maximum"]) == ("KERNEL_LAUNCH_TIMEOUT", 600)
        out = gp("params", "k-far").out
        assert "KERNEL_QUEUE" in out
        assert max(map(len, out.splitlines())) <= 80

    @pytest.mark.parametrize("content", ["{", "[]", '{"type": "object", "properties": {"a": {"type": "array"}}}'])
    def test_that_cannot_be_used_are_refused(self, gp: Gp, tmp_path: Path, content: str) -> None:
        write_spec(tmp_path, "k")
        file = tmp_path / "schema.json"
        file.write_text(content)
        gp.fails("install", "far", "--from", "k", "--parameters", str(file))
        gp.fails("install", "far", "--from", "k", "--parameters", str(tmp_path / "missing"))

    def test_of_the_operator_are_shown_as_such(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k", metadata=stanza("far-provisioner"))
        file = tmp_path / "operator.py"
        file.write_text("c.ProvisionerOptions.client_parameters = {'cpus': {'type': 'integer', 'maximum': 2}}\n")
        cpus, _ = gp.json("params", "k", "--config", str(file))["parameters"]
        assert (cpus["opened_by"], cpus["maximum"]) == ("operator", 2)

    def test_a_local_kernel_has_none(self, gp: Gp, tmp_path: Path) -> None:
        write_spec(tmp_path, "k")
        assert "nothing can be chosen" in gp.fails("params", "k")
