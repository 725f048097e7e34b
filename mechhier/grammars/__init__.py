"""Formal languages with known structure, and corpora of their text."""

from mechhier.grammars.base import Grammar, Sample
from mechhier.grammars.corpus import AnyGrammar, Corpus
from mechhier.grammars.document import DocumentGrammar
from mechhier.grammars.ngram import NGram
from mechhier.grammars.storage import CorpusError

__all__ = ["AnyGrammar", "Corpus", "CorpusError", "DocumentGrammar", "Grammar", "NGram", "Sample"]
