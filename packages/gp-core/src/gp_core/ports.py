"""A range of TCP ports, as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ConfigError

LOWEST, HIGHEST = 1024, 65535


@dataclass(frozen=True)
class PortRange:
    """The ports that a kernel may listen on, both ends included; ``0..0`` means any port.

    Args:
        low: Lowest port, 1024 to 65535, or 0.
        high: Highest port, not below ``low``, or 0.
    """

    low: int = 0
    high: int = 0

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """Read ``low..high``.

        Args:
            text: Such as ``"40000..41999"``; empty and ``"0..0"`` mean any port.

        Raises:
            ConfigError: Not two numbers, out of 1024 to 65535, or reversed.
        """
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*\.\.\s*([0-9]{1,6})\s*", text) if text.strip() else None
        if match is None:
            if text.strip():
                raise ConfigError(f"port_range {text!r} is not LOW..HIGH, such as 40000..41999")
            return cls()
        low, high = int(match[1]), int(match[2])
        if low == high == 0:
            return cls()
        if not LOWEST <= low <= high <= HIGHEST:
            raise ConfigError(f"port_range {text!r} must lie within {LOWEST}..{HIGHEST}, the lower port first")
        return cls(low, high)

    @property
    def is_any(self) -> bool:
        return self.high == 0

    def __contains__(self, port: int) -> bool:
        return 0 < port <= HIGHEST if self.is_any else self.low <= port <= self.high

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"

    def narrowed(self, other: PortRange) -> PortRange:
        """Return the ports that lie in both ranges.

        Raises:
            ConfigError: The ranges have no port in common.
        """
        if self.is_any or other.is_any:
            return other if self.is_any else self
        low, high = max(self.low, other.low), min(self.high, other.high)
        if low > high:
            raise ConfigError(f"port_range {other} has no port in common with the operator's {self}")
        return PortRange(low, high)
