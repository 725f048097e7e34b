"""What the document language's generator and predictor agree on: the categories and the length of a clause."""

SUBJECT, VERB, OBJECT, CONNECTOR, EOS = range(5)
"""Category ids of the document language."""

TOKENS_PER_CLAUSE = 4
"""Three words and a terminator: a connector, or ``<eos>`` at the end of a sentence."""
