"""What arguments may be, said in one way everywhere: whole numbers, seeds, names among a few. Imports nothing of ours.

Every function returns the value in its plain form, and refuses in one line that names the argument, what was given, and
what is accepted.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 80


def shown(value: Any) -> str:
    """A value as it stands in an error: in one line, cut where it is long; of an array its shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape:
        return f"a {type(value).__name__} of shape {list(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({type(value).__name__})"


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy; a bool is none."""
    if isinstance(value, bool) or (getattr(value, "dtype", None) is not None and str(value.dtype).endswith("bool")):
        return False
    if getattr(value, "shape", ()) != ():
        return False
    try:
        operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return False
    return True


def whole_number(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """A whole number, as Python's int; NumPy's and `1e3` are accepted, bools are not.

    Raises:
        TypeError: Not a whole number.
        ValueError: Outside of the range.

    Example:
        >>> import numpy as np
        >>> whole_number("seed", np.uint8(3), at_least=0)
        3
    """
    wanted = "a whole number"
    if at_least is not None and at_most is not None:
        wanted += f" in {at_least}..{at_most}"
    elif at_least is not None:
        wanted += f" of at least {at_least}"
    elif at_most is not None:
        wanted += f" of at most {at_most}"
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if not is_whole(value):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    number = operator.index(value)
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def seed_number(value: Any, name: str = "seed") -> int:
    """A seed: a whole number that every generator of random numbers takes.

    Raises:
        TypeError: Not a whole number.
        ValueError: Negative, or 2^63 or more.
    """
    if is_whole(value) and operator.index(value) >= 2**63:
        raise ValueError(f"{name} must be a whole number from 0 to 2^63 - 1, got {operator.index(value)}")
    return whole_number(name, value, at_least=0)


def number(name: str, value: Any, *, low: float, high: float) -> float:
    """A real number in a range, ends included.

    Raises:
        TypeError: Not a number.
        ValueError: Outside of the range, or NaN.
    """
    if isinstance(value, bool | str) or not hasattr(value, "__float__") or getattr(value, "shape", ()) != ():
        raise TypeError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {float(value):g}")
    return float(value)


def one_of(name: str, value: Any, accepted: Iterable[str]) -> str:
    """A name among a few; another one is told the nearest.

    Raises:
        TypeError: Not a string.
        ValueError: None of them.

    Example:
        >>> one_of("ablation", "meen", ["mean", "zero"])
        Traceback (most recent call last):
        ...
        ValueError: ablation must be one of mean, zero, got 'meen' (did you mean 'mean'?)
    """
    known = list(accepted)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {shown(value)}{nearest(value, known)}")
    return value


def nearest(value: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    found = difflib.get_close_matches(value, [str(name) for name in known], n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
