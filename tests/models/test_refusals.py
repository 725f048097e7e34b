"""What can be known to be wrong before a weight is used is refused by name, in files and in memory."""

import json
import string
from functools import partial

import pytest
import torch
import transformers
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import attach_align_device_hook
from accelerate.state import AcceleratorState
from random_models import ARCHITECTURES, CLASSES, HAS_HOOKED_TRANSFORMER, random_hf, random_tokens
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, modeling_utils

from mechhier.models import ModelSpec, load_model
from mechhier.models.errors import (
    ChangedModelError,
    IncompleteWeightsError,
    ModelLoadError,
    QuantizedWeightsError,
    TokenizerError,
    UnexpectedWeightsError,
    UnsupportedModelError,
    WeightShapeError,
    WrongDtypeError,
)
from mechhier.models.hooked import Hooked
from mechhier.models.loading import bos_token_id
from mechhier.phenomena import induction
from mechhier.phenomena._tokens import natural_tokens, random_repeats, token_frequencies

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
LAYERS = {"gpt2": "n_layer"}


@pytest.fixture
def save(tmp_path):
    """Save a random model, with changes to its config and its weights."""

    def save(architecture, *, weights=lambda stored: stored, **settings):
        random_hf(architecture).save_pretrained(tmp_path / architecture)
        stored = load_file(tmp_path / architecture / "model.safetensors")
        save_file(weights(stored), tmp_path / architecture / "model.safetensors", metadata={"format": "pt"})
        rewrite(tmp_path / architecture / "config.json", **settings)
        return tmp_path / architecture

    return save


def rewrite(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def unread(monkeypatch):
    """No weights may be read."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


# A config against the weights beside it.


@EVERY
@pytest.mark.usefixtures("unread")
def test_a_config_of_fewer_layers_would_load_a_part_of_the_model(architecture, save):
    with pytest.raises(UnexpectedWeightsError, match=r"does not ask for: \['\w+\.(layers|h)\.2\.\w+.* and \d more\]"):
        load_model(save(architecture, **{LAYERS.get(architecture, "num_hidden_layers"): 2}))


@EVERY
@pytest.mark.usefixtures("unread")
def test_weights_of_the_last_layer_that_are_not_there_are_named(architecture, save):
    with pytest.raises(IncompleteWeightsError, match=r"no weights for \['\w+\.(layers|h)\.3\.\w+.*copy or download"):
        load_model(save(architecture, **{LAYERS.get(architecture, "num_hidden_layers"): 4}))


@EVERY
@pytest.mark.usefixtures("unread")
def test_a_shape_that_differs_is_named_with_both_shapes(architecture, save):
    with pytest.raises(
        WeightShapeError, match=r"(embed_tokens|wte|embed_in)\.weight is \[50, 64\] in .* \[70, 64\] by"
    ):
        load_model(save(architecture, vocab_size=70))


@pytest.mark.usefixtures("unread")
def test_a_config_in_the_words_of_another_program_is_not_filled_with_its_defaults(save):
    """Of OLMo's first release: transformers knows none of its sizes, and would make a model of 7 billion weights."""
    folder = save("olmo")
    sizes = {"d_model": 64, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 192, "max_sequence_length": 48}
    (folder / "config.json").write_text(json.dumps({"model_type": "olmo", "vocab_size": 50, **sizes}))
    with pytest.raises(WeightShapeError) as error:
        load_model(folder)
    assert "model.embed_tokens.weight is [50, 64] in the files and [50, 4096] by the config" in str(error.value)
    assert "settings that 'olmo' in transformers does not: d_model, max_sequence_length, mlp_hidden_size" in str(
        error.value
    )
    assert "named -hf" in str(error.value)
    assert "it has no weights for ['model.layers.10." in str(error.value)


@pytest.mark.parametrize("layers", [2_000, 10**9, 10**18])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.usefixtures("unread")
def test_a_count_of_layers_beyond_all_measure_ends_at_once(architecture, layers, save):
    with pytest.raises(IncompleteWeightsError, match=f"layers?={layers:,}|num_hidden_layers={layers}"):
        load_model(save(architecture, **{LAYERS.get(architecture, "num_hidden_layers"): layers}))


@pytest.mark.parametrize("settings", [{"hidden_size": 0}, {"num_attention_heads": 0}, {"hidden_size": 10**12}])
@pytest.mark.usefixtures("unread")
def test_a_config_with_which_no_model_can_be_made_is_an_error_of_ours(settings, save):
    with pytest.raises(ModelLoadError, match="llama"):
        load_model(save("llama", **settings))


def test_a_renamed_weight_is_missing_and_unexpected(save):
    def renamed(stored):
        return {name.replace("layers.1.mlp.up_proj", "layers.1.mlp.w3"): weight for name, weight in stored.items()}

    with pytest.raises(
        IncompleteWeightsError, match=r"no weights for \['model.layers.1.mlp.up_proj.weight'\]; .*1\.mlp\.w3"
    ):
        load_model(save("llama", weights=renamed))


def test_the_way_out_of_weights_too_many_works(save, tmp_path):
    """A head of another kind beside the model's own: writing the model once leaves it out."""
    folder = save("llama", weights=lambda stored: stored | {"v_head.summary.weight": torch.zeros(1, 64)})
    with pytest.raises(UnexpectedWeightsError, match=r"\['v_head\.summary\.weight'\]") as error:
        load_model(folder)
    command = next(line for line in str(error.value).splitlines() if line.startswith("  "))
    eval(command.replace("FOLDER", repr(str(tmp_path / "clean"))))
    assert_same(load_model(tmp_path / "clean"), random_hf("llama"))


def assert_same(hooked, hf):
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


EXTRAS = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "llama-gqa": {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "olmo": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "olmo2": {"model.rotary_emb.inv_freq": torch.ones(8)},
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 48, 48).tril().byte(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": ...,
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 48, 48).tril().bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(8),
    },
    "gpt_neox-sequential": {"gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 48, 48).tril().byte()},
}


@EVERY
def test_masks_and_tables_that_old_files_hold_are_accepted(architecture, save):
    def with_extras(stored):
        tied = {"lm_head.weight": stored["transformer.wte.weight"].clone()} if architecture == "gpt2" else {}
        return stored | EXTRAS[architecture] | tied

    assert_same(load_model(save(architecture, weights=with_extras)), random_hf(architecture))


@pytest.mark.parametrize("architecture", ["llama-tied", "olmo-tied", "olmo2-tied", "gpt2", "gpt_neox-tied"])
def test_the_files_of_a_model_without_its_head_load_where_the_head_is_the_embedding(architecture, tmp_path):
    """As `AutoModel` saves it: without the name of the base model before every weight."""
    hf = random_hf(architecture)
    hf.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(hf.base_model_prefix) for name in load_file(tmp_path / "model.safetensors"))
    assert_same(load_model(tmp_path), hf)


def test_the_files_of_a_model_without_its_head_are_refused_where_the_head_is_its_own(tmp_path):
    random_hf("llama").base_model.save_pretrained(tmp_path)
    with pytest.raises(IncompleteWeightsError, match=r"no weights for \['lm_head\.weight'\]"):
        load_model(tmp_path)


@EVERY
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors"])
@pytest.mark.usefixtures("unread")
def test_a_quantised_config_is_refused_by_its_method(architecture, method, save):
    with pytest.raises(QuantizedWeightsError, match=rf"quantization_config in config.json \(method {method}\)"):
        load_model(save(architecture, quantization_config={"quant_method": method, "bits": 4}))


@EVERY
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
@pytest.mark.usefixtures("unread")
def test_quantised_weights_are_refused_whatever_the_config_says(architecture, dtype, save):
    def quantised(stored):
        name = max(name for name in stored if ".1." in name and stored[name].ndim == 2)
        return stored | {name: stored[name].to(dtype)}

    with pytest.raises(QuantizedWeightsError, match=rf"\.1\..*{dtype}(?s:.*)What to do"):
        load_model(save(architecture, weights=quantised))


def test_weights_of_which_two_are_packed_into_a_byte_are_refused(save):
    folder = save("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(QuantizedWeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(F4\)"):
        load_model(folder)


@EVERY
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn2", "flex_attention"])
def test_attention_that_a_config_leaves_to_others_is_computed_in_the_plain_way(
    architecture, kind, implementation, save, monkeypatch
):
    """With the package that fetches kernels at hand, as transformers would see it."""
    folder, expected = save(architecture, attn_implementation=implementation), random_hf(architecture)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("fetched"))
    assert_same(load_model(folder, as_=kind), expected)
    if implementation != "flex_attention":
        with pytest.raises(pytest.fail.Exception, match="fetched"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_attention_of_a_name_that_transformers_does_not_have_is_refused(save):
    with pytest.raises(UnsupportedModelError, match="attention is computed by 'my_attention'"):
        load_model(save("llama", attn_implementation="my_attention"))


def test_a_config_that_names_other_files_is_refused(save):
    with pytest.raises(UnsupportedModelError, match=r"transformers_weights='other\.safetensors'"):
        load_model(save("llama", transformers_weights="other.safetensors"))


@pytest.mark.parametrize("beside_a_model", [True, False])
@pytest.mark.usefixtures("unread")
def test_a_folder_with_an_adapter_is_refused(beside_a_model, save):
    folder = save("llama")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    if not beside_a_model:
        (folder / "config.json").unlink()
    with pytest.raises(ChangedModelError, match=r"adapter_config\.json(?s:.*)merge_and_unload\(\)"):
        load_model(folder)


# A model in memory.


class Lora(torch.nn.Module):
    """What peft puts in the place of a linear map."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.weight = base, base.weight

    def forward(self, x):
        return self.base_layer(x) + 1


Lora.__module__ = "peft.tuners.lora.layer"


def last_mlp(hf):
    return next(module for name, module in reversed([*hf.named_modules()]) if name.endswith(".mlp"))


def last_linear(hf):
    return [module for module in last_mlp(hf).modules() if hasattr(module, "weight")][-1]


def adapted(hf):
    mlp = last_mlp(hf)
    name, base = next(iter(mlp.named_children()))
    setattr(mlp, name, Lora(base))


def hooked_with_partial(hf):
    last_mlp(hf).register_forward_hook(partial(lambda factor, module, args, output: factor * output, 2.0))


def cast(hf):
    weight = last_linear(hf).weight
    last_linear(hf).weight = torch.nn.Parameter(weight.data.to(torch.int8), requires_grad=False)


def halve(hf):
    last_linear(hf).weight.data = last_linear(hf).weight.data.half()


def shorten(hf):
    owner = next(
        module
        for module in hf.modules()
        if isinstance(getattr(module, "layers", getattr(module, "h", 0)), torch.nn.ModuleList)
    )
    name = "layers" if hasattr(owner, "layers") else "h"
    setattr(owner, name, getattr(owner, name)[:2])


def in_mixed_precision(hf):
    # Accelerate has one state for the whole process, which other tests may have made and others will want.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True).prepare(hf)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def offloaded(hf):
    weights = {name: weight.clone() for name, weight in hf.state_dict().items()}
    attach_align_device_hook(hf, execution_device=torch.device("cpu"), offload=True, weights_map=weights)


CHANGES = {
    "adapter": (adapted, ChangedModelError, r"an adapter \(Lora\).*merge_and_unload"),
    "hook": (
        lambda hf: last_mlp(hf).register_forward_hook(lambda module, args, output: 2 * output),
        ChangedModelError,
        r"2\.mlp: forward hook .*lambda.*remove them",
    ),
    "partial": (hooked_with_partial, ChangedModelError, r"2\.mlp: forward hook .*lambda"),
    "pre-hook": (
        lambda hf: last_mlp(hf).register_forward_pre_hook(lambda module, args: None),
        ChangedModelError,
        r"2\.mlp: forward pre-hook",
    ),
    "on the whole": (
        lambda hf: hf.register_forward_hook(lambda module, args, output: None),
        ChangedModelError,
        r"\((GPT2LMHead|GPTNeoXForCausalL|LlamaForCausalL|Olmo2?ForCausalL)\w+: forward hook",
    ),
    "pruned": (
        lambda hf: prune.l1_unstructured(last_linear(hf), "weight", 0.5),
        ChangedModelError,
        r"forward pre-hook L1Unstructured.*prune\.remove",
    ),
    "parametrized": (
        lambda hf: parametrizations.weight_norm(last_linear(hf), "weight"),
        ChangedModelError,
        r"weight is parametrized.*remove_parametrizations",
    ),
    "forward": (
        lambda hf: setattr(last_mlp(hf), "forward", lambda x: x),
        ChangedModelError,
        r"2\.mlp: forward replaced.*del module\.forward",
    ),
    "mixed precision": (
        in_mixed_precision,
        ChangedModelError,
        r"forward replaced.*unwrap_model",
    ),
    "offloaded": (offloaded, ChangedModelError, r"accelerate's AlignDevicesHook.*device_map"),
    "without numbers": (lambda hf: hf.to("meta"), ChangedModelError, r"weights that are not in memory"),
    "int8": (cast, QuantizedWeightsError, r"2\.mlp\..*model\.dequantize\(\)"),
    "two dtypes": (halve, WrongDtypeError, r"torch\.float16, torch\.float32.*dtype="),
    "layers taken": (shorten, IncompleteWeightsError, r"\.2\..*config"),
    "a head added": (
        lambda hf: setattr(hf, "v_head", torch.nn.Linear(64, 1)),
        UnexpectedWeightsError,
        r"\['v_head\.bias', 'v_head\.weight'\]",
    ),
    "a larger embedding": (
        lambda hf: setattr(hf.get_input_embeddings(), "weight", torch.nn.Parameter(torch.zeros(70, 64))),
        WeightShapeError,
        r"weight is \[70, 64\] in the model and \[50, 64\] by the config",
    ),
}


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_hooked_model_would_leave_out_is_refused_with_its_place(architecture, change):
    make, error, message = CHANGES[change]
    hf = random_hf(architecture)
    make(hf)
    for kind in (None, "bridge"):
        with pytest.raises(error, match=message):
            load_model(hf, as_=kind)


def test_a_class_whose_forward_was_replaced_is_refused(monkeypatch):
    original = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * original(self, x)
    )
    with pytest.raises(ChangedModelError, match=r"LlamaMLP\.forward replaced, in its class"):
        load_model(random_hf("llama"))


def test_attention_of_the_callers_own_is_refused():
    hf = random_hf("llama")
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register("my_attention", lambda *_, **__: None)
    hf.set_attn_implementation("my_attention")
    with pytest.raises(ChangedModelError, match="attention computed by 'my_attention'"):
        load_model(hf)


@EVERY
@pytest.mark.parametrize("kind", CLASSES)
def test_what_changes_nothing_is_accepted(architecture, kind):
    """Hooks on gradients, the hooks with which transformers records attentions, checkpoints, compilation."""
    hf = random_hf(architecture)
    last_mlp(hf).register_full_backward_hook(lambda module, given, taken: None)
    with torch.no_grad():
        hf(random_tokens(), output_attentions=True, output_hidden_states=True)
    hf.enable_input_require_grads()
    hf.compile()
    hooked = load_model(hf, as_=kind)
    assert_same(hooked, random_hf(architecture))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.filterwarnings("ignore:.*offloaded:UserWarning")
def test_a_model_that_accelerate_placed_is_copied_whole_and_not_moved(kind):
    hf = random_hf("llama")
    dispatch_model(hf, {"": "cpu"}, force_hooks=True)
    hooked = load_model(hf, as_=kind, dtype="float64")
    assert {weight.dtype for weight in hf.parameters()} == {torch.float32}
    assert {weight.dtype for weight in hooked.parameters()} == {torch.float64}
    with torch.no_grad():
        tokens = random_tokens()
        torch.testing.assert_close(hooked(tokens), hf(tokens).logits.double(), atol=1e-4, rtol=0)


def test_a_model_in_a_wrapper_is_to_be_given_itself():
    with pytest.raises(ModelLoadError, match=r"cannot load a OptimizedModule.*the model within: \._orig_mod"):
        load_model(torch.compile(random_hf("llama")))
    wrapped = Lora(random_hf("llama").lm_head)
    with pytest.raises(ChangedModelError, match="merge_and_unload"):
        load_model(wrapped)


SETTINGS = {
    "gpt2": {"scale_attn_weights": False},
    "gpt2-crossed": {"add_cross_attention": True},
    "gpt_bigcode": {"scale_attn_weights": False},
    "gpt_bigcode-many": {"multi_query": False},
    "gpt_neox": {"attention_bias": False},
    "falcon": {"new_decoder_architecture": True},
    "opt": {"do_layer_norm_before": False},
    "phi": {"qk_layernorm": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_transformerlens_does_not_have_is_named(name):
    config = transformers.AutoConfig.for_model(
        name.partition("-")[0],
        **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"n_inner": 48, "ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": 48},
        **SETTINGS[name],
    )
    hf = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        hf(random_tokens(), use_cache=False)
    ((setting, value),) = SETTINGS[name].items()
    with pytest.raises(UnsupportedModelError, match=f"TransformerBridge cannot represent .* {setting}={value}"):
        load_model(hf, as_="bridge")


# Tokenizers.

TEXT = "the river rises in the mountains and runs south through three valleys"
BOS = AddedToken("<s>", special=True)


def byte_level(*, post=None, vocab_size=300):
    """Byte-level pairs, as GPT-2, Pythia and Llama 3 have them, with `<s>` before text where `post` says so."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def pieces(*, post=None):
    """Pieces in which blanks are written as underscores, as Llama 2 has them."""
    vocabulary = ["<s>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.punctuation, *string.digits]
    tokenizer = Tokenizer(tokenizer_models.BPE({piece: i for i, piece in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def with_tokenizer(folder, tokenizer, *, vocab_size=320, architecture="llama", bos="<s>"):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>")
    spec = ModelSpec(architecture, n_layers=1, d_model=16, n_heads=2)
    spec.build(vocab_size=vocab_size, n_ctx=64, eos_token_id=1).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("make", [byte_level, pieces])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmo"])
@pytest.mark.parametrize(
    ("post", "named", "expected"),
    [
        (None, "<s>", None),
        ("<s> $A", "<s>", "<s>"),
        ("<s> $A </s>", "<s>", "<s>"),
        ("$A </s>", "<s>", None),
        (None, None, None),
        ("<s> $A", "</s>", None),
    ],
)
def test_bos_is_there_only_where_the_tokenizer_puts_it(post, named, expected, architecture, make, kind, tmp_path):
    folder = with_tokenizer(tmp_path, make(post=post), architecture=architecture, bos=named)
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    hooked = load_model(folder, as_=kind)
    assert bos_token_id(hooked) == (None if expected is None else 0)
    if named != "</s>":  # another token in front than the named one: TransformerLens may or may not leave it out
        front = ([0] if expected else []) + plain("the river", add_special_tokens=False)["input_ids"]
        assert hooked.to_tokens("the river")[0].tolist()[: len(front)] == front
    _, rows = natural_tokens(Hooked(hooked), 2, seed=0)
    assert (rows[:, 0] == 0).all() == (expected is not None)
    for length, rows in random_repeats(Hooked(hooked), 8, seed=0):
        assert rows.shape[1] == 2 * length + (expected is not None)


@pytest.mark.parametrize(("post", "expected"), [(None, "none"), ("<s> $A", "<s>")])
def test_a_result_says_what_was_put_in_front(post, expected, tmp_path):
    result = induction(load_model(with_tokenizer(tmp_path, byte_level(post=post))), n_sequences=8)
    assert result.attrs["bos"] == expected


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has only the bridge")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("prepends", [True, False])
def test_a_hooked_model_that_someone_else_made_keeps_its_own_setting(prepends, tmp_path):
    from transformer_lens import HookedTransformer

    tokenizer = transformers.AutoTokenizer.from_pretrained(with_tokenizer(tmp_path, byte_level()))
    sizes = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 64, "d_vocab": 300, "act_fn": "relu", "device": "cpu"}
    hooked = HookedTransformer({**sizes, "default_prepend_bos": prepends}, tokenizer=tokenizer)
    assert bos_token_id(load_model(hooked)) == (0 if prepends else None)


@pytest.mark.parametrize("kind", CLASSES)
def test_random_tokens_are_those_that_text_can_have(kind, tmp_path):
    """Special tokens, tokens in reserve, a hole in the numbering and the padding of the vocabulary are not drawn."""
    tokenizer = byte_level(vocab_size=280)
    tokenizer.add_special_tokens([AddedToken("<|reserved_1|>", special=True)])
    tokenizer.add_tokens([AddedToken("    ", special=False)])
    description = json.loads(tokenizer.to_str())
    (last,) = (token for token in description["added_tokens"] if token["content"] == "    ")
    last["id"] += 5  # a hole
    vocabulary = description["model"]["vocab"]
    description["model"]["vocab"] = {piece: index for piece, index in vocabulary.items()}
    folder = with_tokenizer(tmp_path, Tokenizer.from_str(json.dumps(description)), vocab_size=320)
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    hooked = Hooked(load_model(folder, as_=kind))
    can = {index for piece, index in plain.get_vocab().items() if piece not in ("<s>", "</s>", "<|reserved_1|>")}
    assert plain("    ")["input_ids"][0] in can
    assert len(can) < max(can) < 319
    assert set(token_frequencies(hooked).nonzero()[0]) == can
    drawn = {token for _, rows in random_repeats(hooked, 512, seed=0) for token in rows.flatten().tolist()}
    assert drawn <= can
    assert len(drawn) > 0.95 * len(can)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_tokenizer_that_is_cut_short_is_not_left_out(file, kept, tmp_path):
    folder = with_tokenizer(tmp_path, byte_level())
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        TokenizerError, match=r"\(tokenizer\.json, tokenizer_config\.json\), which cannot be read"
    ) as error:
        load_model(folder)
    command = next(line for line in str(error.value).splitlines() if line.startswith("  "))
    assert eval(command).tokenizer is None


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("kept", [None, 0.0, 0.5, 0.8])
def test_the_two_files_of_a_byte_pair_tokenizer_are_needed_whole(file, kept, tmp_path):
    spec = ModelSpec("gpt2", n_layers=1, d_model=16, n_heads=2)
    spec.build(vocab_size=320, n_ctx=64, eos_token_id=1).save_pretrained(tmp_path)
    model = json.loads(byte_level(vocab_size=290).to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    assert load_model(tmp_path).tokenizer is not None
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if kept is not None:
        (tmp_path / file).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_model(tmp_path)


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path):
    folder = with_tokenizer(tmp_path, byte_level())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"\(tokenizer_config\.json\), .*no vocabulary"):
        load_model(folder)
