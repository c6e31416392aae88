"""Directives that show what the code says of itself; the texts come from `gp_facts`."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gp_facts
from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class _Markdown(SphinxDirective):
    optional_arguments = 1
    make: ClassVar[Callable[..., str]]

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(type(self).make(*self.arguments))


class _Console(SphinxDirective):
    optional_arguments = 1
    final_argument_whitespace = True
    make: ClassVar[Callable[..., str]]

    def run(self) -> list[nodes.Node]:
        text = type(self).make(*self.arguments)
        return [nodes.literal_block(text, text, language="text")]


class Picture(SphinxDirective):
    """An SVG file inside the page, where it takes colours and fonts from the theme, with the content as caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.doc2path(self.env.docname)).parent / self.arguments[0]
        self.env.note_dependency(path)
        caption = html.escape(" ".join(self.content))
        figure = f'<figure class="gp-picture">{path.read_text()}<figcaption>{caption}</figcaption></figure>'
        return [nodes.raw("", figure, format="html")]


def _directive(base: type[SphinxDirective], make: Callable[..., str]) -> type[SphinxDirective]:
    return type(make.__name__, (base,), {"make": staticmethod(make)})


def value_role(
    name: str, rawtext: str, text: str, lineno: int, inliner: Inliner, options: Any = None, content: Any = ()
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Show a constant of the code."""
    return [nodes.Text(gp_facts.value(text))], []


def _no_type_before_colon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking the words before a colon for the type of an attribute."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def setup(app: Sphinx) -> dict[str, Any]:
    for name, base, make in (
        ("gp-options", _Markdown, gp_facts.options_markdown),
        ("gp-without-effect", _Markdown, gp_facts.without_effect_markdown),
        ("gp-reasons", _Markdown, gp_facts.reasons_markdown),
        ("gp-contract", _Markdown, gp_facts.contract_markdown),
        ("gp-help", _Console, lambda command="": gp_facts.command_help(command)),
        ("gp-launcher-help", _Console, gp_facts.launcher_help),
    ):
        app.add_directive(name, _directive(base, make))
    app.connect("autodoc-process-docstring", _no_type_before_colon, priority=400)
    app.add_directive("gp-picture", Picture)
    app.add_role("value", value_role)
    return {"parallel_read_safe": True}
