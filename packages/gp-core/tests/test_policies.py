"""Built-in policy: users, ids, limits, what a kernelspec may say, and the verdict on a starting kernel."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core.backend import KernelInfo, State, Status
from gp_core.errors import LAUNCHER_DIED, PLATFORM_FAILED, ConfigError, LaunchDenied, Reason
from gp_core.parameters import Parameter
from gp_core.policies import (
    LARGEST_ID,
    Policy,
    check_limit,
    check_user,
    gp_confirm_startup,
    narrowed,
    normalise_id,
    opened,
    resolve_user,
)
from gp_core.ports import PortRange
from gp_core.startup import WAIT

# Who the user is


def test_sources_of_the_user():
    client, process = {"KERNEL_USERNAME": "ana", "HUB_USER": "fake"}, {"HUB_USER": "bob", "KERNEL_USERNAME": "fake"}
    assert resolve_user("os", client, process, "server") == "server"
    assert resolve_user("env:HUB_USER", client, process, "server") == "bob"
    assert resolve_user("client", client, process, "server") == "ana"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("client", "no KERNEL_USERNAME"),
        ("env:HUB_USER", "no HUB_USER"),
        ("env:", "none of os, env:NAME and client"),
        ("OS", "none of os, env:NAME and client"),
        ("", "none of os, env:NAME and client"),
    ],
)
@pytest.mark.parametrize("empty", [{}, {"HUB_USER": "", "KERNEL_USERNAME": ""}])
def test_no_user_is_an_error_and_never_somebody_else(source, error, empty):
    with pytest.raises(ConfigError, match=re.escape(error)):
        resolve_user(source, empty, empty, "server")


@pytest.mark.parametrize(
    "name", ["ana", "a" * 255, "ana.b@x.org", "CORP\\ana", "José", "1234567", "007", "auth0|5f", "a-b", "Ana B"]
)
def test_good_user_names(name):
    assert resolve_user("client", {"KERNEL_USERNAME": name}, {}, "") == name


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../x",
        ".",
        "..",
        "a\0",
        "a\nb",
        "a\tb",
        "\x7f",
        "a\x85",
        "a\u2028b",
        "\ud800",
        "a" * 256,
        " ",
        " root",
        "root ",
        "-o",
        "+0",
        "#0",
        "0",
        "000",
    ],
)
def test_bad_user_names(name):
    with pytest.raises(ConfigError, match="not acceptable as a user name") as caught:
        resolve_user("client", {"KERNEL_USERNAME": name}, {}, "")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_user_name_is_a_text():
    with pytest.raises(ConfigError, match="1000 is not acceptable as a user name"):
        resolve_user("client", {"KERNEL_USERNAME": 1000}, {}, "")


@given(st.text())
def test_a_user_name_is_one_word_of_a_path(name):
    try:
        user = resolve_user("env:U", {}, {"U": name}, "")
    except ConfigError:
        return
    assert user == name
    assert "/" not in user
    assert 0 < len(user) <= 255


# What a kernelspec may say

users = st.sampled_from(["ana", "bob", "eve", "root"])
sets = st.frozensets(users)
ids = st.frozensets(st.integers(0, 5))
ports = st.sampled_from(["0..0", "40000..42999", "41000..43999", "50000..52999"])
limits = st.none() | st.integers(1, 5)
configs = st.fixed_dictionaries(
    {},
    optional={
        "authorized_users": sets | sets.map(",".join),
        "unauthorized_users": sets | sets.map(sorted),
        "prohibited_uids": ids.map(list) | ids.map(lambda numbers: [f" 0x{n:x}" for n in numbers]),
        "prohibited_gids": ids,
        "port_range": ports,
        "min_port_range_size": st.integers(0, 3000),
        "max_kernels_per_user": limits,
        "launch_timeout_cap": st.none() | st.integers(1, 100),
        "image_name": st.just("not a policy"),
    },
)


def allowed(check, *arguments):
    try:
        check(*arguments)
    except LaunchDenied:
        return False
    return True


@given(configs, configs, users, st.integers(0, 5), st.integers(0, 5), st.integers(0, 65535))
def test_a_kernelspec_never_widens(operator, spec, user, number, running, port):
    try:
        ours = Policy.parse(operator)
        both = narrowed(ours, spec)
    except ConfigError:
        return
    assert allowed(check_user, both, user) <= allowed(check_user, ours, user)
    assert both.prohibited_uids >= ours.prohibited_uids
    assert both.prohibited_gids >= ours.prohibited_gids
    assert allowed(check_limit, both, user, running) <= allowed(check_limit, ours, user, running)
    assert (port in both.port_range) <= (port in ours.port_range)
    assert both.launch_timeout_cap <= ours.launch_timeout_cap
    assert both.min_port_range_size >= ours.min_port_range_size
    assert narrowed(both, spec) == both


@given(configs, users)
def test_what_a_kernelspec_forbids_is_forbidden(spec, user):
    try:
        theirs = Policy.parse(spec)
        both = narrowed(Policy(), spec)
    except ConfigError:
        return
    assert allowed(check_user, both, user) <= allowed(check_user, theirs, user)
    assert theirs.prohibited_uids <= both.prohibited_uids


def test_authorized_users_are_those_that_both_name():
    operator = Policy(authorized_users=frozenset({"ana", "bob"}))
    assert narrowed(operator, {"authorized_users": "bob, eve"}).authorized_users == {"bob"}
    assert narrowed(operator, {"authorized_users": []}).authorized_users == {"ana", "bob"}
    assert narrowed(operator, {}).authorized_users == {"ana", "bob"}
    assert narrowed(Policy(), {"authorized_users": ["eve"]}).authorized_users == {"eve"}


def test_nobody_in_common_is_an_error_and_not_everybody():
    with pytest.raises(ConfigError, match="authorized_users") as caught:
        narrowed(Policy(authorized_users=frozenset({"ana"})), {"authorized_users": ["eve"]})
    assert "ana" not in str(caught.value)


def test_ports_lie_in_both_ranges_and_must_be_enough():
    operator = Policy.parse({"port_range": "40000..42999"})
    assert narrowed(operator, {"port_range": "41000..50000"}).port_range == PortRange(41000, 42999)
    assert narrowed(operator, {"port_range": "0..0"}).port_range == operator.port_range
    for ports in ("42500..50000", "41000..41998"):
        with pytest.raises(ConfigError, match="at least 1000 are required"):
            narrowed(operator, {"port_range": ports, "min_port_range_size": 1})
    with pytest.raises(ConfigError, match="no port in common"):
        narrowed(operator, {"port_range": "50000..52000"})


def test_limits_take_the_minimum():
    operator = Policy.parse({"max_kernels_per_user": 3, "launch_timeout_cap": 60})
    spec = {"max_kernels_per_user": 9, "launch_timeout_cap": 30}
    assert narrowed(operator, spec).max_kernels_per_user == 3
    assert narrowed(operator, spec).launch_timeout_cap == 30
    assert narrowed(Policy(), spec).max_kernels_per_user == 9


@pytest.mark.parametrize("key", ["user_source", "client_parameters"])
def test_some_keys_are_the_operators_alone(key):
    with pytest.raises(ConfigError, match=f"^{key} is the operator's"):
        narrowed(Policy(), {key: "client"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("authorized_users", "unauthorized_users")
            for value in (3, {"a": 1}, [3], [""], ",", b"a")
        ),
        *(
            (key, value)
            for key in ("prohibited_uids", "prohibited_gids")
            for value in (0, ["no such name"], [None], [-1])
        ),
        *(("port_range", value) for value in (3, "all", [40000, 50000], "50000..40000", "40000..40001")),
        *(("max_kernels_per_user", value) for value in (0, -1, "3", 1.5, True)),
        *(("min_port_range_size", value) for value in (-1, "3", False)),
        *(("launch_timeout_cap", value) for value in (0, -1, "60", True, float("nan"), float("inf"))),
    ],
)
@pytest.mark.parametrize("read", [Policy.parse, lambda spec: narrowed(Policy(), spec)])
def test_wrong_types_name_the_key(read, key, value):
    with pytest.raises(ConfigError, match=key):
        read({key: value})


@pytest.mark.parametrize("value", [["0", "root", "0x1"], "0, 1", (0, 1), {"00", "+1"}])
def test_prohibited_ids_in_any_notation(value):
    assert Policy.parse({"prohibited_uids": value}).prohibited_uids == {0, 1}


def test_the_operators_parameters_win_over_those_of_a_kernelspec():
    ours, theirs = Parameter(name="cpus", kind="int", maximum=4), Parameter(name="CPUS", kind="int", maximum=64)
    other = Parameter(name="queue", kind="str")
    policy = Policy.parse({"client_parameters": {"cpus": ours}})
    assert opened(policy, {"CPUS": theirs, "queue": other}) == {"cpus": ours, "queue": other}


# Checks before a start


def test_denial_comes_first():
    policy = Policy(authorized_users=frozenset({"root", "ana"}))
    check_user(policy, "ana")
    with pytest.raises(LaunchDenied, match=r"'root' .* \(unauthorized_users\)"):
        check_user(policy, "root")
    with pytest.raises(LaunchDenied, match=r"'eve' .* \(authorized_users\)") as caught:
        check_user(policy, "eve")
    assert "ana" not in str(caught.value)
    check_user(Policy(), "anybody")


def test_kernels_per_user():
    policy = Policy(max_kernels_per_user=2)
    check_limit(policy, "ana", 1)
    check_limit(Policy(), "ana", 10**6)
    with pytest.raises(LaunchDenied, match="'ana' has 2 kernels and may have 2"):
        check_limit(policy, "ana", 2)


# Numbers of users and groups


def lookup(name):
    return {"ana": 1000, "wheel": 10}[name]


@pytest.mark.parametrize("kind", ["uid", "gid"])
@pytest.mark.parametrize(
    "text",
    ["0", "00", " 0", "0 ", "\t0\n", "+0", "-0", "0x0", "0X00", "+0x0", "0o0", "0O0", "0b0", "root", " root ", 0],
)
def test_every_way_to_write_zero(text, kind):
    assert normalise_id(text, kind, lookup=lookup) == 0


@pytest.mark.parametrize(
    ("value", "number"),
    [("010", 10), ("0x10", 16), ("0o10", 8), ("1000", 1000), ("ana", 1000), (10, 10), (str(LARGEST_ID), LARGEST_ID)],
)
def test_other_ids(value, number):
    assert normalise_id(value, "uid", lookup=lookup) == number


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        None,
        True,
        False,
        0.0,
        [],
        b"0",
        "-1",
        -1,
        "4294967295",
        "4294967296",
        2**32,
        str(2**64),
        "9" * 5000,
        "\N{ARABIC-INDIC DIGIT ZERO}",
        "\N{FULLWIDTH DIGIT ZERO}",
        "0_0",
        "0.0",
        "0e0",
        "0x",
        "08x",
        "0 0",
        "--0",
        "+ 0",
        "Root",
        "nobody-here",
        "a\0b",
        "\x00",
        "a\nb",
    ],
)
def test_what_is_no_id(value):
    with pytest.raises(ConfigError) as caught:
        normalise_id(value, "gid", lookup=lookup)
    assert "gid" in str(caught.value)


def test_names_of_this_machine():
    pwd, grp = pytest.importorskip("pwd"), pytest.importorskip("grp")
    user, group = pwd.getpwall()[-1], grp.getgrall()[-1]
    assert normalise_id(user.pw_name, "uid") == user.pw_uid
    assert normalise_id(group.gr_name, "gid") == group.gr_gid
    with pytest.raises(ConfigError, match="uid 'no such user' is neither"):
        normalise_id("no such user", "uid")


@given(st.text() | st.text(alphabet="0123456789xob+- _"))
def test_an_id_is_a_number_in_range_or_a_config_error(text):
    try:
        number = normalise_id(text, "uid", lookup=lookup)
    except ConfigError:
        return
    assert 0 <= number <= LARGEST_ID


@given(st.integers(0, LARGEST_ID), st.sampled_from(["{}", "00{}", " +{} ", "{:#x}", "{:#X}", "{:#o}", "{:#b}"]))
def test_ids_compare_as_numbers(number, notation):
    assert normalise_id(notation.format(number), "uid", lookup=lookup) == number


# The verdict on a starting kernel

KERNEL = KernelInfo(kernel_id="k", kernel_name="python", user="ana", backend="b")


@pytest.mark.parametrize("state", [State.PENDING, State.RUNNING, State.UNKNOWN])
def test_waits_while_the_job_may_still_start(state):
    assert gp_confirm_startup(KERNEL, Status(state=state, detail="pulling"), 1e6) == WAIT


def test_fails_with_the_platforms_reason():
    pull = Reason("ImagePullBackOff", "Correct the image name.")
    verdict = gp_confirm_startup(KERNEL, Status(state=State.PENDING, reason=pull, terminal=True, detail="no image"), 0)
    assert (verdict.wait, verdict.reason, verdict.detail) == (False, pull, "no image")


@pytest.mark.parametrize(("detail", "reason"), [("", LAUNCHER_DIED), ("OOM", PLATFORM_FAILED)])
def test_fails_when_the_job_is_gone(detail, reason):
    verdict = gp_confirm_startup(KERNEL, Status(state=State.GONE, detail=detail), 0)
    assert (verdict.wait, verdict.reason, verdict.detail) == (False, reason, detail)


def test_impersonation_can_be_demanded_by_a_kernelspec_and_not_taken_back():
    assert narrowed(Policy(), {"impersonation_enabled": "true"}).impersonation_enabled
    assert narrowed(Policy(impersonation_enabled=True), {"impersonation_enabled": False}).impersonation_enabled
    with pytest.raises(ConfigError, match="impersonation_enabled: 'maybe' is neither true nor false"):
        narrowed(Policy(), {"impersonation_enabled": "maybe"})
