"""TLS over memory buffers, for both ends of the session: many records for one call of the system."""

from __future__ import annotations

import ssl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PIECE = 256 * 1024  # bytes that are taken from the system at a time
RECORD = 16 * 1024  # bytes of a TLS record at most


def room() -> memoryview:
    """Return a buffer that takes what a piece decrypts to, and a record that was unfinished before."""
    return memoryview(bytearray(PIECE + 2 * RECORD))


def decrypt(tls: ssl.SSLObject, buffer: memoryview) -> tuple[int, bool]:
    """Decrypt what has come, as long as there is room for a record.

    Args:
        tls: Its handshake is done.
        buffer: See `room`.

    Returns:
        Bytes in the buffer, and whether the other end has said that there will be no more.

    Raises:
        ssl.SSLError: What has come is no TLS.
    """
    count = 0
    while len(buffer) - count >= RECORD:
        rest = buffer[count:]
        try:
            size: Any = tls.read(len(rest), rest)  # a number, because of the buffer
        except ssl.SSLWantReadError:
            break
        if not size:
            return count, True
        count += size
    return count, False
