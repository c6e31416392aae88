"""JSON without importing `json`, which imports `re` and costs 10 ms before the kernel starts.

CPython's own C scanner does the work; wherever it is missing or fails, `json` takes over and gives its own errors.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Context:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo = None


def loads(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON.
    """
    stripped = text.strip(" \t\r\n")
    try:
        from _json import make_scanner

        value, end = make_scanner(_Context)(stripped, 0)  # type: ignore[arg-type]
        if end == len(stripped):
            return value
    except Exception:
        pass
    import json

    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump_flat(values: dict[str, Any]) -> str:
    """Return the JSON text of an object, one line per key."""
    return "{{\n{}\n}}\n".format(",\n".join(f"  {_dump(key)}: {_dump(values[key])}" for key in values))


def _dump(value: Any) -> str:
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if type(value) is int:
        return repr(value)
    if type(value) is str:
        try:
            from _json import encode_basestring_ascii

            return encode_basestring_ascii(value)
        except ImportError:
            pass
    import json

    return json.dumps(value)
