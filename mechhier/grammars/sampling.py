"""Drawing from discrete laws inside compiled loops.

A compiled loop is numba code that runs without the interpreter's lock, so that threads generate blocks side by side. Its
randomness comes from the NumPy generator it is given. Compiled code is cached beside its source file; the cache
notices changes of that file only, so after editing this file delete the ``__pycache__`` folders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from jaxtyping import Float, Int

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function on its first call for the types it is called with; it runs without the interpreter's lock.

    The compiled code is kept for other processes where there is a place for it: beside the source or in the user's
    cache. Where there is none (a read-only installation without a home), or what is there cannot be read or written, it
    is compiled again.
    """
    dispatcher: Any
    try:
        dispatcher = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no place
        dispatcher = numba.njit(nogil=True)(function)
        return dispatcher
    kept = dispatcher._cache
    kept.load_overload, kept.save_overload = _optional(kept.load_overload), _optional(kept.save_overload)
    return dispatcher


def _optional(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception:  # noqa: BLE001  # a full disk; or a file that a cut left half written, which raises anything
            return None

    return call


def alias_table(
    laws: Float[np.ndarray, "*law value"],
) -> tuple[Float[np.ndarray, "*law value"], Int[np.ndarray, "*law value"]]:
    """Return thresholds and aliases of Walker's method, by Vose's construction (1991), for :func:`draw`.

    Args:
        laws: Probabilities; every row sums to one.
    """
    laws = np.ascontiguousarray(laws, dtype=np.float64)
    flat = laws.reshape(-1, laws.shape[-1])
    threshold, alias = np.ones_like(flat), np.zeros(flat.shape, dtype=np.int32)
    _fill_alias_table(flat, threshold, alias)
    return threshold.reshape(laws.shape), alias.reshape(laws.shape)


@compiled
def _fill_alias_table(laws: np.ndarray, threshold: np.ndarray, alias: np.ndarray) -> None:
    n = laws.shape[1]
    small, large = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    for row in range(len(laws)):
        rest = laws[row] * (n / laws[row].sum())
        n_small = n_large = 0
        for i in range(n):
            alias[row, i] = i
            if rest[i] < 1.0:
                small[n_small] = i
                n_small += 1
            else:
                large[n_large] = i
                n_large += 1
        while n_small and n_large:
            n_small -= 1
            i, j = small[n_small], large[n_large - 1]
            threshold[row, i], alias[row, i] = rest[i], j
            rest[j] -= 1.0 - rest[i]
            if rest[j] < 1.0:
                n_large -= 1
                small[n_small] = j
                n_small += 1
        # What is left in either stack differs from 1 by rounding alone.


@compiled
def draw(rng: np.random.Generator, threshold: np.ndarray, alias: np.ndarray) -> int:
    """Draw a value from a law given by its row of an :func:`alias_table`, in constant time."""
    u = rng.random() * len(threshold)
    i = int(u)
    return i if u - i < threshold[i] else alias[i]
