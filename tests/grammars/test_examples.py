"""The examples in the docstrings run and print what they say."""

import doctest

import numpy as np
import pytest

from mechhier.grammars import corpus, document, ngram


@pytest.mark.parametrize("module", [corpus, document, ngram])
def test_docstring_examples(module):
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.attempted > 0
    assert result.failed == 0
