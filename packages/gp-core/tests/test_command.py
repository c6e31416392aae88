from hypothesis import given
from hypothesis import strategies as st

from gp_core.command import expanded, fill, launch_environment, names_our_launcher, placeholders
from gp_launchers.command import kernel_environment


def test_unknown_placeholders_stay() -> None:
    assert fill(["{a}-{b}", "{connection_file}"], {"a": 1}) == ["1-{b}", "{connection_file}"]
    assert placeholders(["{a}x{b}", "{}", "{a b}"]) == {"a", "b"}


@given(st.lists(st.text()), st.dictionaries(st.text(), st.text()))
def test_filling_keeps_the_number_of_arguments_and_never_fills_twice(argv: list[str], values: dict[str, str]) -> None:
    filled = fill(argv, values)
    assert len(filled) == len(argv)
    assert fill(["{a}"], {"a": "{b}", "b": "x"}) == ["{b}"]


def test_the_servers_environment_stays_at_home() -> None:
    process = {"PATH": "/bin", "SECRET_TOKEN": "s", "KERNEL_GPUS": "1", "HTTP_PROXY": "p"}
    env = launch_environment(
        kernelspec={"SPEC": "${HOME}/x"},
        requested={**process, "JPY_SESSION_NAME": "nb.ipynb", "MINE": "a$b", "JPY_PARENT_PID": "1"},
        process=process,
        passed=["HTTP_PROXY"],
    )
    assert env == {
        "HTTP_PROXY": "p",
        "KERNEL_GPUS": "1",
        "JPY_SESSION_NAME": "nb.ipynb",
        "MINE": "a$$b",  # a literal; only the kernelspec's values are filled over there
        "SPEC": "${HOME}/x",
    }


def test_without_a_requested_environment_only_kernel_variables_travel() -> None:
    env = launch_environment(kernelspec={}, requested=None, process={"A": "1", "KERNEL_X": "2"})
    assert env == {"KERNEL_X": "2"}


def test_what_cannot_be_a_variable_or_must_not_be_one_is_left_out() -> None:
    requested = {"": "x", "A=B": "x", "NUL": "a\0b", "GP_LAUNCH_SECRETS": "x", "FINE": "x"}
    assert launch_environment(kernelspec={}, requested=requested, process={}) == {"FINE": "x"}


def test_our_launcher_is_recognised_in_the_peers_style() -> None:
    assert names_our_launcher(["python", "-m", "gp_launchers", "--public-key", "{public_key}"])
    assert names_our_launcher(["run.sh", "/opt/gp-launcher.pyz"])
    assert not names_our_launcher(["python", "/x/launch_ipykernel.py", "--public-key", "{public_key}"])


def test_expansion_on_this_machine_is_the_launchers() -> None:
    env = {"LITERAL": "a$$b", "FROM": "${HOME}:${LITERAL}:${NOBODY}"}
    assert expanded(env, {"HOME": "/root"}) == {"LITERAL": "a$b", "FROM": "/root:a$b:${NOBODY}"}


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_literals_of_the_caller_survive_both_ways(requested: dict[str, str]) -> None:
    env = launch_environment(kernelspec={}, requested=requested, process={})
    kept = {name: value for name, value in requested.items() if name in env}
    assert expanded(env, {"HOME": "x"}) == kept
    far = kernel_environment({}, env, "k")
    assert {name: far[name] for name in kept if name not in ("KERNEL_ID", "JPY_PARENT_PID")} == {
        name: value for name, value in kept.items() if name not in ("KERNEL_ID", "JPY_PARENT_PID")
    }
