"""What is written of hosts, and what ssh makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core import ConfigError
from gp_core.options import choose, configurable
from gp_core.policies import Policy
from gp_ssh.backend import SshBackend
from gp_ssh.hosts import NAME, Client, Entry, _target, entries


@pytest.mark.parametrize(
    ("written", "host", "user", "port"),
    [
        ("h1", "h1", None, None),
        ("ada@h1:2222", "h1", "ada", 2222),
        ("[fd00::1]:2222", "fd00::1", None, 2222),
        ("ada@[fd00::1]", "fd00::1", "ada", None),
        ("fd00::1", "fd00::1", None, None),
        ({"host": "h1", "weight": 2, "labels": {"gpu": "a100"}}, "h1", None, None),
    ],
)
def test_hosts_are_read(written: Any, host: str, user: str | None, port: int | None) -> None:
    entry = Entry.read(written)
    assert (entry.host, entry.user, entry.port) == (host, user, port)


@pytest.mark.parametrize(
    "written",
    ["", "-oProxyCommand=touch x", "ada@-v", "h1;id", "$(id)@h1", "h 1", "h1:0", "h1:99999", "h1\nh2", {"host": 1},
     {"host": "h1", "size": 2}, {"host": "h1", "weight": "big"}, {"host": "h1", "weight": -1}],
)  # fmt: skip
def test_what_is_no_host_is_refused(written: Any) -> None:
    with pytest.raises(ConfigError):
        Entry.read(written)


@given(st.text())
def test_no_text_becomes_an_option_or_a_word_for_a_shell(text: str) -> None:
    try:
        entry = Entry.read(text)
    except ConfigError:
        return
    assert NAME.fullmatch(entry.host)
    assert entry.user is None or NAME.fullmatch(entry.user)


def test_labels_choose() -> None:
    written = [{"host": "h1", "labels": {"gpu": "a100"}}, {"host": "h2", "labels": {"gpu": "a100", "zone": "b"}}, "h3"]
    assert list(entries(written, {})) == ["h1", "h2", "h3"]
    assert list(entries(written, {"gpu": "a100"})) == ["h1", "h2"]
    with pytest.raises(ConfigError, match="none of the 3 hosts has the labels"):
        entries(written, {"gpu": "h200"})
    with pytest.raises(ConfigError, match="GP_REMOTE_HOSTS"):
        entries([], {})


def test_what_ssh_says_is_followed() -> None:
    said = (
        "user ada\nhostname 10.0.0.7\nport 2222\nidentityfile /nowhere\nidentitiesonly yes\nproxyjump bob@gate:2200\n"
        "userknownhostsfile /a /b\nglobalknownhostsfile none\nconnecttimeout 3\nproxycommand none\n"
    )
    target = _target(Entry.read("h1"), said)
    assert (target.user, target.hostname, target.port) == ("ada", "10.0.0.7", 2222)
    assert (target.proxy_jump, target.proxy_command, target.timeout) == ("bob@gate:2200", "", 3.0)
    assert (target.known_hosts, target.identity_files, target.identities_only) == (("/a", "/b"), (), True)


def test_a_password_comes_from_a_private_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().password() is None
    path = tmp_path / "password"
    by_file, by_variable = Client(password_file=str(path)), Client(password_env="MY_PASSWORD")
    with pytest.raises(ConfigError, match="No such file"):
        by_file.password()
    path.write_text("a b\n")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        by_file.password()
    path.chmod(0o600)
    assert by_file.password() == "a b"
    with pytest.raises(ConfigError, match="MY_PASSWORD"):
        by_variable.password()
    monkeypatch.setenv("MY_PASSWORD", " c ")
    assert by_variable.password() == " c "


@pytest.mark.parametrize("option", ["password_file", "password_env"])
def test_kernelspecs_choose_no_password(option: str) -> None:
    with pytest.raises(ConfigError, match="operator"):
        choose({option: "x"}, SshBackend, Policy())
    assert option not in configurable(SshBackend), "nor do parameters"
