"""Secrets, environment, argv, JSON and the command's ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launcher_kit import SOURCES, TOKEN

from gp_launchers import log as log_module
from gp_launchers.command import kernel_argv, kernel_environment, kernel_folder
from gp_launchers.options import parse
from gp_launchers.quickjson import dump_flat, loads
from gp_launchers.secrets_input import SecretsError, read_secrets

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
OPTIONS = ["--kernel-id", "k1", "--response-address", "gw:8877", "--public-key", "ab" * 32]


@settings(max_examples=50)
@given(JSON)
def test_quick_json_reads_what_json_writes(value):
    assert loads(json.dumps(value)) == value
    assert loads(" \n" + json.dumps(value, indent=2, ensure_ascii=False) + "\t") == value


@given(st.text())
def test_quick_json_agrees_with_json_on_any_text(text):
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011
            loads(text)
    else:
        assert repr(loads(text)) == repr(expected)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_flat_json_is_json(values):
    assert json.loads(dump_flat(values)) == values


def test_environment_is_substituted_with_values_of_the_far_side():
    far = {"PATH": "/bin", "HOME": "/home/far", "JPY_PARENT_PID": "77"}
    additions = {
        "PATH": "/opt/bin:${PATH}",
        "DATA": "${HOME}/data",
        "PLAIN": "x",
        "BOTH": "$PLAIN-${DATA}-${NOWHERE}-$$",
    }
    env = kernel_environment(far, additions, "k1")
    assert env["PATH"] == "/opt/bin:/bin"
    assert env["DATA"] == "/home/far/data"
    assert env["BOTH"] == "x-${DATA}-${NOWHERE}-$"
    assert env["KERNEL_ID"] == "k1"
    assert env["JPY_PARENT_PID"] == str(os.getpid())
    assert env["HOME"] == "/home/far"


def test_placeholders_are_filled_in_and_unknown_ones_stay():
    options = parse([*OPTIONS, "--port-range", "1000..2000"])
    argv = ["k", "--f={connection_file}", "{kernel_id}/{port_range}", "{response_address}", "{resource_dir}", "{}"]
    assert kernel_argv(argv, options, "/f") == ["k", "--f=/f", "k1/1000..2000", "gw:8877", "{resource_dir}", "{}"]


def test_without_argv_it_is_an_ipykernel_of_this_python():
    assert kernel_argv([], parse(OPTIONS), "/f") == [sys.executable, "-m", "ipykernel_launcher", "-f", "/f"]


def test_a_folder_that_does_not_exist_becomes_the_home_folder(tmp_path):
    lines = []
    assert kernel_folder(str(tmp_path), {}, lines.append) == str(tmp_path)
    assert not lines

    def log(text, *args):
        lines.append(text % args)

    assert kernel_folder("/nowhere/at/all", {"HOME": "/home/far"}, log) == "/home/far"
    assert "/nowhere/at/all" in lines[0]


def test_secrets_leave_the_environment(monkeypatch):
    monkeypatch.setenv("GP_LAUNCH_SECRETS", json.dumps({"token": "t", "env": {"A": "b"}}))
    secrets = read_secrets("")
    assert (secrets.token, secrets.connection, secrets.env) == ("t", None, {"A": "b"})
    assert "GP_LAUNCH_SECRETS" not in os.environ


def test_a_secrets_file_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("GP_LAUNCH_SECRETS", "not this one")
    path = tmp_path / "s"
    path.write_text('{"token": "from file"}')
    assert read_secrets(str(path)).token == "from file"
    assert not path.exists()
    assert "GP_LAUNCH_SECRETS" not in os.environ


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret{",
        "[]",
        '{"token": ""}',
        '{"token": 5}',
        '{"token": "secret", "env": {"A": 1}}',
        '{"token": "secret", "env": {"A=B": "c"}}',
        '{"token": "secret", "env": {"A": "b\\u0000"}}',
        '{"token": "secret", "connection": "secret"}',
        "[" * 100000,
    ],
)
def test_malformed_secrets_are_an_error_that_does_not_quote_them(text, monkeypatch):
    monkeypatch.setenv("GP_LAUNCH_SECRETS", text)
    with pytest.raises(SecretsError) as caught:
        read_secrets("")
    assert "secret{" not in str(caught.value)
    assert "'secret'" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("arguments", [["--nonsense"], [*OPTIONS], [*OPTIONS, "--secrets-file", "/nowhere"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments):
    env = {name: value for name, value in os.environ.items() if name != "GP_LAUNCH_SECRETS"}
    done = subprocess.run(
        [sys.executable, "-m", "gp_launchers", *arguments],
        env={**env, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gp-launcher: ")
    assert done.stderr.count("\n") == 1


def test_secrets_from_standard_input(launch, server):
    command = launch.command((), ("--secrets-file", "-"))
    from launcher_kit import CONNECTION

    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(SOURCES)}
    ) as process:
        process.stdin.write(json.dumps({"token": TOKEN, "connection": CONNECTION}).encode())
        process.stdin.close()
        connection, hello = server.meet()
        assert hello["token"] == TOKEN
        connection.next("listening")
        connection.send(type="shutdown", grace=0)
        process.wait(10)


def test_a_log_that_is_appended_to_keeps_its_newest_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "_LARGEST", 4000)
    monkeypatch.setattr(log_module, "_KEPT", 1000)
    log = log_module.Log(str(tmp_path / "log"), "k1")
    for number in range(1000):
        log("line %d", number)
    kept = (tmp_path / "log").read_text()
    assert len(kept) < 7000
    assert kept.startswith("[gp-launcher: older lines were dropped, ")
    lines = [int(line.rpartition(" ")[2]) for line in kept.splitlines()[1:] if "dropped" not in line]
    assert lines == list(range(lines[0], 1000))
