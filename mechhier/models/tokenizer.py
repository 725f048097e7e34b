"""A grammar's vocabulary as a tokenizer that any tool opens."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mechhier.grammars import Grammar


def word_level_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """A tokenizer whose text reads `s12 v3 o7 <eos>`, words separated by blanks.

    A word that is not in the vocabulary becomes `<unk>`, whose id is one beyond the model's embeddings: it fails
    there rather than pass for a word.
    """
    words = {word: index for index, word in enumerate([*grammar.vocabulary, "<unk>"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    eos = grammar.vocabulary[grammar.eos_token_id]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>")
