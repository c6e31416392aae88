from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_launchers.options import UsageError, addresses, parse, port_range

PIN = "ab" * 32
BASE = ["--kernel-id", "k1", "--response-address", "gw:8877", "--public-key", PIN]


def test_the_options_of_the_seed_documents():
    options = parse(
        [
            *BASE,
            "--port-range",
            "40000..41000",
            "--spark-context-initialization-mode",
            "lazy",
            "--kernel-class-name",
            "a.B",
            "--transport-encryption",
            "auto",
        ]
    )
    assert options.kernel_id == "k1"
    assert options.response_address == [("gw", 8877)]
    assert options.public_key == [PIN]
    assert options.port_range == (40000, 41000)
    assert options.spark_context_initialization_mode == "lazy"
    assert options.kernel_class_name == "a.B"
    assert options.argv == []


def test_equals_signs_and_underscores_and_empty_values():
    options = parse(
        ["--kernel_id=k=1", *BASE[2:], "--port_range=", "--cwd", "", "--orphan-timeout=2.5", "--", "a", "--b"]
    )
    assert options.kernel_id == "k=1"
    assert options.port_range == (0, 0)
    assert options.orphan_timeout == 2.5
    assert options.argv == ["a", "--b"]


def test_two_pins_and_several_addresses():
    options = parse(
        [*BASE[:2], "--response-address", "gw:1,[fd00::1]:2, 10.0.0.1:3", "--public-key", f"{PIN},{PIN.upper()}"]
    )
    assert options.response_address == [("gw", 1), ("fd00::1", 2), ("10.0.0.1", 3)]
    assert options.public_key == [PIN, PIN]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "--kernel-id is missing"),
        (BASE[:4], "--public-key is missing"),
        ([*BASE, "--what"], "unknown option '--what'"),
        ([*BASE, "word"], "unknown option 'word'"),
        ([*BASE, "--cwd"], "--cwd needs a value"),
        ([*BASE, "--port-range", "5"], "--port-range: '5' is not a port range"),
        ([*BASE, "--orphan-timeout", "nan"], "not a number of seconds"),
        ([*BASE, "--orphan-timeout", "-1"], "not a number of seconds"),
        ([*BASE, "--public-key", "zz"], "64 hexadecimal digits"),
        ([*BASE, "--response-address", "gw"], "is not host:port"),
        ([*BASE, "--response-address", "fd00::1:80"], "needs brackets"),
        ([*BASE, "--spark-context-initialization-mode", "soon"], "none, lazy, eager"),
        ([*BASE, "--attach", "17"], "belong together"),
        ([*BASE, "--attach", "1", "--connection-file", "f"], "is not a process id"),
        ([*BASE, "--attach", "17", "--connection-file", "f", "--", "x"], "no kernel argv"),
        ([*BASE, "--"], "no kernel argv after"),
        (["--kernel-id", "a\nb", *BASE[2:]], "cannot be printed"),
    ],
)
def test_errors_are_one_clear_line(argv, text):
    with pytest.raises(UsageError) as caught:
        parse(argv)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_names_every_option():
    from gp_launchers.options import _READERS, HELP

    assert parse(["--help"]).show == "help"
    assert parse(["--version"]).show == "version"
    for option in _READERS:
        assert f"--{option} " in HELP


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_port_ranges(low, high):
    text = f"{low}..{high}"
    if low <= high:
        assert port_range(text) == (low, high)
    else:
        with pytest.raises(ValueError, match="range"):
            port_range(text)


@given(st.text())
def test_port_range_of_any_text_is_a_range_or_a_value_error(text):
    try:
        low, high = port_range(text)
    except ValueError:
        return
    assert (low, high) == (0, 0) or 1 <= low <= high <= 65535


@given(st.text())
def test_addresses_of_any_text_are_addresses_or_a_value_error(text):
    try:
        found = addresses(text)
    except ValueError:
        return
    assert found
    assert all(host and 0 < port < 65536 for host, port in found)
