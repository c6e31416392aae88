"""Typed parameters: values, rules, JSON schema, and what a client may fill."""

from __future__ import annotations

import json
import re
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traitlets import Unicode

from gp_core.errors import ConfigError
from gp_core.options import checked
from gp_core.parameters import Parameter, from_client, from_schema, quantity, to_schema

CPUS = Parameter(name="cpus", kind="int", default=1, minimum=1, maximum=8, title="Cores")
MEMORY = Parameter(name="memory", kind="quantity", default="2Gi", minimum="512Mi", maximum="16Gi")
SHARE = Parameter(name="share", kind="number", minimum=0, maximum=0.5)
QUEUE = Parameter(name="queue", kind="choice", choices=("short", "long"), default="short")
IMAGE = Parameter(name="image", kind="str", pattern=r"registry/[a-z]+")
DEBUG = Parameter(name="debug", kind="bool", default=False)
ALL = {param.name: param for param in (CPUS, MEMORY, SHARE, QUEUE, IMAGE, DEBUG)}


@pytest.mark.parametrize(
    ("param", "text", "value"),
    [
        (CPUS, "4", 4),
        (CPUS, " +08 ", 8),
        (SHARE, ".25", 0.25),
        (SHARE, "5e-1", 0.5),
        (MEMORY, "4Gi", "4Gi"),
        (MEMORY, "536870912", "536870912"),
        (MEMORY, "17e9", "17e9"),
        (QUEUE, "long", "long"),
        (IMAGE, "registry/torch", "registry/torch"),
        (DEBUG, "True", True),
        (DEBUG, "off", False),
    ],
)
def test_good_values(param, text, value):
    parsed = param.parse(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("param", "text", "error"),
    [
        (CPUS, "99", "parameter cpus: 99 is more than the maximum 8"),
        (CPUS, "0", "parameter cpus: 0 is less than the minimum 1"),
        (CPUS, "2.5", "parameter cpus: '2.5' is not a whole number"),
        (CPUS, "٤", "parameter cpus: '٤' is not a whole number"),
        (CPUS, "1_0", "parameter cpus: '1_0' is not a whole number"),
        (CPUS, "9" * 5000, "is not a whole number"),
        (CPUS, "", "parameter cpus: '' is not a whole number"),
        (CPUS, 4, "parameter cpus: 4 is not a text"),
        (CPUS, None, "parameter cpus: None is not a text"),
        (SHARE, "nan", "parameter share: 'nan' is not a number"),
        (SHARE, "inf", "parameter share: 'inf' is not a number"),
        (SHARE, "1e999", "parameter share: inf is not a number"),
        (SHARE, "0.51", "parameter share: 0.51 is more than the maximum 0.5"),
        (MEMORY, "17Gi", "parameter memory: '17Gi' is more than the maximum 16Gi"),
        (MEMORY, "512m", "parameter memory: '512m' is less than the minimum 512Mi"),
        (MEMORY, "-1Gi", "parameter memory: '-1Gi' is not a quantity"),
        (MEMORY, "1e999999999", "is not a quantity"),
        (MEMORY, "4GiB", "parameter memory: '4GiB' is not a quantity"),
        (QUEUE, "Short", "parameter queue: 'Short' is not one of short, long"),
        (QUEUE, "short ", "is not one of short, long"),
        (IMAGE, "evil/torch", "parameter image: 'evil/torch' does not match registry/[a-z]+"),
        (IMAGE, "registry/torch; x", "does not match"),
        (IMAGE, "registry/torch\n", "has a line break or control character"),
        (DEBUG, "perhaps", "parameter debug: 'perhaps' is not true or false"),
    ],
)
def test_bad_values_name_parameter_value_and_rule(param, text, error):
    with pytest.raises(ConfigError, match=re.escape(error)) as caught:
        param.parse(text)
    assert len(str(caught.value)) < 200


@given(st.text(), st.sampled_from("\0\n\r\x0b\x1b\x85\u2028\ud800"), st.text())
def test_a_str_never_has_control_characters(before, control, after):
    anything = Parameter(name="x", kind="str", pattern="(?s).*")
    with pytest.raises(ConfigError, match="control character"):
        anything.parse(before + control + after)


@given(st.sampled_from(list(ALL.values())), st.text() | st.text(alphabet="0123456789+-.eEkKMGim xo_"))
def test_any_text_is_a_good_value_or_a_config_error(param, text):
    try:
        value = param.parse(text)
    except ConfigError:
        return
    assert param.check(value) == value


@given(st.integers(-20, 20), st.integers(-10, 0), st.integers(0, 10))
def test_exactly_the_values_within_the_limits_pass(value, low, high):
    param = Parameter(name="n", kind="int", minimum=low, maximum=high)
    if low <= value <= high:
        assert param.parse(str(value)) == value
    else:
        with pytest.raises(ConfigError):
            param.parse(str(value))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("500m", Fraction(1, 2)),
        ("1.5Gi", 3 * 2**29),
        ("512M", 512 * 10**6),
        ("2E", 2 * 10**18),
        ("2E3", 2000),
        ("2e-3", Fraction(1, 500)),
        ("3n", Fraction(3, 10**9)),
        (".5Ki", 512),
        ("1Ei", 2**60),
        ("+1k", 1000),
    ],
)
def test_quantities_are_numbers(text, number):
    assert quantity(text) == number


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_quantities_compare_as_numbers_whatever_the_unit(mega, mebi):
    assert (quantity(f"{mega}M") < quantity(f"{mebi}Mi")) == (mega * 10**6 < mebi * 2**20)


@given(st.text(alphabet="0123456789.+-eEnumkKMGTPi", max_size=60))
def test_quantity_is_total(text):
    try:
        assert quantity(text) >= 0
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": "a-b", "kind": "int"}, "name of a parameter"),
        ({"name": "é", "kind": "int"}, "name of a parameter"),
        ({"name": "Username", "kind": "str"}, "name of a parameter"),
        ({"name": "id", "kind": "str"}, "name of a parameter"),
        ({"name": "a", "kind": "int", "minimum": 3, "maximum": 2}, "the minimum 3 is more than the maximum 2"),
        ({"name": "a", "kind": "quantity", "minimum": "1Gi", "maximum": "1G"}, "more than the maximum"),
        ({"name": "a", "kind": "int", "maximum": "3"}, "'3' is not a whole number"),
        ({"name": "a", "kind": "int", "maximum": True}, "True is not a whole number"),
        ({"name": "a", "kind": "number", "maximum": float("nan")}, "nan is not a number"),
        ({"name": "a", "kind": "quantity", "maximum": "much"}, "'much' is not a quantity"),
        ({"name": "a", "kind": "str", "maximum": 3}, "a str has no minimum or maximum"),
        ({"name": "a", "kind": "choice"}, "list of texts"),
        ({"name": "a", "kind": "str", "choices": ("b",)}, "list of texts"),
        ({"name": "a", "kind": "choice", "choices": (1,)}, "list of texts"),
        ({"name": "a", "kind": "int", "pattern": "1"}, "only a str has a pattern"),
        ({"name": "a", "kind": "str", "pattern": "("}, "pattern '('"),
        ({"name": "a", "kind": "str", "pattern": 3}, "pattern 3"),
        ({"name": "a", "kind": "int", "default": 2.0}, "2.0 is not a whole number"),
        ({"name": "a", "kind": "int", "default": True}, "True is not a whole number"),
        ({"name": "a", "kind": "bool", "default": 1}, "1 is not true or false"),
        ({"name": "a", "kind": "str", "default": 1}, "1 is not a text"),
        ({"name": "a", "kind": "quantity", "default": 1}, "1 is not a quantity"),
        ({"name": "a", "kind": "int", "default": 9, "maximum": 8}, "9 is more than the maximum 8"),
    ],
)
def test_a_definition_must_not_contradict_itself(fields, error):
    with pytest.raises(ConfigError, match=re.escape(error)):
        Parameter(**fields)


def test_rules_in_words():
    assert CPUS.rule == "a whole number, at least 1, at most 8"
    assert QUEUE.rule == "one of short, long"
    assert IMAGE.rule == "a text, matching registry/[a-z]+"


# JSON schema


def test_schema_of_a_kernelspec():
    schema = {
        "type": "object",
        "properties": {
            "cpus": {"type": "integer", "default": 1, "minimum": 1, "maximum": 8, "title": "Cores"},
            "memory": {
                "type": "string",
                "format": "quantity",
                "default": "2Gi",
                "minimum": "512Mi",
                "maximum": "16Gi",
            },
            "share": {"type": "number", "minimum": 0, "maximum": 0.5},
            "queue": {"type": "string", "enum": ["short", "long"], "default": "short"},
            "image": {"type": "string", "pattern": "registry/[a-z]+"},
            "debug": {"type": "boolean", "default": False},
        },
    }
    assert from_schema(schema) == ALL
    assert to_schema(ALL) == schema
    assert from_schema({}) == {}


@st.composite
def parameters(draw):
    kind = draw(st.sampled_from(["int", "number", "quantity", "choice", "str", "bool"]))
    fields = {"title": draw(st.text()), "description": draw(st.text())}
    if kind in ("int", "number", "quantity"):
        low, default, high = sorted(draw(st.tuples(*[st.integers(0, 10**6)] * 3)))
        shape = (lambda n: f"{n}Mi") if kind == "quantity" else float if kind == "number" else int
        fields |= {"minimum": shape(low), "default": shape(default), "maximum": shape(high)}
    elif kind == "choice":
        choices = tuple(draw(st.lists(st.text(), min_size=1)))
        fields |= {"choices": choices, "default": draw(st.sampled_from(choices))}
    elif kind == "bool":
        fields["default"] = draw(st.booleans())
    else:
        fields |= {"pattern": "[a-z]*", "default": draw(st.text(alphabet=string.ascii_lowercase))}
    gone = draw(st.sets(st.sampled_from(sorted(fields.keys() - {"choices"}))))
    name = draw(st.from_regex(r"p[A-Za-z0-9_]{0,8}", fullmatch=True))
    return Parameter(name=name, kind=kind, **{key: value for key, value in fields.items() if key not in gone})


@given(st.lists(parameters(), unique_by=lambda param: param.variable))
def test_schema_round_trip(params):
    named = {param.name: param for param in params}
    assert from_schema(json.loads(json.dumps(to_schema(named)))) == named


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ([], "parameters: "),
        ({"properties": {}}, "parameters: "),
        ({"type": "object", "properties": []}, "parameters: "),
        ({"type": "object", "required": ["cpus"]}, "parameters.required: "),
        ({"type": "object", "properties": {"a": 3}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a": {}}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a": {"type": "array"}}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a": {"type": ["string"]}}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "uri"}}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a": {"type": "integer", "enum": [1]}}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a": {"type": "string", "enum": "ab"}}}, "parameters.properties.a: "),
        (
            {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}},
            "parameters.properties.a.maxLength: ",
        ),
        ({"type": "object", "properties": {"a": {"type": "string", "title": 3}}}, "parameters.properties.a.title: "),
        ({"type": "object", "properties": {"a": {"type": "integer", "default": "x"}}}, "parameters.properties.a: "),
        ({"type": "object", "properties": {"a-b": {"type": "integer"}}}, "parameters.properties.a-b: "),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}, "A": {"type": "integer"}}},
            "parameters.properties: ",
        ),
    ],
)
def test_unsupported_schemas_name_the_place(schema, place):
    with pytest.raises(ConfigError, match="^" + re.escape(place)):
        from_schema(schema)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
keywords = st.sampled_from(["type", "format", "default", "minimum", "maximum", "enum", "pattern", "title"])
types = st.sampled_from([{"type": "integer"}, {"type": "string", "format": "quantity"}, {"type": "string"}])


@given(types, st.dictionaries(keywords, json_values, max_size=3))
def test_any_schema_is_read_or_a_config_error(typed, body):
    try:
        from_schema({"type": "object", "properties": {"a": {**typed, **body}}})
    except ConfigError:
        pass


# What a client may fill


def test_clients_fill_only_opened_parameters():
    env = {"KERNEL_CPUS": "4", "KERNEL_GPUS": "8", "KERNEL_ID": "1", "CPUS": "2", "kernel_memory": "4Gi"}
    assert from_client(ALL, env, launch_timeout_cap=60) == {"cpus": 4}


def test_an_empty_variable_is_not_given():
    assert from_client(ALL, {"KERNEL_CPUS": "", "KERNEL_LAUNCH_TIMEOUT": ""}, launch_timeout_cap=60) == {}


def test_a_bad_client_value_is_refused():
    with pytest.raises(ConfigError, match="parameter cpus: 99 is more than the maximum 8"):
        from_client(ALL, {"KERNEL_CPUS": "99"}, launch_timeout_cap=60)
    with pytest.raises(ConfigError, match="parameter cpus: 4 is not a text"):
        from_client(ALL, {"KERNEL_CPUS": 4}, launch_timeout_cap=60)


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("0.5", 0.5), ("60", 60), ("60.1", 60), ("1e300", 60)])
def test_launch_timeout_is_open_and_capped(text, seconds):
    assert from_client({}, {"KERNEL_LAUNCH_TIMEOUT": text}, launch_timeout_cap=60) == {"launch_timeout": seconds}


@pytest.mark.parametrize("text", ["0", "-0", "-1", "nan", "inf", "soon", "1e999"])
def test_a_launch_timeout_that_is_no_time_is_refused(text):
    with pytest.raises(ConfigError, match="parameter launch_timeout"):
        from_client({}, {"KERNEL_LAUNCH_TIMEOUT": text}, launch_timeout_cap=60)


def test_a_kernelspec_cannot_lift_the_cap_by_a_definition_of_its_own():
    mine = {"launch_timeout": Parameter(name="launch_timeout", kind="int", maximum=9999)}
    assert from_client(mine, {"KERNEL_LAUNCH_TIMEOUT": "999"}, launch_timeout_cap=60) == {"launch_timeout": 60}
    mine = {"Launch_Timeout": Parameter(name="Launch_Timeout", kind="str")}
    values = from_client(mine, {"KERNEL_LAUNCH_TIMEOUT": "999"}, launch_timeout_cap=60)
    assert values["launch_timeout"] == 60


def test_a_number_can_be_the_value_of_an_option_that_is_text():
    """Two processors, by a parameter of type integer."""
    assert checked("cpus", 2, Unicode()) == "2"
    assert checked("cpus", 0.5, Unicode()) == "0.5"
    with pytest.raises(ConfigError, match="cpus"):
        checked("cpus", True, Unicode())
