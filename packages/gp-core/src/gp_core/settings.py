"""One way to read an option from the environment."""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

from traitlets import Container, TraitError, TraitType

from .errors import ConfigError

T = TypeVar("T", bound="TraitType[Any, Any]")


@functools.cache
def _env_class(base: type[T]) -> type[T]:
    class FromEnvironment(base):  # type: ignore[valid-type,misc]
        # a class of its own, because traitlets copies the static default of a plain Int or Unicode and never asks
        def default(self, obj: Any = None) -> Any:
            name = self.metadata["env"]
            raw = os.environ.get(name)
            if raw is None or not raw.strip():
                return super().default(obj)
            try:
                if isinstance(self, Container):
                    value = self.from_string_list([item.strip() for item in raw.split(",") if item.strip()])
                else:
                    value = self.from_string(raw)
                return value if obj is None else self._validate(obj, value)
            except (TraitError, ValueError) as error:
                raise ConfigError(f"{name}={raw!r} in the environment: {error}") from None

    FromEnvironment.__name__ = base.__name__  # what --help-all shows
    return FromEnvironment


def from_env(trait: T, name: str) -> T:
    """Let an option take its default from an environment variable.

    The variable is read when an instance needs the value, never at import. Configuration files, the command line
    and kernel.json win over it.

    Args:
        trait: A trait of a `Backend` or another configurable; it becomes configurable.
        name: Of the variable, such as ``GP_IMAGE_NAME``; lists are separated by commas.

    Returns:
        The same trait.
    """
    trait.__class__ = _env_class(type(trait))  # type: ignore[arg-type]  # a class is hashable
    trait.tag(config=True, env=name)
    return trait
