"""Mutated input ends in an error of the package's own, and soon."""

from __future__ import annotations

import pytest
from fuzzing import KINDS, fuzz

CASES = 300
SECONDS = 20  # five on an idle core


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_input_is_accepted_or_refused_cleanly_and_soon(kind):
    ends, faults = fuzz(kind, CASES, seconds=SECONDS)
    assert not faults, "\n".join(f"{what}\n    {str(case)[:500]!r}" for case, what in faults[:5])
    assert sum(ends.values()) == CASES
    assert ends["accepted"] < CASES / 2, "the mutations change nothing"
