import copy

import pytest
import torch
from random_models import ARCHITECTURES, CLASSES, CONTEXT, HAS_HOOKED_TRANSFORMER, VOCAB, random_hf, random_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from mechhier.grammars import DocumentGrammar
from mechhier.models.loading import ModelInfo, ModelLoadError, load_model, model_info
from mechhier.models.run import Manifest, checkpoint_folder
from mechhier.models.spec import ModelSpec, TrainSpec
from mechhier.models.tokenizer import word_level_tokenizer

needs_hooked_transformer = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has only the bridge"
)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder without a tokenizer."""
    path = tmp_path / "tiny-llama"
    random_hf("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_attention_equal_hugging_face(architecture, kind):
    hf, tokens = random_hf(architecture), random_tokens(2, CONTEXT)
    with torch.no_grad():
        expected = hf(tokens, output_attentions=True)
    hooked = load_model(hf, as_=kind)
    logits, cache = hooked.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    for layer, attention in enumerate(expected.attentions):
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], attention, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "olmo"])
def test_models_of_a_spec_equal_hugging_face(architecture, kind):
    spec = ModelSpec(architecture, n_layers=2, d_model=32, n_heads=4, d_mlp=48)
    hf = spec.build(vocab_size=VOCAB, n_ctx=CONTEXT, eos_token_id=0, seed=1).eval()
    tokens = random_tokens(2, CONTEXT)
    with torch.no_grad():
        expected = hf(tokens).logits
        torch.testing.assert_close(load_model(hf, as_=kind)(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_in_memory_is_left_as_it_was(kind, tmp_path):
    hf = random_hf("llama")
    before = copy.deepcopy(hf.state_dict())
    hooked = load_model(hf, as_=kind)
    with torch.no_grad():
        for parameter in hooked.parameters():
            parameter.zero_()
    for name, weight in hf.state_dict().items():
        assert torch.equal(weight, before[name]), name
    hf.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_without_a_tokenizer_loads(folder, kind):
    hooked = load_model(folder, as_=kind)
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), random_hf("llama")(tokens).logits, atol=1e-4, rtol=0)
    assert model_info(hooked) == ModelInfo(name="tiny-llama", architecture="llama")
    assert hooked.tokenizer is None
    assert not hooked.training


def test_without_a_choice_the_class_is_hooked_transformer_where_there_is_one(folder):
    name = "HookedTransformer" if HAS_HOOKED_TRANSFORMER else "TransformerBridge"
    assert type(load_model(folder)).__name__ == name


def test_dtype_is_honoured(folder):
    assert {p.dtype for p in load_model(folder, dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_runs_checkpoint_carries_its_grammar_step_and_tokenizer(tmp_path, kind):
    grammar = DocumentGrammar(n_words=3, n_connectors=2)
    corpus = grammar.corpus(tokens=320, context=16)
    spec = ModelSpec("llama", n_layers=1, d_model=16, n_heads=2)
    run = tmp_path / "my-run"
    checkpoint = checkpoint_folder(run, 400)
    spec.build(vocab_size=grammar.vocab_size, n_ctx=16, eos_token_id=grammar.eos_token_id).save_pretrained(checkpoint)
    word_level_tokenizer(grammar).save_pretrained(checkpoint)
    Manifest(
        model=spec, train=TrainSpec(), corpus=corpus.description, steps=400, device="cpu", versions={}, finished=True
    ).write(run)

    hooked = load_model(checkpoint, as_=kind)
    assert model_info(hooked) == ModelInfo(name="my-run", architecture="llama", step=400, grammar=grammar)
    text = [grammar.vocabulary[0], grammar.vocabulary[4], grammar.vocabulary[-1]]
    assert hooked.to_tokens(" ".join(text)).tolist() == [[0, 4, grammar.eos_token_id]]
    with pytest.raises(ModelLoadError, match=r"is a run, not a checkpoint.*Run\.open"):
        load_model(run)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_hooked_model_is_returned_as_it_is(kind):
    hooked = load_model(random_hf("gpt2"), as_=kind)
    assert load_model(hooked) is hooked
    assert load_model(hooked, as_=kind) is hooked
    other = "bridge" if kind == "hooked" else "hooked"
    with pytest.raises(ModelLoadError, match="already a"):
        load_model(hooked, as_=other)
    with pytest.raises(ModelLoadError, match="as it is"):
        load_model(hooked, dtype=torch.float64)


@needs_hooked_transformer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_foreign_hooked_transformer_says_whether_its_norms_are_folded():
    from transformer_lens import HookedTransformer

    def model(norm):
        sizes = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 5, "act_fn": "relu"}
        return HookedTransformer({**sizes, "normalization_type": norm, "device": "cpu"})

    assert model_info(load_model(model("LNPre"))).processing == "folded"
    assert model_info(load_model(model("LN"))).processing == "unknown"


def test_metadata_survives_a_deepcopy():
    hooked = load_model(random_hf("gpt2"))
    assert model_info(copy.deepcopy(hooked)) == model_info(hooked)
    assert model_info(torch.nn.Linear(1, 1)) is None


def test_hub_name_and_revision_reach_the_hub_and_name_the_step(folder, monkeypatch):
    asked = {}
    read = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **options):
        asked.update(options, name=name)
        return read(folder, dtype=options["dtype"], output_loading_info=True)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr("mechhier.models.loading._read_tokenizer", lambda name, revision: None)
    info = model_info(load_model("allenai/OLMo-1B-hf", revision="step1000-tokens4B"))
    assert info == ModelInfo(name="allenai/OLMo-1B-hf", architecture="llama", step=1000, revision="step1000-tokens4B")
    assert asked["name"] == "allenai/OLMo-1B-hf"
    assert asked["revision"] == "step1000-tokens4B"
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False


def test_scaled_rotary_embeddings_go_to_the_bridge():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, rope_parameters=rope, **sizes)).eval()
    with pytest.raises(ModelLoadError, match="rope_type='linear'" if HAS_HOOKED_TRANSFORMER else "no longer"):
        load_model(hf, as_="hooked")
    tokens, hooked = random_tokens(), load_model(hf)
    assert type(hooked).__name__ == "TransformerBridge"
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_without_a_network_the_error_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"nobody/nothing.*revision step7") as error:
        load_model("nobody/nothing", revision="step7")
    assert "network" in str(error.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("runs/pcfg/checkpoints/step-000400", {}, "no folder"),
        ("./nothing", {}, "no folder"),
        (3, {}, "cannot load a int"),
        (torch.nn.Linear(1, 1), {}, "cannot load a Linear"),
        ("gpt2", {"as_": "hooked_transformer"}, "as_ must be"),
    ],
)
def test_what_is_no_model_is_refused(source, options, message):
    with pytest.raises(ModelLoadError, match=message):
        load_model(source, **options)


def test_options_that_do_not_apply_are_refused(folder):
    with pytest.raises(ModelLoadError, match="hub names only"):
        load_model(folder, revision="main")
    with pytest.raises(ModelLoadError, match="hub names only"):
        load_model(random_hf("gpt2"), revision="main")


def test_folders_without_a_model_or_with_pickled_weights_are_refused(folder):
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_model(folder.parent)
    (folder / "model.safetensors").unlink()
    torch.save(random_hf("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_model(folder)


def test_a_damaged_weight_file_is_an_error_of_ours(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="tiny-llama"):
        load_model(folder)


def test_missing_weights_are_not_filled_with_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"no weights for \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load_model(folder)


def test_an_architecture_without_next_token_head_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    with pytest.raises(ModelLoadError, match="What to do"):
        load_model(model)
