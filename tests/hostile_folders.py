"""Model folders that are damaged, hostile or foreign: what is done to which folder, and how `load_model` must answer.

Each entry of `FOLDERS` takes a whole folder of `BASES` and spoils it. `LOADS` means: the model is the whole one, its text
too. Otherwise the class of the error and a pattern of its message, which names the file and the remedy.
"""

from __future__ import annotations

import json
import os
import string
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from mechhier.models import ModelSpec
from mechhier.models.errors import (
    ChangedModelError,
    IncompleteWeightsError,
    ModelLoadError,
    ModelNotFoundError,
    NoSafetensorsError,
    QuantizedWeightsError,
    TokenizerError,
    UnexpectedWeightsError,
    UnreadableFileError,
    UnsupportedModelError,
    WeightShapeError,
)

VOCAB = 320
TEXT = "the river rises in the mountains and runs south through three valleys"
LOADS = "loads"


def _hf(architecture: str) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        spec = ModelSpec(architecture, n_layers=2, d_model=16, n_heads=2, d_mlp=24)
        return spec.build(vocab_size=VOCAB, n_ctx=32, eos_token_id=1, seed=0)


def _byte_level() -> Tokenizer:
    """Pairs of bytes, as GPT-2, Pythia and OLMo have them."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _words() -> Tokenizer:
    """Whole words, as our own models have them."""
    words = ["<s>", "</s>", *sorted(set(TEXT.split())), "<unk>"]
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _save(folder: Path, architecture: str, tokenizer: Tokenizer | None, *, shards: bool = False) -> None:
    _hf(architecture).save_pretrained(folder, max_shard_size="10KB" if shards else "1GB")
    if tokenizer is not None:
        options: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)


def _save_two_files(folder: Path) -> None:
    """A vocabulary and its merges, as GPT-2 was first published."""
    _save(folder, "gpt2", None)
    model = json.loads(_byte_level().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}')


def _save_sentencepiece(folder: Path) -> None:
    """Pieces, as Llama 2 was published: `tokenizer.model` alone."""
    import io

    import sentencepiece

    _save(folder, "llama", None)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, string.ascii_lowercase] * 20),
        model_writer=written,
        vocab_size=60,
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


BASES: dict[str, Callable[[Path], None]] = {
    "llama": lambda folder: _save(folder, "llama", _words()),
    "gpt2": lambda folder: _save(folder, "gpt2", _byte_level()),
    "gpt_neox": lambda folder: _save(folder, "gpt_neox", _byte_level()),
    "olmo": lambda folder: _save(folder, "olmo", _byte_level(), shards=True),
    "olmo2": lambda folder: _save(folder, "olmo2", None),
    "two files": _save_two_files,
    "pieces": _save_sentencepiece,
}


class Spoilt(NamedTuple):
    """A folder of the table."""

    base: str
    spoil: Callable[[Path], object]
    error: type[ModelLoadError] | str
    message: str = ""


FOLDERS: dict[str, Spoilt] = {}


def _add(
    name: str, base: str, spoil: Callable[[Path], object], error: type[ModelLoadError] | str, message: str = ""
) -> None:
    assert name not in FOLDERS, name
    FOLDERS[name] = Spoilt(base, spoil, error, message)


# Ways to spoil one file.


def _deep(opening: str = "[", closing: str = "]") -> bytes:
    return (opening * 100_000 + closing * 100_000).encode()


def _fill(path: Path, size: int) -> None:
    """Blanks, of which the disk holds next to nothing."""
    with path.open("wb") as file:
        file.write(b" " * 4096)
        file.truncate(size)


def _flip(content: bytes, *, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    flipped = bytearray(content)
    for place in torch.randint(len(flipped), (max(8, len(flipped) // 50),), generator=generator).tolist():
        flipped[place] ^= 0xFF
    return bytes(flipped)


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def _loop(path: Path) -> None:
    other = path.with_name("other-" + path.name)
    other.symlink_to(path.name)
    path.symlink_to(other.name)


def _settings(name: str, **settings: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")

    return spoil


def _config(**settings: Any) -> Callable[[Path], object]:
    return _settings("config.json", **settings)


def _with_file(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


_KINDS: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "empty": (lambda content: b"", True),
    "one byte": (lambda content: content[:1], True),
    "cut in half": (lambda content: content[: len(content) // 2], True),
    "bytes flipped": (_flip, True),
    "zeros": (lambda content: bytes(len(content)), True),
    "a list": (lambda content: b"[]", True),
    "a number": (lambda content: b"17", True),
    "null": (lambda content: b"null", True),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), True),
    "Latin-1": (lambda content: content.rstrip()[:-1] + b', "caf\xe9": 1}', True),
    "byte order mark": (lambda content: b"\xef\xbb\xbf" + content, True),
    "nested": (lambda content: content.rstrip()[:-1] + b', "x": ' + _deep() + b"}", True),
    "nested objects": (lambda content: _deep('{"a":', "}")[: 5 * 100_000] + b"1" + b"}" * 100_000, True),
    "a number of 10^5 digits": (lambda content: content.rstrip()[:-1] + b', "x": ' + b"9" * 100_000 + b"}", True),
}
_JSON_FILES = {
    ("llama", "config.json"): UnreadableFileError,
    ("llama", "generation_config.json"): UnreadableFileError,
    ("gpt2", "tokenizer_config.json"): TokenizerError,
    ("gpt_neox", "tokenizer.json"): TokenizerError,
    ("two files", "vocab.json"): TokenizerError,
    ("two files", "special_tokens_map.json"): TokenizerError,
    ("olmo", "model.safetensors.index.json"): IncompleteWeightsError,
}
for (_base, _file), _error in _JSON_FILES.items():
    for _kind, (_change, _) in _KINDS.items():
        _add(f"{_file} {_kind}", _base, _bytes(_file, _change), _error, _file)
_FILES: dict[tuple[str, str], type[ModelLoadError]] = {
    **_JSON_FILES,
    ("two files", "merges.txt"): TokenizerError,
    ("pieces", "tokenizer.model"): TokenizerError,
    ("llama", "model.safetensors"): UnreadableFileError,
}
for (_base, _file), _error in _FILES.items():
    _wrong = UnreadableFileError if _file.endswith((".safetensors", ".index.json")) else _error
    _add(f"{_file} a folder", _base, _instead(_file, Path.mkdir), _wrong, f"{_file} is a folder")
    _add(f"{_file} a pipe", _base, _instead(_file, os.mkfifo), _wrong, f"{_file} is no file")
    _add(f"{_file} a loop of links", _base, _instead(_file, _loop), _wrong, f"{_file} is a link that leads nowhere")
    _add(
        f"{_file} a device",
        _base,
        _instead(_file, lambda path: path.symlink_to("/dev/zero")),
        _wrong,
        f"{_file} is no file",
    )
    if _file != "model.safetensors":
        _add(f"{_file} of 10 GB", _base, _instead(_file, lambda path: _fill(path, 10**10)), _wrong, rf"{_file}.* bytes")
for _kind in ("empty", "one byte", "cut in half", "bytes flipped", "zeros"):
    _change = _KINDS[_kind][0]
    _add(
        f"model.safetensors {_kind}",
        "llama",
        _bytes("model.safetensors", _change),
        IncompleteWeightsError,
        "model.safetensors",
    )
    _add(f"tokenizer.model {_kind}", "pieces", _bytes("tokenizer.model", _change), TokenizerError, "tokenizer.model")
    _add(f"merges.txt {_kind}", "two files", _bytes("merges.txt", _change), TokenizerError, "merges.txt")
_add("merges.txt UTF-16", "two files", _bytes("merges.txt", _KINDS["UTF-16"][0]), TokenizerError, "merges.txt")
for (_base, _file), _error in {
    ("llama", "config.json"): ModelNotFoundError,
    ("llama", "model.safetensors"): NoSafetensorsError,
    ("llama", "tokenizer.json"): TokenizerError,
    ("two files", "vocab.json"): TokenizerError,
    ("two files", "merges.txt"): TokenizerError,
    ("pieces", "tokenizer.model"): TokenizerError,
    ("olmo", "model.safetensors.index.json"): NoSafetensorsError,
}.items():
    _add(f"{_file} of {_base} missing", _base, lambda folder, name=_file: (folder / name).unlink(), _error)
for _file in ("generation_config.json", "tokenizer_config.json"):
    _add(f"{_file} missing", "gpt2", lambda folder, name=_file: (folder / name).unlink(), LOADS)


# A config.

_LLAMA_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
for _name in _LLAMA_NUMBERS:
    for _value in (10**9, 10**30, -1, 0, "16", 2.5, [2], {"a": 1}, True):
        _add(f"{_name}={_value!r}", "llama", _config(**{_name: _value}), ModelLoadError, "config|num_hidden_layers")
for _name in ("n_layer", "n_embd", "n_positions", "n_head", "n_inner"):
    for _value in (10**9, -1, "x", None) if _name != "n_inner" else (10**9, -1, "x"):
        _add(
            f"gpt2 {_name}={_value!r}",
            "gpt2",
            _config(**{_name: _value}),
            ModelLoadError,
            "config|n_layer|num_hidden|logits",
        )
for _name, _value, _error in (
    ("max_position_embeddings", -1, ModelLoadError),
    ("max_position_embeddings", 0, ModelLoadError),
    ("max_position_embeddings", "long", ModelLoadError),
    ("max_position_embeddings", 10**9, LOADS),
    ("rms_norm_eps", "small", ModelLoadError),
    ("rms_norm_eps", float("nan"), ModelLoadError),
    ("rms_norm_eps", float("inf"), ModelLoadError),
    ("hidden_act", "no such function", ModelLoadError),
    ("hidden_act", 7, ModelLoadError),
    ("rope_parameters", {"rope_type": "no such", "rope_theta": 1e4}, ModelLoadError),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, ModelLoadError),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}, ModelLoadError),
    (
        "rope_parameters",
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": []},
        ModelLoadError,
    ),
    ("rope_parameters", "default", ModelLoadError),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, ModelLoadError),
    ("rope_scaling", [1, 2], ModelLoadError),
    ("layer_types", ["full_attention"] * 7, ModelLoadError),
    ("layer_types", ["no such attention"] * 2, ModelLoadError),
    ("layer_types", 3, ModelLoadError),
    ("dtype", "float99", ModelLoadError),
    ("dtype", 17, LOADS),
    ("torch_dtype", "__import__('os').system('x')", LOADS),
    ("id2label", {str(i): "x" * 50 for i in range(100_000)}, ModelLoadError),
    ("id2label", "x", ModelLoadError),
    ("id2label", {"one": "x"}, ModelLoadError),
    ("label2id", [1], LOADS),
    ("num_labels", 10**9, ModelLoadError),
    ("num_labels", -5, LOADS),
    ("num_labels", "many", ModelLoadError),
    ("architectures", ["NoSuchModel"], LOADS),
    ("architectures", "LlamaForCausalLM", LOADS),
    ("architectures", 5, LOADS),
    ("architectures", {"a": 1}, LOADS),
    ("model_type", "no_such_model", UnsupportedModelError),
    ("model_type", 5, ModelLoadError),
    ("model_type", ["llama"], ModelLoadError),
    ("model_type", "\x1b]0;owned\x07\x1b[2J\u202ex", UnsupportedModelError),
    ("model_type", "../../etc/passwd", UnsupportedModelError),
    ("auto_map", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, LOADS),
    ("auto_map", {"AutoConfig": "owner/name--code.Config"}, LOADS),
    ("auto_map", 3, ModelLoadError),
    ("trust_remote_code", True, LOADS),
    ("quantization_config", {"quant_method": "gptq"}, QuantizedWeightsError),
    ("quantization_config", "gptq", QuantizedWeightsError),
    ("quantization_config", {"quant_method": "\x1b[31m"}, QuantizedWeightsError),
    ("attn_implementation", "owner/name", LOADS),
    ("attn_implementation", "owner/name@main:function", LOADS),
    ("attn_implementation", "paged|owner/name", LOADS),
    ("_attn_implementation", "owner/name", LOADS),
    ("_attn_implementation_internal", "owner/name", LOADS),
    ("attn_implementation", {"": "owner/name"}, LOADS),
    ("attn_implementation", ["owner/name"], ModelLoadError),
    ("attn_implementation", 3, ModelLoadError),
    ("attn_implementation", "\x1b[2J", UnsupportedModelError),
    ("experts_implementation", "owner/name", LOADS),
    ("experts_implementation", {"": "owner/name"}, LOADS),
    ("_experts_implementation_internal", "sonicmoe", LOADS),
    ("use_kernels", True, LOADS),
    ("kernel_config", {"a": "owner/name"}, LOADS),
    ("transformers_weights", "../../elsewhere.safetensors", UnsupportedModelError),
    ("transformers_version", "4.999\x1b[2J", LOADS),
    ("transformers_version", 7, LOADS),
    ("_name_or_path", "../../elsewhere", LOADS),
    ("_commit_hash", "x" * 40, LOADS),
    ("tie_word_embeddings", True, LOADS),
    ("tie_word_embeddings", "no", ModelLoadError),
    ("attention_bias", True, IncompleteWeightsError),
    ("is_encoder_decoder", True, LOADS),
    ("pad_token_id", 10**9, ModelLoadError),
    ("pad_token_id", -5, LOADS),
    ("eos_token_id", "x", ModelLoadError),
    ("bos_token_id", 10**18, LOADS),
    ("tokenizer_class", "NoSuchTokenizer", LOADS),
    ("tokenizer_class", 5, LOADS),
    ("sub_configs", {"text_config": 3}, ModelLoadError),
    ("text_config", {"model_type": "llama", "num_hidden_layers": 10**9}, ModelLoadError),
    ("save_pretrained", 3, LOADS),
    ("to_dict", "x", ModelLoadError),
    ("__class__", "x", ModelLoadError),
    ("__dict__", {}, ModelLoadError),
    ("_from_auto", [], LOADS),
):
    _add(f"config {_name}={str(_value)[:40]!r}", "llama", _config(**{_name: _value}), _error)
_add("a config of one layer", "gpt_neox", _config(num_hidden_layers=1), UnexpectedWeightsError, r"layers\.1\.")
_add("a config of three layers", "olmo", _config(num_hidden_layers=3), IncompleteWeightsError, r"layers\.2\.")
_add("a config of another width", "olmo2", _config(hidden_size=32), WeightShapeError, "config")
_add("a config of another architecture", "olmo2", _config(model_type="llama"), ModelLoadError)
_add("a config of an encoder", "olmo2", _config(model_type="bert"), IncompleteWeightsError, "bert")
_add(
    "a config of a family without layers", "olmo2", _config(model_type="mamba", num_hidden_layers=10**9), ModelLoadError
)
_add(
    "a config of experts from a hub",
    "olmo2",
    _config(model_type="mixtral", experts_implementation="owner/name", attn_implementation="owner/name"),
    ModelLoadError,
)
_add(
    "a config with parts that name kernels",
    "olmo2",
    _config(model_type="llama4", text_config={"model_type": "llama4_text", "attn_implementation": "owner/name"}),
    ModelLoadError,
)
_add("a config without a model type", "llama", _with_file("config.json", '{"vocab_size": 320}'), UnsupportedModelError)
_add("an empty config", "llama", _with_file("config.json", "{}"), UnsupportedModelError)
_add(
    "a setting given twice",
    "llama",
    _bytes("config.json", lambda content: content.rstrip()[:-1] + b', "num_hidden_layers": 1}'),
    UnexpectedWeightsError,
)
_add(
    "10^6 settings",
    "llama",
    _bytes(
        "config.json", lambda content: content.rstrip()[:-1] + b"".join(b',"%d":0' % i for i in range(10**6)) + b"}"
    ),
    UnreadableFileError,
    "config.json",
)
_add(
    "10^5 settings",
    "llama",
    _bytes(
        "config.json", lambda content: content.rstrip()[:-1] + b"".join(b',"s%d":0' % i for i in range(10**5)) + b"}"
    ),
    UnreadableFileError,
    "config.json",
)
_add("repository code beside it", "llama", _with_file("code.py", "raise SystemExit('code ran')"), LOADS)
_add(
    "an adapter",
    "llama",
    _with_file("adapter_config.json", '{"peft_type": "LORA"}'),
    ChangedModelError,
    "adapter_config",
)
_add(
    "an adapter that is a pipe",
    "llama",
    _instead("adapter_config.json", os.mkfifo),
    ChangedModelError,
    "adapter_config",
)
_add("an adapter's weights", "llama", _with_file("adapter_model.safetensors", "x"), LOADS)


# Weights.


def _header(header: dict[str, Any] | bytes, data: bytes = b"") -> Callable[[Path], object]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _with_file("model.safetensors", struct.pack("<Q", len(text)) + text + data)


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        save_file(change(stored), folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _edited_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        size = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:size])
        change(header)
        _header(header, content[size:])(folder)

    return spoil


def _many(n: int) -> bytes:
    return b"{" + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(n)) + b"}"


_NORM = "model.norm.weight"
_add(
    "a header of 10^6 weights",
    "llama",
    lambda folder: _header(_many(10**6))(folder),
    UnreadableFileError,
    r"model\.safetensors",
)
_add(
    "a header of 10^5 weights",
    "llama",
    lambda folder: _header(_many(10**5))(folder),
    UnreadableFileError,
    r"model\.safetensors",
)
_add("a header of 10^4 weights", "llama", lambda folder: _header(_many(10**4))(folder), ModelLoadError)
_add(
    "a header of 100 MB",
    "llama",
    lambda folder: _header(b"{" + b" " * 99_999_998 + b"}")(folder),
    UnreadableFileError,
    r"model\.safetensors",
)
_add(
    "a header that announces 2^63 bytes",
    "llama",
    _with_file("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    IncompleteWeightsError,
    r"model\.safetensors",
)
_add(
    "a header that is nested",
    "llama",
    _header(_deep('{"a":', "}")[:500_000] + b"1" + b"}" * 100_000),
    IncompleteWeightsError,
    r"model\.safetensors",
)
_add("a header that is a list", "llama", _header(b"[]"), IncompleteWeightsError, r"model\.safetensors")
_add(
    "a header with escape sequences",
    "llama",
    _header(b'{"\x1b[2J": \x1b[31m}'),
    IncompleteWeightsError,
    r"model\.safetensors",
)
_add("no weight in the file", "llama", _header({}), IncompleteWeightsError, "no weights for")
for _name, _edit in {
    "an offset that is negative": {"data_offsets": [-64, 0]},
    "an offset beyond the file": {"data_offsets": [10**12, 10**12 + 64]},
    "offsets the wrong way round": {"data_offsets": [64, 0]},
    "weights that overlap": {"data_offsets": [0, 64]},
    "a shape that is negative": {"shape": [-16]},
    "a shape of more than there is": {"shape": [10**18]},
    "a shape whose size overflows": {"shape": [2**63, 2**63]},
    "a shape of text": {"shape": "16"},
    "a dtype that does not exist": {"dtype": "F33"},
    "a dtype of another kind": {"dtype": 5},
}.items():
    _add(
        _name,
        "llama",
        _edited_header(lambda header, edit=_edit: header[_NORM].update(edit)),
        IncompleteWeightsError,
        r"model\.safetensors",
    )
_add(
    "weights named as files elsewhere",
    "llama",
    _weights(lambda stored: stored | {"../../x": torch.zeros(1), "/etc/passwd": torch.zeros(1)}),
    UnexpectedWeightsError,
    r"\.\./\.\./x",
)
_add(
    "weights named with escape sequences",
    "llama",
    _weights(lambda stored: stored | {"\x1b[2J\x9b31m\u202e": torch.zeros(1)}),
    UnexpectedWeightsError,
    r"x1b\[2J",
)
_add(
    "a weight of no size", "llama", _weights(lambda stored: stored | {_NORM: torch.zeros(0)}), WeightShapeError, "norm"
)
_add(
    "a weight of no dimension",
    "llama",
    _weights(lambda stored: stored | {_NORM: torch.tensor(1.0)}),
    WeightShapeError,
    "norm",
)
_add(
    "a weight of complex numbers",
    "llama",
    _weights(lambda stored: stored | {_NORM: stored[_NORM].to(torch.complex64)}),
    QuantizedWeightsError,
    "norm",
)
_add(
    "a weight of bytes",
    "llama",
    _weights(lambda stored: stored | {_NORM: stored[_NORM].to(torch.int8)}),
    QuantizedWeightsError,
    "norm",
)
_add(
    "weights that are not numbers",
    "llama",
    _weights(lambda stored: {name: weight * float("nan") for name, weight in stored.items()}),
    UnsupportedModelError,
    "finite",
)
_add(
    "weights that are infinite",
    "llama",
    _weights(lambda stored: {name: weight * float("inf") for name, weight in stored.items()}),
    UnsupportedModelError,
    "finite",
)
_add(
    "a weight of another file's name",
    "llama",
    lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
    NoSafetensorsError,
    "safetensors",
)
_add("pickled weights beside them", "llama", _with_file("pytorch_model.bin", b"\x80\x04cos\nsystem\n."), LOADS)
_add("a second file of weights", "llama", _with_file("model-00001-of-00001.safetensors", b"x"), LOADS)
_add("an index beside one file", "llama", _with_file("model.safetensors.index.json", b"["), LOADS)


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return spoil


def _outside(folder: Path) -> None:
    """A shard that lies beside the folder, whole, and is named with the way there."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(folder.parent / "elsewhere.safetensors")
    _index(lambda index: _rename(index, shard.name, "../elsewhere.safetensors"))(folder)


def _outside_absolute(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(folder.parent / "elsewhere.safetensors")
    _index(lambda index: _rename(index, shard.name, str(folder.parent / "elsewhere.safetensors")))(folder)


def _rename(index: dict[str, Any], old: str, new: Any) -> None:
    index["weight_map"] = {name: new if file == old else file for name, file in index["weight_map"].items()}


def _every(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index.update(weight_map={name: value for name in index["weight_map"]})


def _one_shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(sorted(folder.glob("*.safetensors"))[1])


def _same_weight_twice(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, weight = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: weight + 1}, second, metadata={"format": "pt"})


_INDEX = r"model\.safetensors\.index\.json"
_add("a shard outside of the folder", "olmo", _outside, IncompleteWeightsError, _INDEX)
_add("a shard by its whole path", "olmo", _outside_absolute, IncompleteWeightsError, _INDEX)
_add("shards in a way of Windows", "olmo", _index(_every("..\\x.safetensors")), IncompleteWeightsError, _INDEX)
_add("shards of the upper folder", "olmo", _index(_every("..")), IncompleteWeightsError, _INDEX)
_add("shards without a name", "olmo", _index(_every("")), IncompleteWeightsError, _INDEX)
_add("shards that are numbers", "olmo", _index(_every(3)), IncompleteWeightsError, _INDEX)
_add("shards that are lists", "olmo", _index(_every(["a"])), IncompleteWeightsError, _INDEX)
_add("shards that are null", "olmo", _index(_every(None)), IncompleteWeightsError, _INDEX)
_add("shards of pickles", "olmo", _index(_every("pytorch_model.bin")), IncompleteWeightsError, _INDEX)
_add("shards with a zero byte", "olmo", _index(_every("a\0.safetensors")), IncompleteWeightsError, _INDEX)
_add("shards with a long name", "olmo", _index(_every("x" * 10_000 + ".safetensors")), IncompleteWeightsError, _INDEX)
_add("shards with escape sequences", "olmo", _index(_every("\x1b[2J.safetensors")), IncompleteWeightsError, _INDEX)
_add("no shards", "olmo", _index(lambda index: index.update(weight_map={})), IncompleteWeightsError, _INDEX)
_add("shards as a list", "olmo", _index(lambda index: index.update(weight_map=["a"])), IncompleteWeightsError, _INDEX)
_add("an index without shards", "olmo", _index(lambda index: index.pop("weight_map")), IncompleteWeightsError, _INDEX)
_add(
    "an index of 10^6 shards",
    "olmo",
    _with_file(
        "model.safetensors.index.json",
        b'{"weight_map": {' + b",".join(b'"w%d":"%d.safetensors"' % (i, i) for i in range(200_000)) + b"}}",
    ),
    IncompleteWeightsError,
    r"200,000",
)
_add(
    "an index that leaves out a shard",
    "olmo",
    _index(
        lambda index: _rename(
            index, sorted(set(index["weight_map"].values()))[0], sorted(set(index["weight_map"].values()))[1]
        )
    ),
    IncompleteWeightsError,
    "no weights for",
)
_add("a shard missing", "olmo", _one_shard(Path.unlink), IncompleteWeightsError, "not there")
_add(
    "a shard cut in half",
    "olmo",
    _one_shard(lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
    IncompleteWeightsError,
    "damaged: model-00002",
)
_add(
    "a shard that is a folder",
    "olmo",
    _one_shard(lambda path: (path.unlink(), path.mkdir())),
    UnreadableFileError,
    "model-00002.* is a folder",
)
_add(
    "a shard that is a pipe",
    "olmo",
    _one_shard(lambda path: (path.unlink(), os.mkfifo(path))),
    UnreadableFileError,
    "model-00002.* is no file",
)
_add(
    "a shard that is a loop",
    "olmo",
    _one_shard(lambda path: (path.unlink(), _loop(path))),
    IncompleteWeightsError,
    "model-00002",
)
_add("a weight in two shards", "olmo", _same_weight_twice, IncompleteWeightsError, "model-00001.* and .*model-00002")


# A tokenizer.


def _tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        description = json.loads(path.read_text(encoding="utf-8"))
        change(description)
        path.write_text(json.dumps(description), encoding="utf-8")

    return spoil


def _token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": index, "content": content, "special": special, **flags}


def _vocabulary(words: dict[str, int]) -> Callable[[dict[str, Any]], object]:
    return lambda description: description["model"]["vocab"].update(words)


_DOUBLING = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}] * 12,
}
_add(
    "a vocabulary of 10^7",
    "llama",
    _instead("tokenizer.json", lambda path: _fill(path, 3 * 10**8)),
    TokenizerError,
    r"tokenizer\.json",
)
_add(
    "a vocabulary of 10^5 for a model of 320",
    "llama",
    _tokenizer(_vocabulary({f"w{i}": 100 + i for i in range(10**5)})),
    TokenizerError,
    r"tokenizer\.json|320",
)
_add(
    "a vocabulary beyond the model's",
    "llama",
    _tokenizer(_vocabulary({"more": 320, "still": 321})),
    TokenizerError,
    "320",
)
_add("words with negative numbers", "llama", _tokenizer(_vocabulary({"more": -1})), TokenizerError)
_add("words with huge numbers", "llama", _tokenizer(_vocabulary({"more": 2**40})), TokenizerError)
_add("words with numbers of text", "llama", _tokenizer(_vocabulary({"more": "x"})), TokenizerError)
_add("a vocabulary that is a list", "llama", _tokenizer(lambda it: it["model"].update(vocab=[1])), TokenizerError)
_add("no vocabulary", "gpt2", _tokenizer(lambda it: it["model"].update(vocab={}, merges=[])), TokenizerError)
_add(
    "merges of words that are not there",
    "gpt2",
    _tokenizer(lambda it: it["model"]["merges"].append(["xyz", "abc"])),
    TokenizerError,
)
_add("a tokenizer without its model", "gpt2", _tokenizer(lambda it: it.pop("model")), TokenizerError)
_add("a tokenizer of no kind", "gpt2", _tokenizer(lambda it: it["model"].update(type="Evil")), TokenizerError)
_add("a tokenizer without added tokens", "gpt2", _tokenizer(lambda it: it.pop("added_tokens")), TokenizerError)
_add(
    "added tokens beyond the model's",
    "gpt2",
    _tokenizer(lambda it: it["added_tokens"].append(_token(500, "river", special=False))),
    TokenizerError,
    "'river'",
)
_add(
    "a special token beyond the model's",
    "gpt2",
    _tokenizer(lambda it: it["added_tokens"].append(_token(300, "<pad>", special=True))),
    LOADS,
)
_add(
    "added tokens without a number",
    "gpt2",
    _tokenizer(lambda it: it["added_tokens"].append({"content": "x"})),
    TokenizerError,
)
_add(
    "10^4 added tokens",
    "gpt2",
    _tokenizer(lambda it: it["added_tokens"].extend(_token(300 + i, f"<{i}>", special=False) for i in range(10**4))),
    TokenizerError,
)
_add(
    "padding to 10^9",
    "gpt2",
    _tokenizer(
        lambda it: it.update(
            padding={
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            }
        )
    ),
    LOADS,
)
_add(
    "cutting to no tokens",
    "gpt2",
    _tokenizer(
        lambda it: it.update(
            truncation={"max_length": 0, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
        )
    ),
    LOADS,
)
_add(
    "a normalizer that explodes",
    "gpt2",
    _tokenizer(lambda it: it.update(normalizer=_DOUBLING)),
    TokenizerError,
    r"tokenizer\.json",
)
_add(
    "a normalizer that is no expression",
    "gpt2",
    _tokenizer(lambda it: it.update(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""})),
    TokenizerError,
)
_add(
    "a template of tokens that are not there",
    "gpt2",
    _tokenizer(
        lambda it: it.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        )
    ),
    TokenizerError,
)
for _name, _value, _error in (
    ("tokenizer_class", "NoSuchTokenizer", LOADS),
    ("tokenizer_class", "MistralCommonBackend", ModelLoadError),
    ("tokenizer_class", 5, TokenizerError),
    ("tokenizer_class", ["a"], TokenizerError),
    ("auto_map", {"AutoTokenizer": ["code.Evil", None]}, LOADS),
    ("auto_map", {"AutoTokenizer": [None, "owner/name--code.Evil"]}, LOADS),
    ("auto_map", 7, TokenizerError),
    ("trust_remote_code", True, LOADS),
    ("chat_template", "{% for x in range(10**10) %}{% endfor %}", LOADS),
    ("chat_template", "{{ ''.__class__.__mro__ }}", LOADS),
    ("chat_template", 5, LOADS),
    ("model_max_length", -1, LOADS),
    ("model_max_length", "x", TokenizerError),
    ("model_max_length", 1e400, LOADS),
    ("bos_token", 5, TokenizerError),
    ("bos_token", ["<s>"], TokenizerError),
    ("bos_token", "no such token", LOADS),
    ("bos_token", {"content": 5}, TokenizerError),
    ("extra_special_tokens", {"a": 1}, TokenizerError),
    ("extra_special_tokens", [f"<{i}>" for i in range(2000)], LOADS),
    ("extra_special_tokens", 5, TokenizerError),
    ("added_tokens_decoder", {"x": {"content": "y"}}, TokenizerError),
    ("added_tokens_decoder", {"3": 4}, TokenizerError),
    ("added_tokens_decoder", {str(i): {"content": f"<{i}>", "special": True} for i in range(300, 5000)}, LOADS),
    ("added_tokens_decoder", 5, TokenizerError),
    ("tokenizer_file", "/etc/passwd", LOADS),
    ("vocab_file", "/etc/passwd", LOADS),
    ("vocab", {"a": 0}, LOADS),
    ("merges", 5, LOADS),
    ("gguf_file", "../../x.gguf", LOADS),
    ("subfolder", "../..", LOADS),
    ("name_or_path", "owner/name", LOADS),
    ("config", {"model_type": "bert"}, LOADS),
    ("tokenizer_type", "bert", LOADS),
    ("mistral_format", True, LOADS),
    ("revision", "main", LOADS),
    ("force_download", True, LOADS),
    ("local_files_only", False, LOADS),
    ("fast_tokenizer_files", ["tokenizer.../../x.json"], TokenizerError),
    ("fast_tokenizer_files", 5, TokenizerError),
    ("padding_side", "up", TokenizerError),
    ("truncation_side", 5, TokenizerError),
    ("add_bos_token", "yes", LOADS),
    ("post_processor", {"a": 1}, TokenizerError),
    ("tokenizer_object", "x", TokenizerError),
    ("backend", 5, LOADS),
    ("init_inputs", [1, 2, 3], LOADS),
    ("self", 1, TokenizerError),
    ("cls", 1, TokenizerError),
):
    _add(
        f"tokenizer_config {_name}={str(_value)[:40]!r}",
        "gpt2",
        _settings("tokenizer_config.json", **{_name: _value}),
        _error,
    )


def _code(folder: Path) -> None:
    """Code of a tokenizer's own, with all words said that let it run."""
    (folder / "code.py").write_text("raise SystemExit('code ran')")
    code = {"AutoTokenizer": ["code.Evil", "code.Evil"]}
    _settings("tokenizer_config.json", auto_map=code, trust_remote_code=True)(folder)


_add("a tokenizer with code that asks to be trusted", "gpt2", _code, LOADS)
_add(
    "a template in a file of 10 GB",
    "gpt2",
    _instead("chat_template.jinja", lambda path: _fill(path, 10**10)),
    TokenizerError,
    r"chat_template\.jinja",
)
_add(
    "a template that is a pipe",
    "gpt2",
    _instead("chat_template.jinja", os.mkfifo),
    TokenizerError,
    r"chat_template\.jinja",
)
_add(
    "added tokens in a file of their own, damaged",
    "two files",
    _with_file("added_tokens.json", "{"),
    TokenizerError,
    r"added_tokens\.json",
)
_add(
    "added tokens in a file of their own, beyond",
    "two files",
    _with_file("added_tokens.json", '{"river": 100000}'),
    TokenizerError,
)
for _name, _value, _error in (
    ("max_length", "x", LOADS),
    ("eos_token_id", [10**30], LOADS),
    ("temperature", -1, LOADS),
    ("no_such\x1b[2J", 3, LOADS),
    ("transformers_version", 3, LOADS),
    ("cache_implementation", "evil", ModelLoadError),
    ("custom_generate", "owner/name", LOADS),
    ("watermarking_config", 5, ModelLoadError),
    ("compile_config", {"a": 1}, ModelLoadError),
):
    _add(
        f"generation_config {_name}={_value!r}", "olmo2", _settings("generation_config.json", **{_name: _value}), _error
    )
