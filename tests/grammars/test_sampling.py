"""Drawing from laws in compiled loops: the table's own probabilities, and the frequencies of draws."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mechhier.grammars.sampling import alias_table, compiled, draw


@compiled
def draws(rng, threshold, alias, n):
    counts = np.zeros(len(threshold), dtype=np.int64)
    for _ in range(n):
        counts[draw(rng, threshold, alias)] += 1
    return counts


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda weights: sum(weights) > 1e-3))
@settings(deadline=None)
def test_a_table_holds_the_law_it_was_made_from(weights):
    law = np.array(weights) / sum(weights)
    threshold, alias = alias_table(law)
    held = np.zeros(len(law))
    for i in range(len(law)):
        held[i] += threshold[i] / len(law)
        held[alias[i]] += (1 - threshold[i]) / len(law)
    assert held == pytest.approx(law, abs=1e-12)


def test_values_are_drawn_by_their_law_and_an_impossible_one_never():
    law = np.array([0.5, 0.0, 0.25, 0.2, 0.05])
    threshold, alias = alias_table(np.stack([law[::-1], law]))
    counts = draws(np.random.default_rng(0), threshold[1], alias[1], 100_000)
    assert counts[1] == 0
    possible = law > 0
    assert chisquare(counts[possible], law[possible] * 100_000).pvalue > 1e-3


WITHOUT_A_CACHE = """
import sys
import numba.core.caching as caching
{spoil}
from mechhier.grammars.sampling import alias_table, compiled
import os
import subprocess
import sys

import numpy as np
assert alias_table(np.array([[0.25, 0.75]]))[0].tolist() == [[0.5, 1.0]]
"""


@pytest.mark.parametrize(
    "spoil",
    [
        "caching.CacheImpl._locator_classes = []",  # a read-only installation without a home
        "def full(*a, **k): raise OSError(28, 'No space left on device')\ncaching.IndexDataCacheFile.save = full",
        "def cut(*a, **k): raise EOFError('Ran out of input')\ncaching.IndexDataCacheFile.load = cut",
    ],
    ids=["no place", "disk full", "cut short"],
)
def test_compiled_code_needs_no_cache(spoil, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["HOME"] = "/nonexistent"
    if "save" in spoil:  # nothing is kept yet
        environment["NUMBA_CACHE_DIR"] = str(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_CACHE.format(spoil=spoil)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_two_processes_compile_at_once(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_A_CACHE.format(spoil="")]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert list(tmp_path.rglob("*.nbi"))
