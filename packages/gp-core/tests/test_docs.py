"""Every hook, option, failure reason, command and message is documented, and what the documentation names exists."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from traitlets import HasTraits

from gp_core import hookspecs, protocol
from gp_core._markers import PROJECT
from gp_core.errors import REASONS
from gp_core.events import Event
from gp_core.options import ProvisionerOptions
from gp_core.plugins import plugins
from gp_core.server import KernelServer
from gp_launchers.errors import CODES
from gp_launchers.supervisor import Supervisor

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
SOURCES = sorted(ROOT.glob("packages/*/src"))

if not DOCS.is_dir():
    pytest.skip("the documentation is in the repository only", allow_module_level=True)

PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("gp_")}


@pytest.fixture(scope="module")
def facts() -> Iterator[ModuleType]:
    """The module that the pages' generated parts come from."""
    path = DOCS / "_ext/gp_facts.py"
    spec = importlib.util.spec_from_file_location("gp_facts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def page(name: str) -> str:
    return (DOCS / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, also those that are indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [inspect.cleandoc(f"\n{body}") for _, body in found]


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


# -- hooks


def test_there_are_hooks() -> None:
    assert len(HOOKS) == 8


@pytest.mark.parametrize("name", HOOKS)
def test_hook_is_documented_with_its_signature_and_an_example(name: str) -> None:
    text = page("reference/hooks.md")
    section = text[text.index(f"\n## {name}\n") :].removeprefix(f"\n## {name}\n").split("\n## ")[0]
    assert f".. autofunction:: gp_core.hookspecs.{name}\n" in section, "the signature is shown by autodoc"
    [example] = [
        node for code in blocks(section, "python") for node in ast.walk(ast.parse(code)) if _defines(node, name)
    ]
    wanted = [argument.arg for argument in example.args.args]
    assert set(wanted) <= set(inspect.signature(HOOKS[name]).parameters)


def _defines(node: ast.AST, name: str) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name


def test_kinds_of_hooks_are_true_and_in_order() -> None:
    cells = [row for row in rows(page("reference/hooks.md")) if "hookspecs.gp_" in row[0]]
    told = {re.search(r"hookspecs\.(\w+)", row[0])[1]: (row[1], row[2]) for row in cells}
    real = {}
    for name, hook in HOOKS.items():
        first = getattr(hook, f"{PROJECT}_spec")["firstresult"]
        awaited = "Awaitable" in str(hook.__annotations__["return"])
        real[name] = ("first result" if first else "list", "may be" if awaited else "no")
    assert told == real
    assert list(told) == list(real)


# -- options


def test_every_option_is_in_the_reference_with_help(facts: ModuleType) -> None:
    text = page("reference/options.md")
    for group in ("process", "policy", "launch", "local"):
        assert f"```{{gp-options}} {group}\n" in text
    shown = {(option.owner, option.name): option for group in facts.groups() for option in facts.options(group)}
    classes: list[type[HasTraits]] = [KernelServer, ProvisionerOptions, *plugins().backends.values()]
    assert set(shown) == {(cls.__name__, name) for cls in classes for name in cls.class_own_traits(config=True)}
    for option in shown.values():
        assert len(option.help) > 10, f"{option.owner}.{option.name} has no help"
        assert option.help in option.markdown()
        assert option.variable is None or option.variable in option.markdown()


def test_a_default_is_not_that_of_the_builders_environment(facts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GP_RESPONSE_PORT", "1234")
    [port] = [option for option in facts.options("process") if option.name == "response_port"]
    assert port.default == "8877"


def test_every_variable_is_documented_and_every_documented_one_exists(facts: ModuleType) -> None:
    sources = "\n".join(path.read_text() for folder in SOURCES for path in folder.rglob("*.py"))
    real = set(re.findall(r"\bGP_[A-Z0-9_]+\b", sources)) - {"GP_CONTRACT"}  # the kit's
    generated = {option.variable for group in facts.groups() for option in facts.options(group)}
    told = {name for path in PAGES for name in re.findall(r"\bGP_[A-Z0-9_]+\b", path.read_text())}
    assert real - told - generated == set(), "not documented"
    assert told - real == set(), "documented, but nowhere in the code"


def test_settings_that_are_shown_exist() -> None:
    classes = {cls.__name__: cls for cls in (KernelServer, ProvisionerOptions, *plugins().backends.values())}
    for path in PAGES:
        for owner, name in re.findall(r"\b(?:c|--)\.?(\w+)\.(\w+) ?=", path.read_text()):
            if owner in classes:
                assert name in classes[owner].class_traits(config=True), f"{path}: {owner}.{name}"


# -- failures


def test_every_reason_has_its_section_and_no_other_has_one() -> None:
    text = page("howto/troubleshooting.md")
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert headings == [reason.code for reason in REASONS]
    for section in text.split("\n## ")[1 : len(headings) + 1]:
        assert re.findall(r"^(You see|It means|Do)\n: ", section, re.MULTILINE) == ["You see", "It means", "Do"], (
            section
        )


def test_reasons_and_events_are_in_the_reference(facts: ModuleType) -> None:
    assert "```{gp-reasons}" in page("reference/reasons.md")
    for reason in REASONS:
        assert reason.code in facts.reasons_markdown()
        assert reason.advice in facts.reasons_markdown()
    assert ".. autoclass:: gp_core.events.Event\n   :members:" in page("reference/events.md")
    mentioned = page("reference/events.md")
    assert {event.value for event in Event if f"`{event.value}`" not in mentioned} == set()


# -- protocol and commands


def test_every_message_is_documented() -> None:
    table = {row[0].split("`")[1]: row[1] for row in rows(page("reference/protocol-2.md")) if row[0].startswith("`")}
    both = page("reference/protocol-2.md")
    for kind in inspect.getsource(Supervisor.__init__).split("self._handlers = {")[1].split("}")[0].split('"')[1::2]:
        assert f"`{kind}`" in both
    assert {"hello", "listening", "exited", "ping", "pong", "accepted", "refused", "signal", "shutdown"} <= set(table)
    told = set(re.findall(r"\w+", table["hello"]))
    assert told == {"versions", *(field.name for field in fields(protocol.Hello))} - {"speaks"}
    for message in (
        protocol.accepted(orphan_timeout=1, linger=1, ping=1),
        protocol.refused("", "", final=True),
        protocol.shutdown(1),
        protocol.restart(2, env={}, argv=[], cwd=None),
        protocol.signal(2),
    ):
        assert set(re.findall(r"\w+", table[message["type"]])) == set(message) - {"type"}
    assert {code for code in CODES if f"`{code}`" not in both} == set()


def test_every_command_shows_its_help(facts: ModuleType) -> None:
    text = page("reference/cli.md")
    assert sorted(re.findall(r"```\{gp-help\} (\w+)", text)) == sorted(facts.commands())
    for command in facts.commands():
        assert facts.command_help(command).startswith(f"usage: jupyter gp {command}")
    assert "usage: gp-launcher" in facts.launcher_help()


def test_every_test_of_the_contract_says_its_purpose(facts: ModuleType) -> None:
    tests = dict(facts.contract_tests())
    assert len(tests) > 20
    assert [name for name, purpose in tests.items() if len(purpose) < 20] == []


# -- what is shown


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(DOCS)) for path in PAGES])
def test_code_on_a_page_can_be_read(path: Path) -> None:
    text = path.read_text()
    for code in blocks(text, "python"):
        compile(code, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for code in blocks(text, "json"):
        json.loads(code if code.startswith("{") else f"{{{code}}}")
