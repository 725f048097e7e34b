"""A grammar's vocabulary as a tokenizer that any tool opens, and the tokenizer of a folder, if it is whole."""

from __future__ import annotations

import fnmatch
import json
import os
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechhier.grammars import Grammar
from mechhier.models.errors import TokenizerError
from mechhier.models.folder import ModelFiles, extra_templates, tokenizer_problem

_VOCABULARIES = ("tokenizer.json", "tokenizer.*.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_TOKENIZERS = (*_VOCABULARIES, "tokenizer_config.json", "merges.txt")
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_LEAST_MERGED = 0.9
"""Of the words of a byte-pair vocabulary: special tokens are not merged, and are few; a file that is cut short makes less."""
_TRIED = 50
"""Words of its own that a tokenizer must be able to read."""
_BYTES, _BYTES_A_WORD = 2**20, 1000
"""Of a file with a vocabulary: those that are published take up to 130 bytes for each of the model's words."""


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


def read_tokenizer(files: ModelFiles, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder; None where there is none, which every probe accepts.

    Args:
        files: The folder.
        vocab_size: Of the model. Special tokens may have numbers beyond it: they fail where they are used.

    Raises:
        TokenizerError: Files of a tokenizer are there but give none, or one of other words than they say or than the model
            has.
        UnreadableFileError: One may not be read by this user.
    """
    names = sorted(os.listdir(files.folder))
    present = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _TOKENIZERS)]
    if not present:
        return None
    # Where there is no vocabulary, transformers invents a tokenizer of a few tokens for gpt2, gpt_neox and olmo.
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _VOCABULARIES):
        raise _no_tokenizer(files, present, "there is no vocabulary")
    beside = [name for name in names if name in _BESIDE] + extra_templates(files)
    problem = tokenizer_problem(files, [*present, *beside], most=_BYTES + _BYTES_A_WORD * vocab_size)
    if problem is not None:
        raise _no_tokenizer(files, present, problem)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
        problem = _wrong_words(files, tokenizer, vocab_size)
        tokenizer(" ".join(sorted(tokenizer.get_vocab())[:_TRIED]))
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise _no_tokenizer(files, present, str(error)[:500]) from None
    if problem is not None:
        raise _no_tokenizer(files, present, problem)
    # TransformerLens reads the folder once more with these, which can be anything: other folders, code to be trusted.
    tokenizer.init_kwargs = {
        "name_or_path": str(files.folder),
        "local_files_only": True,
        "trust_remote_code": False,
    }
    return tokenizer


def _wrong_words(files: ModelFiles, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """What is wrong with the words of a tokenizer, of which a part may have been lost in silence."""
    vocabulary = tokenizer.get_vocab()
    special = {
        *tokenizer.all_special_ids,
        *(index for index, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    words = {word: index for word, index in vocabulary.items() if index not in special}
    if not words:
        return "it has no word"
    beyond = sorted((index, word) for word, index in words.items() if not 0 <= index < vocab_size)
    if beyond:
        return (
            f"it has {len(beyond):,} words that the model has no embedding for, of which the first is {beyond[0][1]!r}, "
            f"number {beyond[0][0]} (the config's vocab_size is {vocab_size})"
        )
    for word, index in _declared(files).items():
        if index not in special and words.get(word, index) != index:
            return f"{word!r} should be number {index}, and is made {words[word]}"
    folder = files.folder
    if "vocab.json" in os.listdir(folder) and (merged := _share_merged(files)) < _LEAST_MERGED:
        return f"merges.txt makes only {merged:.0%} of the words in vocab.json"
    return None


def _declared(files: ModelFiles) -> dict[str, Any]:
    """Added tokens with the numbers that the files give them."""
    declared: dict[str, Any] = {}
    for name in ("added_tokens.json", "tokenizer.json"):
        if (files.folder / name).is_file():
            content = json.loads((files.folder / name).read_text(encoding="utf-8"))
            added = content if name == "added_tokens.json" else content.get("added_tokens", [])
            declared |= added if isinstance(added, dict) else {token["content"]: token["id"] for token in added}
    return declared


def _share_merged(files: ModelFiles) -> float:
    """How much of a byte-pair vocabulary its merges make: text cannot have the rest. 1 where it is in one file."""
    vocabulary, merges = files.folder / "vocab.json", files.folder / "merges.txt"
    if (files.folder / "tokenizer.json").is_file() or not (vocabulary.is_file() and merges.is_file()):
        return 1.0
    made = {line.replace(" ", "") for line in merges.read_text(encoding="utf-8").splitlines()}
    words = [word for word in json.loads(vocabulary.read_text(encoding="utf-8")) if len(word) > 1]
    return sum(word in made for word in words) / len(words) if words else 1.0


def _no_tokenizer(files: ModelFiles, present: list[str], reason: str) -> TokenizerError:
    return TokenizerError(
        f"cannot load {files.what}: it has files of a tokenizer ({', '.join(present)}), which cannot be read: {reason}. "
        f"What to do: {files.repair}. Or do without a tokenizer, with\n"
        f"  load_model(AutoModelForCausalLM.from_pretrained({files.original}))"
    )
