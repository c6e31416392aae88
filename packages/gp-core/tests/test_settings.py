"""Options that take their default from the environment."""

from __future__ import annotations

import pytest
from traitlets import Bool, Float, Int, List, Unicode
from traitlets.config import Config, Configurable

from gp_core.errors import ConfigError
from gp_core.settings import from_env


class Options(Configurable):
    image = from_env(Unicode("default", help="Image."), "GP_TEST_IMAGE")
    count = from_env(Int(3, min=1), "GP_TEST_COUNT")
    limit = from_env(Int(None, allow_none=True), "GP_TEST_LIMIT")
    seconds = from_env(Float(1.5), "GP_TEST_SECONDS")
    flag = from_env(Bool(False), "GP_TEST_FLAG")
    hosts = from_env(List(Unicode(), ["here"]), "GP_TEST_HOSTS")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("IMAGE", "COUNT", "LIMIT", "SECONDS", "FLAG", "HOSTS"):
        monkeypatch.delenv(f"GP_TEST_{name}", raising=False)
    return lambda **values: [monkeypatch.setenv(f"GP_TEST_{name}", value) for name, value in values.items()]


def test_defaults_without_environment():
    options = Options()
    found = (options.image, options.count, options.limit, options.seconds, options.flag, options.hosts)
    assert found == ("default", 3, None, 1.5, False, ["here"])


def test_the_environment_is_read_when_an_instance_is_made_not_at_import(environment):
    environment(IMAGE="mine", COUNT="5", LIMIT="7", SECONDS="2", FLAG="true", HOSTS="h1")
    options = Options()
    found = (options.image, options.count, options.limit, options.seconds, options.flag, options.hosts)
    assert found == ("mine", 5, 7, 2.0, True, ["h1"])
    environment(IMAGE="other")
    assert Options().image == "other"


@pytest.mark.parametrize(
    ("text", "hosts"), [("h1,h2", ["h1", "h2"]), (" h1 , h2 ", ["h1", "h2"]), ("h1,", ["h1"]), ("10,20", ["10", "20"])]
)
def test_lists_are_separated_by_commas(environment, text, hosts):
    environment(HOSTS=text)
    assert Options().hosts == hosts


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_variable_counts_as_unset(environment, empty):
    environment(IMAGE=empty, COUNT=empty, HOSTS=empty)
    assert (Options().image, Options().count, Options().hosts) == ("default", 3, ["here"])


def test_configuration_and_arguments_win_over_the_environment(environment):
    environment(IMAGE="environment", COUNT="5")
    config = Config({"Options": {"image": "configured"}})
    assert Options(config=config).image == "configured"
    assert Options(config=config, image="argument").image == "argument"
    assert Options(config=config).count == 5


def test_a_bad_value_names_the_variable(environment):
    environment(COUNT="many")
    with pytest.raises(ConfigError, match="GP_TEST_COUNT='many' in the environment"):
        Options().count  # noqa: B018


def test_a_value_that_breaks_a_rule_of_the_trait_is_refused(environment):
    environment(COUNT="0")
    with pytest.raises(ConfigError, match="GP_TEST_COUNT='0' in the environment"):
        Options().count  # noqa: B018


def test_the_option_stays_a_configurable_trait_that_names_its_variable():
    trait = Options.class_traits(config=True)["image"]
    assert isinstance(trait, Unicode)
    assert trait.metadata["env"] == "GP_TEST_IMAGE"
    assert type(trait).__name__ == "Unicode"
    assert "Options.image=<Unicode>" in Options.class_get_help()


def test_two_instances_do_not_share_a_list():
    one, other = Options(), Options()
    one.hosts.append("more")
    assert other.hosts == ["here"]
