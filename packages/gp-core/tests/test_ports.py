"""Port ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core.errors import ConfigError
from gp_core.ports import HIGHEST, LOWEST, PortRange


@st.composite
def ranges(draw):
    low, high = sorted(draw(st.tuples(*[st.integers(LOWEST, HIGHEST)] * 2)))
    return PortRange(low, high)


@given(ranges())
def test_text_round_trip(ports):
    assert PortRange.parse(str(ports)) == ports
    assert PortRange.parse(f" {ports.low} .. {ports.high} ") == ports


@pytest.mark.parametrize("text", ["", "  ", "0..0", " 0..0 "])
def test_any_port(text):
    ports = PortRange.parse(text)
    assert ports.is_any
    assert ports == PortRange()
    assert 1 in ports
    assert HIGHEST in ports
    assert 0 not in ports
    assert HIGHEST + 1 not in ports


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "4000",
        "4000-5000",
        "4000..",
        "..4000",
        "5000..4000",
        "1..5000",
        "1023..5000",
        "4000..65536",
        "0..4000",
        "-1..4000",
        "4000..0",
        "400\N{ARABIC-INDIC DIGIT ZERO}..5000",
        "4000..5000..6000",
        "4000..5000x",
        "9999999..9999999",
    ],
)
def test_bad_ranges_are_named(text):
    with pytest.raises(ConfigError, match="port_range"):
        PortRange.parse(text)


@given(st.text(alphabet="0123456789. x"))
def test_any_text_is_a_range_or_a_config_error(text):
    try:
        ports = PortRange.parse(text)
    except ConfigError:
        return
    assert ports.is_any or LOWEST <= ports.low <= ports.high <= HIGHEST


@given(ranges() | st.just(PortRange()), ranges() | st.just(PortRange()), st.integers(LOWEST, HIGHEST))
def test_narrowed_is_the_intersection(one, other, port):
    common = port in one and port in other
    try:
        both = one.narrowed(other)
    except ConfigError:
        assert not common
    else:
        assert (port in both) == common


def test_ranges_without_a_common_port():
    with pytest.raises(
        ConfigError, match=r"port_range 5000..5999 has no port in common with the operator's 4000..4999"
    ):
        PortRange(4000, 4999).narrowed(PortRange(5000, 5999))


@given(ranges())
def test_ends_are_included(ports):
    assert ports.low in ports
    assert ports.high in ports
    assert ports.low - 1 not in ports
    assert ports.high + 1 not in ports
