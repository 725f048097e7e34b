"""Text that somebody else may have written, made safe to show."""

from __future__ import annotations

import re

# What a terminal obeys, or reorders text by: all control characters but newline and tab, direction overrides and
# isolates; and halves of surrogate pairs, which no terminal can be sent.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text that does nothing to a terminal: control characters are written out, such as ``\x1b`` and ``\u202e``.

    Example:
        >>> printable("a name\x1b[2J")
        'a name\\x1b[2J'
    """
    return _HARMFUL.sub(lambda found: _escape(ord(found.group())), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
