"""Formal languages with known structure, and corpora of their text.

Where things are:

- every language: ``base`` (what a grammar can do), ``trees``, ``sampling`` (drawing in compiled loops);
- documents: ``document``, its ``clauses``, ``document_generator``, ``document_predictor``, ``lexicon_inference`` (fresh
  lexicons), ``matched`` (the arms side by side);
- n-grams: ``ngram`` (the paper's), ``fitted_ngram`` (of a corpus);
- context-free grammars: ``pcfg``, its ``rules``, ``notation``, ``derivation``, ``empty``, ``lengths``, ``inference``,
  ``parsing``, ``families``;
- corpora: ``corpus``, ``storage``, ``dealing`` (of documents to splits), ``floor``, ``statistics``, ``preview``.
"""

from mechhier.grammars.base import Grammar, IdealLoss, Sample
from mechhier.grammars.corpus import AnyGrammar, Corpus, CorpusSpec
from mechhier.grammars.document import DocumentGrammar
from mechhier.grammars.families import cfg3, dyck, random_hierarchy
from mechhier.grammars.fitted_ngram import FittedNGram
from mechhier.grammars.matched import matched_arms
from mechhier.grammars.ngram import NGram
from mechhier.grammars.pcfg import PCFG
from mechhier.grammars.rules import Rule
from mechhier.grammars.storage import CorpusError
from mechhier.grammars.trees import Tree

__all__ = [
    "PCFG",
    "AnyGrammar",
    "Corpus",
    "CorpusError",
    "CorpusSpec",
    "DocumentGrammar",
    "FittedNGram",
    "Grammar",
    "IdealLoss",
    "NGram",
    "Rule",
    "Sample",
    "Tree",
    "cfg3",
    "dyck",
    "matched_arms",
    "random_hierarchy",
]
