"""Choosing hosts: every algorithm, and the ledger of kernels and failures."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_core.backend import KernelInfo
from gp_core.balancing import (
    ALGORITHMS,
    Host,
    Ledger,
    gp_select_host,
    least_connection,
    least_load,
    select,
    sticky,
    uniform,
    wants_load,
    weighted,
)
from gp_core.errors import ConfigError

KERNEL = KernelInfo(kernel_id="k", kernel_name="python", user="ana", backend="ssh")
names = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)
points = st.floats(0, 1, exclude_max=True)


def hosts_of(text):
    return [Host(name) for name in text]


def kernel(number, user="ana"):
    return KernelInfo(kernel_id=str(number), kernel_name="python", user=user, backend="ssh")


def place(count, hosts, ledger, algorithm="round-robin", now=0.0):
    start = ledger._turn
    return [select(algorithm, hosts, kernel(start + n), ledger, now=now) for n in range(count)]


def test_round_robin_goes_round_in_order():
    assert place(7, hosts_of("abc"), Ledger(start=1)) == list("bcabcab")


@given(names, st.integers(0, 99), st.integers(0, 50))
def test_round_robin_is_fair(hosts, start, count):
    counts = Counter(dict.fromkeys(hosts, 0))
    counts.update(place(count, hosts_of(hosts), Ledger(start=start)))
    assert max(counts.values()) - min(counts.values()) <= 1


@given(st.lists(names, max_size=40))
def test_round_robin_is_fair_while_hosts_come_and_go(offers):
    ledger = Ledger()
    since = {name: Counter() for name in "abcdefgh"}  # choices of others since a host was chosen while on offer
    for offer in offers:
        (chosen,) = place(1, hosts_of(offer), ledger)
        assert chosen in offer
        for name in offer:
            since[name][chosen] += 1
        since[chosen].clear()
        # no host that could have been chosen waits while another one has two turns
        assert all(max(others.values(), default=0) <= 1 for others in since.values())


def test_a_host_that_comes_back_is_not_flooded():
    ledger = Ledger(start=0)
    place(20, hosts_of("ab"), ledger)
    assert Counter(place(9, hosts_of("abc"), ledger)) == {"a": 3, "b": 3, "c": 3}


def test_many_servers_do_not_all_begin_with_the_same_host():
    hosts = hosts_of("abcd")
    for algorithm in ALGORITHMS:
        users = (kernel(0, user=f"u{n}") for n in range(200))
        assert len({select(algorithm, hosts, user, Ledger(), now=0) for user in users}) == 4, algorithm


@given(st.lists(st.integers(0, 5), min_size=1), points)
def test_least_connection_picks_a_minimum(kernels, point):
    hosts = [Host(str(n), kernels=count) for n, count in enumerate(kernels)]
    assert kernels[int(least_connection(hosts, point))] == min(kernels)


@given(names, st.integers(0, 60))
def test_least_connection_keeps_hosts_level_while_kernels_only_start(hosts, count):
    ledger = Ledger()
    place(count, hosts_of(hosts), ledger, "least-connection")
    counts = [host.kernels for host in ledger.usable(hosts_of(hosts), 0)]
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1


def test_least_connection_counts_starts_that_are_still_under_way_and_forgets_ended_kernels():
    ledger, hosts = Ledger(), hosts_of("ab")
    first = select("least-connection", hosts, kernel(1), ledger, now=0)
    second = select("least-connection", hosts, kernel(2), ledger, now=0)
    assert {first, second} == {"a", "b"}
    ledger.ended("1")
    ledger.ended("1")
    ledger.ended("unknown")
    assert select("least-connection", hosts, kernel(3), ledger, now=0) == first


def test_kernels_that_others_started_count_too():
    ledger = Ledger()
    ledger.started("a", "k1")
    assert ledger.usable([Host("a", kernels=2), Host("b", kernels=1)], 0)[0].kernels == 3
    ledger.started("b", "k1")  # the same kernel started again elsewhere
    assert [host.kernels for host in ledger.usable(hosts_of("ab"), 0)] == [0, 1]


@given(names, points)
def test_uniform_picks_any(hosts, point):
    assert uniform(hosts_of(hosts), point) in hosts


def test_uniform_is_uniform():
    hosts = hosts_of("abcd")
    assert Counter(uniform(hosts, n / 1000) for n in range(1000)) == dict.fromkeys("abcd", 250)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_weighted_frequencies_are_the_weights(weights):
    hosts = [Host(str(n), weight=weight) for n, weight in enumerate(weights)]
    steps = max(sum(weights), 1) * 10
    counts = Counter(weighted(hosts, (n + 0.5) / steps) for n in range(steps))
    if any(weights):
        assert counts == {str(n): weight * 10 for n, weight in enumerate(weights) if weight}
    else:
        assert counts.total() == steps


@given(st.lists(st.floats(0, 1e300), min_size=1), points)
def test_weighted_never_picks_a_host_without_weight(weights, point):
    chosen = weights[int(weighted([Host(str(n), weight=w) for n, w in enumerate(weights)], point))]
    assert chosen > 0 or not any(weights)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_must_be_a_number(weight):
    with pytest.raises(ConfigError, match="of host a"):
        Host("a", weight=weight)


@given(names, st.text(), st.randoms())
def test_sticky_depends_on_the_user_and_the_set_of_hosts_only(hosts, user, shuffle):
    chosen = sticky(hosts_of(hosts), user)
    again = list(hosts)
    shuffle.shuffle(again)
    assert sticky(hosts_of(again), user) == chosen
    # another host that goes away does not move the user
    others = [name for name in hosts if name != chosen]
    assert all(sticky([host for host in hosts_of(hosts) if host.name != gone], user) == chosen for gone in others)


def test_sticky_spreads_users_by_weight():
    hosts = [Host("a", weight=3), Host("b"), Host("c", weight=0)]
    counts = Counter(sticky(hosts, f"user{n}") for n in range(4000))
    assert counts["c"] == 0
    assert 2850 < counts["a"] < 3150


def test_sticky_user_moves_only_while_the_host_is_not_usable():
    ledger, hosts = Ledger(), hosts_of("abcd")
    home = select("sticky", hosts, KERNEL, ledger, now=0)
    ledger.failed(home, 0)
    away = select("sticky", hosts, KERNEL, ledger, now=1)
    assert away != home
    assert select("sticky", hosts, KERNEL, ledger, now=2) == away
    assert select("sticky", hosts, KERNEL, ledger, now=10) == home


# Failures


def usable(ledger, text, now):
    return "".join(host.name for host in ledger.usable(hosts_of(text), now))


def test_a_failed_host_is_avoided_then_retried_with_a_doubling_backoff():
    ledger, now, waits = Ledger(backoff=10, longest=60), 0.0, []
    for _ in range(5):
        ledger.failed("a", now)
        wait = next(seconds for seconds in range(1000) if usable(ledger, "ab", now + seconds) == "ab")
        waits.append(wait)
        now += wait
    assert waits == [10, 20, 40, 60, 60]
    ledger.ok("a")
    assert usable(ledger, "ab", now) == "ab"
    ledger.failed("a", now)
    assert usable(ledger, "ab", now + 10) == "ab"


def test_failures_at_the_same_time_count_as_one():
    ledger = Ledger(backoff=10)
    for n in range(50):
        ledger.failed("a", n / 10)
    assert usable(ledger, "ab", 4.9 + 9.9) == "b"
    assert usable(ledger, "ab", 4.9 + 10) == "ab"


def test_when_all_failed_the_least_recently_failed_is_retried():
    ledger = Ledger()
    for now, host in enumerate("bca"):
        ledger.failed(host, now)
    assert usable(ledger, "abc", 3) == "b"
    ledger.failed("b", 4)
    assert usable(ledger, "abc", 5) == "c"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 100)), max_size=30))
def test_there_is_always_a_usable_host(history):
    ledger, now = Ledger(), 0.0
    for host, good, seconds in history:
        now += seconds
        ledger.ok(host) if good else ledger.failed(host, now)
        assert usable(ledger, "abc", now)
    assert usable(ledger, "abc", now + 301) == "abc"


def test_least_load_takes_the_host_that_has_most_to_give():
    hosts = [Host("a", load=0.5), Host("b", load=0.2), Host("c", load=float("inf"))]
    assert least_load(hosts) == "b"
    assert least_load([Host("a", load=0.5, weight=4), hosts[1]]) == "a", "a larger one bears more"
    assert least_load([hosts[2]]) == "c", "better than none"


def test_starts_together_do_not_all_go_where_the_load_is_least():
    hosts = [Host("a", load=0.0), Host("b", load=0.25)]
    counts = Counter(place(10, hosts, Ledger(), "least-load"))
    assert counts == {"a": 6, "b": 4}


def test_only_some_algorithms_want_the_load():
    assert [name for name in [*ALGORITHMS, "a plugin's"] if wants_load(name)] == ["least-load", "a plugin's"]


# The hook and select


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(hosts=names)
def test_every_algorithm_picks_one_of_the_hosts(algorithm, hosts):
    assert gp_select_host(algorithm, hosts_of(hosts), KERNEL) in hosts
    assert select(algorithm, hosts_of(hosts), KERNEL, Ledger(), now=0) in hosts


def test_an_unknown_algorithm_names_those_that_exist():
    with pytest.raises(
        ConfigError, match="'fastest' is none of round-robin, least-connection, random, weighted, sticky, least-load"
    ):
        select("fastest", hosts_of("ab"), KERNEL, Ledger(), now=0)


def test_no_hosts():
    with pytest.raises(ConfigError, match="no host"):
        select("random", [], KERNEL, Ledger(), now=0)


def test_plugins_are_asked_with_what_the_ledger_knows_and_their_choice_is_booked():
    ledger, seen = Ledger(start=0), []
    ledger.started("a", "k1")
    ledger.failed("b", 0)

    def ask(algorithm, hosts, kernel):
        seen.append((algorithm, hosts, kernel))
        return "c"

    assert select("mine", hosts_of("abc"), KERNEL, ledger, now=1, ask=ask) == "c"
    assert seen == [("mine", [Host("a", kernels=1, turn=1), Host("c", turn=-1)], KERNEL)]
    assert [host.kernels for host in ledger.usable(hosts_of("ac"), 1)] == [1, 1]


def test_random_is_random():
    random.seed(7)
    assert len({gp_select_host("random", hosts_of("abcd"), KERNEL) for _ in range(100)}) == 4
