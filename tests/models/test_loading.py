import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from random_models import ARCHITECTURES, CLASSES, CONTEXT, HAS_HOOKED_TRANSFORMER, VOCAB, random_hf, random_tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    T5Config,
)

from mechhier import hashes
from mechhier.grammars import DocumentGrammar
from mechhier.models import loading, weights
from mechhier.models.errors import (
    HubUnreachableError,
    IncompleteWeightsError,
    MissingRevisionError,
    ModelLoadError,
    ModelNotFoundError,
    NoSafetensorsError,
    NotEnoughMemoryError,
    UnreadableFileError,
    UnsupportedModelError,
    WrongDtypeError,
)
from mechhier.models.loading import ModelInfo, load_model, model_info
from mechhier.models.planted import PLANTED
from mechhier.models.revision import revisions
from mechhier.models.run import Manifest, Run, checkpoint_folder
from mechhier.models.spec import ModelSpec, TrainSpec
from mechhier.models.tokenizer import word_level_tokenizer

needs_hooked_transformer = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has only the bridge"
)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network, as on a cluster's node."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hf" / "hub"


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder without a tokenizer."""
    path = tmp_path / "models" / "tiny-llama"
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
    hashes.write(run / hashes.LIST, hashes.of_folder(run))
    Manifest(
        model=spec,
        train=TrainSpec(),
        corpus=corpus.description,
        steps=400,
        device="cpu",
        versions={},
        finished=True,
        files_sha256=hashes.of_file(run / hashes.LIST),
    ).write(run)

    hooked = load_model(checkpoint, as_=kind)
    assert model_info(hooked) == ModelInfo(name="my-run", architecture="llama", step=400, seed=0, grammar=grammar)
    text = [grammar.vocabulary[0], grammar.vocabulary[4], grammar.vocabulary[-1]]
    assert hooked.to_tokens(" ".join(text)).tolist() == [[0, 4, grammar.eos_token_id]]
    for source in (run, str(run), Run.open(run)):
        assert model_info(load_model(source, as_=kind)) == model_info(hooked)
    assert model_info(load_model(run, revision="step-000400", as_=kind)) == model_info(hooked)
    assert model_info(load_model(run / "checkpoints", revision="step-000400", as_=kind)) == model_info(hooked)


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


# The layouts in which the models are published, with random weights: sizes small, all else as on the hub.

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "pad_token_id": None}
PUBLISHED = {
    "allenai/OLMo-1B-hf": lambda: OlmoForCausalLM(OlmoConfig(tie_word_embeddings=True, **PLAIN)),
    "allenai/OLMo-7B-0424-hf": lambda: OlmoForCausalLM(OlmoConfig(clip_qkv=8.0, **PLAIN)),
    "allenai/OLMo-2-1124-7B": lambda: Olmo2ForCausalLM(Olmo2Config(rms_norm_eps=1e-6, **PLAIN)),
    "EleutherAI/pythia-70m": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, vocab_size=VOCAB)),
    "meta-llama/Llama-3.2-1B": lambda: LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **PLAIN)
    ),
}
REVISIONS = {
    "allenai/OLMo-1B-hf": ("step1000-tokens4B", 1000),
    "allenai/OLMo-2-1124-7B": ("stage1-step1000-tokens5B", 1000),
    "EleutherAI/pythia-70m": ("step143000", 143_000),
}


def published(name):
    """A random model of the published architecture, as transformers makes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PUBLISHED[name]().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def publish(model, name, folder):
    """Save it as its owner did."""
    if name == "gpt2":  # without the outer name, the head (it is the embedding) and with the causal masks
        weights = {key.removeprefix("transformer."): value for key, value in model.transformer.state_dict().items()}
        mask = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
        weights |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
        model.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    model.save_pretrained(folder, max_shard_size="20KB" if "7B" in name else "1GB")
    if name.startswith("EleutherAI"):  # half precision, and masks that later versions of transformers do without
        weights = load_file(folder / "model.safetensors")
        weights = {key: value.half() for key, value in weights.items()}
        weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril().bool()
        weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def put_in_cache(cache, name, revision, model, *, commit):
    """What `hf download` leaves behind: the ref holds a commit, the snapshot of the commit points at the files."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    publish(model, name, snapshot)
    (home / "blobs").mkdir(exist_ok=True)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        blob = home / "blobs" / f"{commit[:8]}{i}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    return snapshot


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_load_from_the_hubs_cache_without_network(name, kind, hub_cache):
    revision, step = REVISIONS.get(name, ("main", None))
    hf, tokens = published(name), random_tokens(2, 12)
    put_in_cache(hub_cache, name, revision, hf, commit="a" * 40)
    if name.startswith("EleutherAI"):
        hf = hf.half().float()
    hooked = load_model(name, revision=None if revision == "main" else revision, as_=kind)
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
    assert model_info(hooked) == ModelInfo(
        name=name,
        architecture=hf.config.model_type,
        step=step,
        revision=None if revision == "main" else revision,
    )
    assert hooked.cfg.model_name == name
    assert hooked.tokenizer is None
    assert {weight.dtype for weight in hooked.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_published_tokenizer_is_attached_without_network(kind, hub_cache):
    grammar = DocumentGrammar(n_words=3, n_connectors=2)
    snapshot = put_in_cache(hub_cache, "gpt2", "main", published("gpt2"), commit="a" * 40)
    word_level_tokenizer(grammar).save_pretrained(snapshot)
    hooked = load_model("gpt2", as_=kind)
    assert hooked.to_tokens(" ".join(grammar.vocabulary[:3]), prepend_bos=False).tolist() == [[0, 1, 2]]


def test_revisions_in_the_cache_are_told_apart(hub_cache):
    name, tokens = "EleutherAI/pythia-70m", random_tokens(1, 6)
    early, late = published(name).half().float(), published(name).half().float()
    with torch.no_grad():
        late.get_output_embeddings().weight.mul_(2)
    put_in_cache(hub_cache, name, "step0", early, commit="a" * 40)
    put_in_cache(hub_cache, name, "step143000", late, commit="b" * 40)
    with torch.no_grad():
        for model, revision in ((early, "step0"), (late, "step143000"), (late, "b" * 40)):
            logits = load_model(name, revision=revision)(tokens)
            torch.testing.assert_close(logits, model(tokens).logits, atol=1e-4, rtol=0)


def test_a_revision_that_the_cache_has_not_got_names_those_it_has_and_the_command(hub_cache):
    name = "EleutherAI/pythia-70m"
    put_in_cache(hub_cache, name, "step1000", published(name), commit="a" * 40)
    with pytest.raises(HubUnreachableError) as error:
        load_model(name, revision="step2000")
    assert "it has these revisions of the model: step1000." in str(error.value)
    assert "\n  hf download EleutherAI/pythia-70m --revision step2000\n" in str(error.value)
    with pytest.raises(
        HubUnreachableError, match=r"main.*has nothing of the model(?s:.*)\n  hf download nobody/nothing\n"
    ):
        load_model("nobody/nothing")


def test_a_revision_that_the_hub_was_known_not_to_have_is_named_as_such_offline(monkeypatch, hub_cache):
    answer_with_branches(monkeypatch, ["main", "step1000", "step2000", "step4000", "step8000"])
    revisions("EleutherAI/pythia-70m")
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HOME", str(hub_cache.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        MissingRevisionError, match=r"no revision 'step3999'.* 5 revisions .*: step4000, step2000, step1000"
    ):
        load_model("EleutherAI/pythia-70m", revision="step3999")
    with pytest.raises(HubUnreachableError, match="step4000"):
        load_model("EleutherAI/pythia-70m", revision="step4000")
    with pytest.raises(HubUnreachableError, match="c" * 40):
        load_model("EleutherAI/pythia-70m", revision="c" * 40)


def answer_with_branches(monkeypatch, branches):
    answer = SimpleNamespace(branches=[SimpleNamespace(name=branch) for branch in branches])
    monkeypatch.setattr(HfApi, "list_repo_refs", lambda self, name: answer)


def test_with_a_network_the_hubs_answers_become_our_errors(monkeypatch):
    def refusing(error):
        def refuse(self, **options):
            raise error("refused", response=SimpleNamespace(headers={}, request=None, status_code=404))

        return refuse

    answer_with_branches(monkeypatch, ["main", "step1000-tokens4B", "step2000-tokens8B"])
    monkeypatch.setattr(HfApi, "repo_info", refusing(RevisionNotFoundError))
    with pytest.raises(MissingRevisionError, match=r"its 3 revisions the nearest are: step1000-tokens4B, step2000"):
        load_model("allenai/OLMo-1B-hf", revision="step1000-tokens5B")
    monkeypatch.setattr(HfApi, "repo_info", refusing(RepositoryNotFoundError))
    with pytest.raises(ModelNotFoundError, match=r"no folder 'allenai/OLMo-1B-fh'.*hf auth login"):
        load_model("allenai/OLMo-1B-fh")


def test_the_hub_is_asked_for_safetensors_and_the_revision_only(folder, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    load_model("allenai/OLMo-1B-hf", revision="step1000-tokens4B")
    assert (asked["name"], asked["revision"]) == ("allenai/OLMo-1B-hf", "step1000-tokens4B")

    def wanted(file):
        path = Path(file)
        return any(map(path.match, asked["allow_patterns"])) and "/" not in file

    wanted_files = ["config.json", "model.safetensors.index.json", "model-00001-of-00006.safetensors", "vocab.json"]
    wanted_files += ["model.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt"]
    assert all(map(wanted, wanted_files))
    unwanted = [
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "consolidated.safetensors",
        "training_args.bin",
    ]
    assert not any(map(wanted, unwanted))
    assert asked["ignore_patterns"] == "*/*"  # onnx/ and the like


# A folder of revisions.


@pytest.fixture
def mirror(tmp_path):
    path = tmp_path / "mirror" / "OLMo-1B-hf"
    for i, revision in enumerate(("step1000-tokens4B", "step2000-tokens8B", "step10000-tokens42B", "main")):
        model = published("allenai/OLMo-1B-hf")
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1 + i)
        model.save_pretrained(path / revision)
    return path


def test_a_mirrors_revision_loads_with_its_step(mirror):
    tokens = random_tokens(1, 6)
    for revision, step in (("step2000-tokens8B", 2000), ("main", None)):
        hooked = load_model(mirror, revision=revision)
        assert model_info(hooked) == ModelInfo(name="OLMo-1B-hf", architecture="olmo", step=step, revision=revision)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(mirror / revision)(tokens).logits
            torch.testing.assert_close(hooked(tokens), expected, atol=1e-4, rtol=0)
    for revision in revisions(mirror):
        assert model_info(load_model(str(mirror), revision=revision.name)).step == revision.step


def test_a_mirror_without_the_revision_or_without_a_choice_says_what_it_has(mirror):
    with pytest.raises(
        MissingRevisionError, match=r"no revision 'step9000'.* 4 revisions .*: step10000-tokens42B, step2000"
    ):
        load_model(mirror, revision="step9000")
    with pytest.raises(MissingRevisionError, match=r"folder of 4 revisions; say which .*'main', 'step1000-tokens4B'"):
        load_model(mirror)


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


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("runs/pcfg/checkpoints/step-000400", {}, "no folder"),
        ("./nothing", {}, "no folder"),
        (3, {}, "cannot load a int"),
        (None, {}, "cannot load None: give a folder, a hub name, a Run"),
        ([], {}, r"cannot load a list.*\[load_model\(source\) for source in sources\]"),
        ({"weight": torch.ones(1)}, {}, r"cannot load a dict.*model\.load_state_dict\(weights\)"),
        (ModelSpec("llama", n_layers=1, d_model=16, n_heads=2), {}, r"cannot load a ModelSpec.*spec\.build"),
        (LlamaConfig(), {}, r"cannot load a LlamaConfig.*AutoModelForCausalLM\.from_config"),
        (
            DocumentGrammar(n_words=3, n_connectors=2).corpus(tokens=64, context=16),
            {},
            "cannot load a Corpus.*mechhier.train",
        ),
        (
            word_level_tokenizer(DocumentGrammar(n_words=3, n_connectors=2)),
            {},
            "cannot load a .*A tokenizer has no weights",
        ),
        (b"runs/a", {}, r"cannot load a bytes.*os\.fsdecode"),
        (__file__, {}, r"test_loading\.py is a file.*give the folder that it lies in"),
        (Path(__file__), {}, r"test_loading\.py is a file.*give the folder that it lies in"),
        ("", {}, "no folder ''"),
        ("a\0b", {}, r"no folder 'a\\x00b'"),
        ("x" * 100_000, {}, "no folder"),
        ("~nobody-of-this-name/models/a", {}, "no folder"),
        ("https://huggingface.co/allenai/OLMo-1B-hf", {}, r"load_model\('allenai/OLMo-1B-hf'\)"),
        ("gpt2", {"revision": 1000}, "revision must be the name of one"),
        (torch.nn.Linear(1, 1), {}, "cannot load a Linear"),
        ("gpt2", {"as_": "hooked_transformer"}, "as_ must be"),
    ],
)
def test_what_is_no_model_is_refused(source, options, message):
    with pytest.raises(ModelLoadError, match=message):
        load_model(source, **options)


def test_a_planted_model_is_loaded_as_the_model_within():
    planted = PLANTED["inert"]()
    tokens = planted.tokens(2)
    with torch.no_grad():
        expected = planted.model(tokens).logits
        torch.testing.assert_close(load_model(planted)(tokens), expected, atol=1e-4, rtol=0)


def test_a_run_that_has_not_finished_says_how_to_load_what_there_is(tmp_path):
    grammar = DocumentGrammar(n_words=3, n_connectors=2)
    corpus = grammar.corpus(tokens=320, context=16)
    spec = ModelSpec("llama", n_layers=1, d_model=16, n_heads=2)
    spec.build(vocab_size=grammar.vocab_size, n_ctx=16, eos_token_id=0).save_pretrained(checkpoint_folder(tmp_path, 3))
    hashes.write(tmp_path / hashes.LIST, hashes.of_folder(tmp_path))
    Manifest(
        model=spec, train=TrainSpec(), corpus=corpus.description, steps=400, device="cpu", versions={}, finished=False
    ).write(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"has not finished.*revisions\(.*revision=\.\.\.\)"):
        load_model(tmp_path)
    (listed,) = revisions(tmp_path)
    assert model_info(load_model(tmp_path, revision=listed.name)).step == 3


@pytest.mark.parametrize("name", ["checkpoint-500", "step_500", "step-000500", "global_step500", "iter_0000500"])
def test_a_folder_that_is_named_as_a_step_is_one(name, folder):
    folder = folder.rename(folder.parent / name)
    assert model_info(load_model(folder)).step == 500
    assert model_info(load_model(folder.parent, revision=name)).step == 500


@pytest.mark.parametrize("source", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_belongs_to_another_user_may_not_be_read(source, folder, monkeypatch):
    """Root reads everything: the system's answer is put in."""
    grammar = DocumentGrammar(n_words=3, n_connectors=2)
    word_level_tokenizer(grammar).save_pretrained(folder)
    plain = open

    def refusing(path, *arguments, **options):
        if str(path) == str(folder / source):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(UnreadableFileError, match=rf"{source} may not be read by this user.*chmod a\+r"):
        load_model(folder)


def test_an_error_of_the_weights_file_while_it_is_read_names_the_folder(folder, monkeypatch):
    def failing(*_, **__):
        raise SafetensorError("I/O error: Input/output error")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing)
    with pytest.raises(ModelLoadError, match=rf"cannot load folder {folder}: I/O error(?s:.*)What to do"):
        load_model(folder)


def test_options_that_do_not_apply_are_refused(folder):
    with pytest.raises(ModelLoadError, match="hub names, runs and folders of revisions only"):
        load_model(folder, revision="main")
    with pytest.raises(ModelLoadError, match="hub names and folders of revisions"):
        load_model(random_hf("gpt2"), revision="main")
    with pytest.raises(ModelLoadError, match="no device of torch"):
        load_model(folder, device="gpu")
    with pytest.raises(ModelLoadError, match=r"sees \d+ CUDA devices"):
        load_model(folder, device="cuda:99")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "int8", "bf16", "float", 16])
def test_a_dtype_that_is_no_common_floating_one_is_refused(folder, dtype):
    for source in (folder, random_hf("gpt2")):
        with pytest.raises(WrongDtypeError, match="float32, bfloat16, float16, float64"):
            load_model(source, dtype=dtype)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_given_as_itself_or_by_name(folder, dtype, kind):
    for source in (folder, random_hf("llama")):
        hooked = load_model(source, dtype=dtype, as_=kind)
        assert {weight.dtype for weight in hooked.parameters()} == {torch.bfloat16}
        assert torch.equal(hooked.W_E, random_hf("llama").get_input_embeddings().weight.bfloat16())


# Files that are not what they should be.


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)


def test_pickled_weights_are_refused_with_the_reason_and_a_way_out(folder, tmp_path, hub_cache):
    (folder / "model.safetensors").unlink()
    torch.save(random_hf("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(NoSafetensorsError, match=r"but pytorch_model\.bin\. .*can run any code") as error:
        load_model(folder)
    # What the message says must work.
    command = re.search(r"\n  (.*)\n", str(error.value))[1].replace("FOLDER", repr(str(tmp_path / "converted")))
    eval(command)
    assert model_info(load_model(tmp_path / "converted")).architecture == "llama"

    home = hub_cache / "models--owner--pickled"
    shutil.copytree(folder, home / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("*.bin"))
    (home / "refs").mkdir()
    (home / "refs" / "step7").write_text("a" * 40)
    with pytest.raises(NoSafetensorsError, match=r"from_pretrained\('owner/pickled', revision='step7'\)"):
        load_model("owner/pickled", revision="step7")


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "sharded"
    random_hf("llama").save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_a_sharded_folder_loads(sharded):
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_model(sharded)(tokens), random_hf("llama")(tokens).logits, atol=1e-4, rtol=0)


def test_shards_that_are_not_there_are_named(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    second.symlink_to("a-blob-that-was-not-downloaded")
    with pytest.raises(IncompleteWeightsError, match=rf"2 of the \d files .* not there: {first.name}, {second.name}\."):
        load_model(sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_shards_that_are_cut_short_are_named_before_anything_is_read(sharded, kept, monkeypatch):
    read = monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    damaged = sorted(sharded.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:kept])
    with pytest.raises(IncompleteWeightsError, match=rf"damaged: {damaged.name} \([\d,]+ bytes: ") as error:
        load_model(sharded)
    assert str(error.value).count(".safetensors (") == 1
    assert read is None


def test_a_hub_models_damage_is_repaired_by_a_command(hub_cache):
    name = "allenai/OLMo-2-1124-7B"
    snapshot = put_in_cache(hub_cache, name, "stage1-step1000-tokens5B", published(name), commit="a" * 40)
    shard = sorted(snapshot.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(IncompleteWeightsError, match=re.escape(shard.name)) as error:
        load_model(name, revision="stage1-step1000-tokens5B")
    assert str(error.value).endswith("\n  hf download allenai/OLMo-2-1124-7B --revision stage1-step1000-tokens5B")


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}'])
def test_a_damaged_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(IncompleteWeightsError, match=r"model\.safetensors\.index\.json (is damaged|cannot be read)"):
        load_model(sharded)


def test_a_damaged_config_is_an_error_of_ours(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="tiny-llama"):
        load_model(folder)


# Memory.


def test_too_little_memory_is_known_from_the_headers(sharded, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    n_weights = sum(weight.numel() for weight in random_hf("llama").parameters())
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float64", 8)):
        free = int(1.05 * size * n_weights)
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        with pytest.raises(NotEnoughMemoryError, match=rf"{n_weights:,} weights of {size} bytes.*cpu has 0\.0 GB free"):
            load_model(sharded, dtype=dtype, device="cpu")


def test_enough_memory_is_enough(sharded, monkeypatch):
    n_weights = sum(weight.numel() for weight in random_hf("llama").parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(1.2 * 2 * n_weights)))
    load_model(sharded, dtype="bfloat16", device="cpu")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("level", ["", "job/step"])
def test_the_limit_of_a_container_or_a_clusters_job_counts(folder, tmp_path, monkeypatch, version, level):
    """The limit may lie at the process's own group or at any above it; file cache in its use can be given back."""
    controller, limit, use, cache = {
        1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("", "memory.max", "memory.current", "inactive_file"),
    }[version]
    groups = tmp_path / "groups"
    own = groups / controller / level
    (groups / controller / "job" / "step").mkdir(parents=True)
    (own / use).write_text("1000000\n")
    (own / "memory.stat").write_text(f"anon 5\n{cache} 900000\n")
    lines = tmp_path / "cgroup"
    lines.write_text(f"7:cpu,cpuacct:/other\n3:{controller}:/job/step\n" if version == 1 else "0::/job/step\n")
    monkeypatch.setattr(weights, "_CONTROL_GROUPS", groups)
    monkeypatch.setattr(weights, "_OWN_CONTROL_GROUPS", lines)
    (own / limit).write_text("110000\n")  # 10,000 bytes are left
    with pytest.raises(NotEnoughMemoryError, match="cpu has"):
        load_model(folder, device="cpu")
    for enough in ("1200000\n", "max\n"):  # 1,100,000 bytes are left, 200,000 were the cache not counted as free
        (own / limit).write_text(enough)
        load_model(folder, device="cpu")


@needs_hooked_transformer
def test_no_other_copy_of_the_weights_is_made(folder, monkeypatch):
    """The hooked model's weights are the very ones that were read, in the wanted dtype on the wanted device."""
    read = []
    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, **options):
        read.append((original(*arguments, **options), options))
        return read[0][0]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for kind in ("hooked", "bridge"):
        read.clear()
        hooked = load_model(folder, as_=kind, dtype="bfloat16", device="cpu")
        (model, options) = read[0]
        assert options["dtype"] is torch.bfloat16
        assert options["device_map"] == {"": torch.device("cpu")}
        own = {weight.untyped_storage().data_ptr() for weight in hooked.parameters() if weight.any()}
        assert own <= {weight.untyped_storage().data_ptr() for weight in model.parameters()}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_change_of_the_model_does_not_reach_the_file(folder, kind):
    """In the files' own dtype the weights are the file's pages, but changed pages are the process's own."""
    before = (folder / "model.safetensors").read_bytes()
    hooked = load_model(folder, as_=kind, device="cpu")
    with torch.no_grad():
        for weight in hooked.parameters():
            weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


# Processed weights.


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "olmo", "gpt2", "gpt_neox", "gpt_neox-sequential"])
def test_folded_logits_differ_from_raw_ones_by_a_constant_at_each_position(architecture, kind, tmp_path):
    hf, tokens = random_hf(architecture), random_tokens(2, 12)
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        raw = hf(tokens).logits
        for source in (hf, tmp_path):
            hooked = load_model(source, as_=kind, processing="folded")
            logits = hooked(tokens)
            torch.testing.assert_close(logits.softmax(-1), raw.softmax(-1), atol=1e-4, rtol=0)
            assert model_info(hooked).processing == "folded"
            # That something was done: the unembedding is centred over the vocabulary.
            assert logits.mean(-1).abs().max() < 1e-3 < raw.mean(-1).abs().max()
        torch.testing.assert_close(hf(tokens).logits, raw, atol=0, rtol=0)


def test_folding_is_refused_where_it_would_be_wrong():
    for kind in (None, "hooked", "bridge"):
        with pytest.raises(
            UnsupportedModelError, match=r"folded' is not exact for 'olmo2'.*llama, olmo, gpt2, gpt_neox"
        ):
            load_model(published("allenai/OLMo-2-1124-7B"), processing="folded", as_=kind)
    for source in (random_hf("llama").bfloat16(), random_hf("llama")):
        with pytest.raises(WrongDtypeError, match="float32 or float64"):
            load_model(source, processing="folded", dtype=None if source.dtype == torch.bfloat16 else "float16")
    with pytest.raises(ModelLoadError, match="'none' or 'folded'"):
        load_model(random_hf("llama"), processing="centred")
    with pytest.raises(ModelLoadError, match="as it is"):
        load_model(load_model(random_hf("llama")), processing="folded")


def test_missing_weights_are_not_filled_with_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteWeightsError, match=r"no weights for \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        load_model(folder)


def test_an_architecture_without_next_token_head_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    with pytest.raises(UnsupportedModelError, match="What to do"):
        load_model(model)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'t5' is no causal language model"):
        load_model(tmp_path)


def test_an_architecture_that_only_a_repositorys_own_code_knows_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "hf_olmo", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(UnsupportedModelError, match=r"no code of a model's repository is run.*named -hf"):
        load_model(folder)
