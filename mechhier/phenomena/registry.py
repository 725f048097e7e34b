"""The phenomena by name, and what may be asked of each: options are checked before any model is trained or loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import xarray as xr

from mechhier.phenomena.function_vectors import function_vectors
from mechhier.phenomena.hydra import hydra
from mechhier.phenomena.induction import induction
from mechhier.phenomena.published import published
from mechhier.specs import Problem, SpecError, argument_types, check_arguments, no_such_field, shown

PHENOMENA: dict[str, Callable[..., xr.Dataset]] = {
    "induction": induction,
    "function_vectors": function_vectors,
    "hydra": hydra,
    "published": published,
}
"""Every phenomenon by name, as `mechhier.sweep` and specs name them."""

_GIVEN = ("model", "seed")
"""Arguments that a sweep or an experiment supplies itself."""


def check_options(name: str, options: Mapping[str, Any], *, written: bool = False) -> dict[str, Any]:
    """The options of a phenomenon, checked by the names, types and bounds of its signature; no model is needed.

    Args:
        name: One of `PHENOMENA`.
        options: Keyword arguments of the phenomenon, without the model and the seed.
        written: Whether they are written in a spec, which can hold neither arrays nor tasks.

    Returns:
        The options, NumPy's numbers as Python's.

    Raises:
        SpecError: No such phenomenon or option, or a value that is not accepted.

    Example:
        >>> check_options("hydra", {"n_sequences": 1e3})
        {'n_sequences': 1000}
    """
    if not isinstance(name, str) or name not in PHENOMENA:
        raise SpecError.of("", [Problem((str(name),), no_such_field(str(name), PHENOMENA, what="phenomenon"))])
    if not isinstance(options, Mapping):
        raise SpecError.of("", [Problem((name,), f"takes options by name, not {shown(options)}")])
    accepted = [
        option
        for option, checked in argument_types(PHENOMENA[name]).items()
        if option not in _GIVEN and (checked is not None or not written)
    ]
    unknown = [str(option) for option in options if option not in accepted]
    if unknown:
        problems = [Problem((name, option), no_such_field(option, accepted, what="option")) for option in unknown]
        raise SpecError.of("", problems)
    return check_arguments(PHENOMENA[name], options, where=(name,))
