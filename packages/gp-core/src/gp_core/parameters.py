"""Typed parameters that a kernelspec or the operator opens to clients, and their form as JSON schema.

A kernelspec carries them as ``metadata["parameters"]``, a JSON schema object; a client fills the parameter
``cpus`` by the variable ``KERNEL_CPUS`` of its start request.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal

from .errors import ConfigError

Value = str | int | float | bool
"""A checked value of a parameter; a quantity stays the text that it was, as platforms want it."""

Kind = Literal["int", "number", "quantity", "choice", "str", "bool"]

RESERVED = frozenset({"id", "name", "username"})
"""What no parameter may be called: ``KERNEL_ID`` and the others have a meaning of their own."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_INT = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_QUANTITY = re.compile(
    r"\+?(?P<digits>[0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})"
    r"((?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<power>[+-]?[0-9]{1,2}))?"
)
_SUFFIXES = {suffix: Fraction(1000) ** (n - 3) for n, suffix in enumerate(["n", "u", "m", "", *"kMGTPE"])}
_SUFFIXES |= {f"{suffix}i": Fraction(1024) ** n for n, suffix in enumerate("KMGTPE", start=1)}
_BOOLS = dict.fromkeys(["true", "1", "yes", "on"], True) | dict.fromkeys(["false", "0", "no", "off"], False)
_WHAT: dict[Kind, str] = {
    "int": "a whole number",
    "number": "a number",
    "quantity": "a quantity such as 500m, 2 or 4Gi",
    "choice": "one of its choices",
    "str": "a text",
    "bool": "true or false",
}


def quantity(text: str) -> Fraction:
    """Return the number that a quantity stands for.

    Args:
        text: Digits with one of the suffixes n u m k M G T P E, Ki Mi Gi Ti Pi Ei, or with a decimal exponent
            ("Quantity" in the Kubernetes API reference); never negative.

    Raises:
        ValueError: The text is no quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {_WHAT['quantity']}")
    power = Fraction(10) ** int(match["power"] or 0)
    return Fraction(match["digits"]) * _SUFFIXES[match["suffix"] or ""] * power


def control_character(text: str, *, allowed: str = "") -> bool:
    """Tell whether a text has a NUL, line break, another control character or a lone surrogate.

    Args:
        text: Anything.
        allowed: Control characters that do not count.
    """
    return any(unicodedata.category(c) in {"Cc", "Zl", "Zp", "Cs"} and c not in allowed for c in text)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One typed parameter.

    Args:
        name: Letters, digits and ``_``, such as ``cpus``.
        kind: What its values are.
        default: Value when nobody gives one; None: it stays unset.
        minimum: Smallest value of an int, number or quantity.
        maximum: Largest value of an int, number or quantity.
        choices: All values of a choice.
        pattern: Regular expression that the whole of a str must match.
        title: Short name for people.
        description: One sentence for people.

    Raises:
        ConfigError: The definition contradicts itself.
    """

    name: str
    kind: Kind
    default: Value | None = None
    minimum: int | float | str | None = None
    maximum: int | float | str | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    title: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.lower() in RESERVED:
            raise self._error("this cannot be the name of a parameter")
        limits = [self._measure(limit) for limit in (self.minimum, self.maximum) if limit is not None]
        if len(limits) == 2 and limits[0] > limits[1]:
            raise self._error(f"the minimum {self.minimum} is more than the maximum {self.maximum}")
        if bool(self.choices) != (self.kind == "choice") or not all(isinstance(c, str) for c in self.choices):
            raise self._error("a choice, and nothing else, has a list of texts to choose from")
        if self.pattern is not None and self.kind != "str":
            raise self._error("only a str has a pattern")
        try:
            re.compile(self.pattern or "")
        except (re.error, TypeError) as error:
            raise self._error(f"pattern {_shown(self.pattern)}: {error}") from None
        if self.default is not None:
            self.check(self.default)

    @property
    def variable(self) -> str:
        """Environment variable by which a client fills the parameter."""
        return f"KERNEL_{self.name.upper()}"

    @property
    def rule(self) -> str:
        """What a value must be, in words."""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        limits = {"at least": self.minimum, "at most": self.maximum, "matching": self.pattern}
        return ", ".join([_WHAT[self.kind], *(f"{word} {x}" for word, x in limits.items() if x is not None)])

    def parse(self, text: object) -> Value:
        """Read a value that a client or a command line gave.

        Args:
            text: Such as ``"4"``; blanks around it count only in a choice or str. Only a text is accepted.

        Returns:
            A value of the parameter's kind.

        Raises:
            ConfigError: The value breaks a rule; the text names parameter, value and rule.
        """
        if not isinstance(text, str):
            raise self._error(f"{_shown(text)} is not a text")
        bare = text.strip()
        value: Value | None = bare if self.kind == "quantity" else text
        if self.kind == "int":
            value = int(bare) if _INT.fullmatch(bare) else None
        elif self.kind == "number":
            value = float(bare) if _NUMBER.fullmatch(bare) else None
        elif self.kind == "bool":
            value = _BOOLS.get(bare.lower())
        if value is None:
            raise self._error(f"{_shown(text)} is not {_WHAT[self.kind]}")
        return self.check(value)

    def check(self, value: Value) -> Value:
        """Return a value that has its type already, such as one from JSON.

        Raises:
            ConfigError: The value breaks a rule; the text names parameter, value and rule.
        """
        if self.kind in ("int", "number", "quantity"):
            self._check_limits(value)
        elif self.kind == "bool":
            if not isinstance(value, bool):
                raise self._error(f"{_shown(value)} is not {_WHAT['bool']}")
        elif not isinstance(value, str):
            raise self._error(f"{_shown(value)} is not a text")
        elif self.kind == "choice":
            if value not in self.choices:
                raise self._error(f"{_shown(value)} is not {self.rule}")
        elif control_character(value, allowed="\t"):
            raise self._error(f"{_shown(value)} has a line break or control character")
        elif self.pattern is not None and not re.fullmatch(self.pattern, value):
            raise self._error(f"{_shown(value)} does not match {self.pattern}")
        return value

    def _check_limits(self, value: Value) -> None:
        size = self._measure(value)
        wanted = {"int": int, "quantity": str}.get(self.kind, (int, float))
        if not isinstance(value, wanted):
            raise self._error(f"{_shown(value)} is not {_WHAT[self.kind]}")
        shown = _shown(value) if isinstance(value, str) else value
        if self.minimum is not None and size < self._measure(self.minimum):
            raise self._error(f"{shown} is less than the minimum {self.minimum}")
        if self.maximum is not None and size > self._measure(self.maximum):
            raise self._error(f"{shown} is more than the maximum {self.maximum}")

    def _measure(self, value: object) -> Fraction:
        """Return the size of a value or limit, for comparisons."""
        if self.kind not in ("int", "number", "quantity"):
            raise self._error(f"a {self.kind} has no minimum or maximum")
        try:
            if isinstance(value, str) and self.kind == "quantity":
                return quantity(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return Fraction(value)
        except (ValueError, OverflowError):
            pass
        raise self._error(f"{_shown(value)} is not {_WHAT[self.kind]}")

    def _error(self, text: str) -> ConfigError:
        return ConfigError(f"parameter {self.name}: {text}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_TYPES: dict[Kind, dict[str, str]] = {
    "int": {"type": "integer"},
    "number": {"type": "number"},
    "quantity": {"type": "string", "format": "quantity"},
    "choice": {"type": "string"},  # and "enum"
    "str": {"type": "string"},
    "bool": {"type": "boolean"},
}
_ANNOTATIONS = frozenset({"title", "description"})
_KEYWORDS = _ANNOTATIONS | {"type", "format", "default", "minimum", "maximum", "enum", "pattern"}
_OBJECT_KEYWORDS = _ANNOTATIONS | {"$schema", "type", "properties", "additionalProperties"}


def from_schema(schema: Mapping[str, Any]) -> dict[str, Parameter]:
    """Read the parameters of a kernelspec.

    A keyword that is not supported is refused: a rule that its author relies on must not be ignored silently.
    ``pattern`` must match the whole value here, while JSON schema itself searches.

    Args:
        schema: JSON schema of an object; empty means no parameters.

    Returns:
        Parameters by name, in the order of the schema.

    Raises:
        ConfigError: The schema says something unsupported; the text names the place.
    """
    _check_keywords(schema, _OBJECT_KEYWORDS, "parameters")
    properties = schema.get("properties", {})
    if schema and (schema.get("type") != "object" or not isinstance(properties, Mapping)):
        raise ConfigError('parameters: must have "type": "object" and a mapping of "properties"')
    params = {name: _from_property(name, body) for name, body in properties.items()}
    if len({param.variable for param in params.values()}) < len(params):
        raise ConfigError("parameters.properties: two names differ only in upper and lower case")
    return params


def _from_property(name: str, body: Mapping[str, Any]) -> Parameter:
    place = f"parameters.properties.{name}"
    _check_keywords(body, _KEYWORDS, place)
    typed, choices = {key: body[key] for key in ("type", "format") if key in body}, body.get("enum", [])
    kinds = [k for k, wanted in _TYPES.items() if wanted == typed and (k == "choice") == ("enum" in body)]
    if not kinds or not isinstance(choices, list):
        supported = "integer, number, boolean, string, and string with format quantity or with a list as enum"
        raise ConfigError(f"{place}: this type is not supported; supported are {supported}")
    plain = {key: body[key] for key in _KEYWORDS - {"type", "format", "enum"} if key in body}
    try:
        return Parameter(name=name, kind=kinds[0], choices=tuple(choices), **plain)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_keywords(schema: object, known: frozenset[str], place: str) -> None:
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{place}: not a JSON schema object")
    for key, value in schema.items():
        if key not in known:
            raise ConfigError(f"{place}.{key}: not supported; supported are {', '.join(sorted(known))}")
        if key in _ANNOTATIONS and not isinstance(value, str):
            raise ConfigError(f"{place}.{key}: must be a text")


def to_schema(params: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the JSON schema that `from_schema` reads the same parameters from."""
    return {"type": "object", "properties": {name: _to_property(param) for name, param in params.items()}}


def _to_property(param: Parameter) -> dict[str, Any]:
    given = {f.name: getattr(param, f.name) for f in fields(param) if getattr(param, f.name) != f.default}
    del given["name"], given["kind"]
    choices = given.pop("choices", ())
    return {**_TYPES[param.kind], **({"enum": list(choices)} if choices else {}), **given}


def from_client(
    params: Mapping[str, Parameter], env: Mapping[str, str], *, launch_timeout_cap: float
) -> dict[str, Value]:
    """Pick the values of opened parameters from the variables of a start request.

    Other ``KERNEL_*`` variables fill nothing; they may go on as plain environment. An empty one counts as not
    given. ``KERNEL_LAUNCH_TIMEOUT`` is always open and yields ``launch_timeout``.

    Args:
        params: Parameters that the kernelspec or the operator opened.
        env: Variables that the client sent.
        launch_timeout_cap: Seconds; a longer launch timeout becomes this.

    Returns:
        Checked values by parameter name; only of those that the client gave.

    Raises:
        ConfigError: A value breaks a rule.
    """
    timeout = Parameter(name="launch_timeout", kind="number")
    opened = {timeout.name: timeout, **params}
    values = {name: p.parse(env[p.variable]) for name, p in opened.items() if env.get(p.variable)}
    if timeout.name in values:
        seconds = float(timeout.check(values[timeout.name]))
        if seconds <= 0:
            raise ConfigError(f"parameter {timeout.name}: {seconds} is not more than 0 seconds")
        values[timeout.name] = min(seconds, launch_timeout_cap)
    return values
