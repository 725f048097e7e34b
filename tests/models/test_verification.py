"""Every architecture that transformers can build small: right numbers or a named refusal, never a third thing."""

from __future__ import annotations

import contextlib
from collections import Counter

import every_architecture
import pytest
import torch
from random_models import CLASSES, CONTEXT, HAS_HOOKED_TRANSFORMER, VOCAB, random_hf, random_tokens

import mechhier as mh
from mechhier.models import load_model, verification
from mechhier.models.errors import CapabilityError, ModelLoadError, UnsupportedModelError
from mechhier.models.hooked import VERIFICATION, Hooked
from mechhier.probes import Edge, Head, ablated, attribution_patch, knocked_out, logit_difference, patch
from mechhier.probes.attribution import centred_logit, target_directions
from mechhier.probes.last_position import LastPosition

needs_hooked_transformer = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has only the bridge"
)


@pytest.mark.parametrize("model_type", every_architecture.MODEL_TYPES)
def test_an_architecture_gives_right_numbers_or_a_named_refusal(model_type):
    hf = every_architecture.build_small(model_type)
    if hf is None:
        pytest.skip("transformers does not build it small from its defaults")
    check(hf)


@pytest.mark.parametrize("name", every_architecture.VARIANTS)
def test_a_kind_of_attention_gives_right_numbers_or_a_named_refusal(name):
    check(every_architecture.build_variant(name))


@pytest.mark.parametrize("length", [11, 12, 13])
def test_a_rotation_that_depends_on_the_length_is_right_where_it_switches(length):
    check(every_architecture.build_variant("phi3, longrope"), length=length)


def check(hf, *, length=20):
    try:
        model = load_model(hf)
    except ModelLoadError as refusal:
        assert "What to do" in str(refusal)  # noqa: PT017
        return
    hooked = Hooked(model)
    vocab = hf.config.get_text_config().vocab_size
    tokens = torch.randint(vocab, (3, min(length, hooked.n_ctx)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    assert_close(hooked.run(tokens), expected.logits)
    for layer, attention in enumerate(expected.attentions or ()):
        if attention is not None and hooked.can("pattern"):
            # A sink's share is beside the pattern in some architectures, in it in others.
            assert_close(read(hooked, tokens, "pattern", layer), attention[..., : tokens.shape[1]])
    for layer, stream in enumerate(expected.hidden_states[:-1]):
        assert_close(read(hooked, tokens, "resid_pre", layer), stream)
    check_ablation(hf, hooked, tokens)
    check_knock_out(hf, model, tokens)
    check_last_position(hooked, tokens)
    check_phenomena(model, tokens)


def assert_close(ours, theirs, *, tolerance=1e-4):
    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, atol=tolerance * size, rtol=0)


def read(hooked, tokens, site, layer):
    seen = []
    hooked.run(tokens, [(site, layer, lambda activation: seen.append(activation.clone()))])
    return seen[0]


def check_ablation(hf, hooked, tokens):
    """Zeroing what a component writes, against a plain PyTorch hook on the module that computes it."""
    for site in ("attn_out", "mlp_out"):
        if not hooked.can(site) or not hooked.can(f"{site} edits"):
            with pytest.raises(CapabilityError, match=site):
                hooked.run(tokens, [(site, 1, torch.zeros_like)])
            continue
        written = read(hooked, tokens, site, 1)
        if (module := module_that_writes(hf, tokens, written)) is None:
            continue  # it is not the output of one module: nothing to compare with
        handle = module.register_forward_hook(
            lambda _, inputs, output: (
                (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
            )
        )
        with torch.no_grad():
            expected = hf(tokens, use_cache=False).logits
        handle.remove()
        assert_close(hooked.run(tokens, [(site, 1, torch.zeros_like)]), expected)


def module_that_writes(hf, tokens, written):
    """The outermost module that runs once, and whose output is the tensor."""
    found, runs = [], Counter()

    def look(module, inputs, output):
        runs[module] += 1
        first = output[0] if isinstance(output, tuple) and output else output
        same_shape = isinstance(first, torch.Tensor) and first.shape == written.shape
        if same_shape and torch.allclose(first, written, atol=1e-5 * float(written.abs().max())):
            found.append(module)

    handles = [module.register_forward_hook(look) for module in hf.modules()]
    with torch.no_grad():
        hf(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    once = [module for module in found if runs[module] == 1]
    return once[-1] if once else None


def check_knock_out(hf, model, tokens):
    """Cutting one key, against Hugging Face's model with that key masked before the softmax; whether it could be compared."""
    length, key = tokens.shape[1], 2
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((length, length), lowest).triu(1)
    cut = mask.clone()
    cut[key + 1 :, key] = lowest
    masks = [each.expand(len(tokens), 1, -1, -1) for each in (mask, cut)]
    edge = Edge(keys=key, queries=tuple(range(key + 1, length)))
    if not Hooked(model).can("pattern edits") or not Hooked(model).can("pattern"):
        with pytest.raises(CapabilityError, match="pattern"), knocked_out(model, [edge]):
            Hooked(model).run(tokens)
        return False
    with torch.no_grad(), contextlib.suppress(ValueError, RuntimeError):
        plain = hf(tokens, use_cache=False).logits
        whole, without = (hf(tokens, attention_mask=each, use_cache=False).logits for each in masks)
        if torch.allclose(plain, whole, atol=1e-4):  # else it has a mask of its own, such as a window's
            with knocked_out(model, [edge]):
                ours = Hooked(model).run(tokens)
            assert_close(ours, without, tolerance=1e-3)
            return True
    return False


def check_last_position(hooked, tokens):
    """A run of the last position with an edit, begun at a layer, against the whole run with the edit."""
    if not hooked.can("z") or not hooked.can("z edits"):
        return
    last = LastPosition(hooked, tokens, torch.arange(len(tokens)))
    layer, index = hooked.n_layers // 2, torch.tensor([2, 0])

    def edit(z):
        z = z.clone()
        z[:, -1] = 1.0
        return z

    ours = last.run(index, [("z", layer, edit)], start=(layer, last.streams[layer - 1][index]))
    assert_close(ours, hooked.run(tokens[index], [("z", layer, edit)])[:, -1])
    assert_close(last.logits, hooked.run(tokens)[:, -1])


def check_phenomena(model, tokens):
    """Measured, or refused by name; Hydra's terms are checked by its own identity, which raises."""
    with contextlib.suppress(CapabilityError):
        hydra = mh.phenomena.hydra(model, tokens, ablation="zero", n_null=0, min_probability=0.0)
        assert float(hydra.identity_error) < 1e-2
        assert "logits" in hydra.attrs["verification"]


# What can be wrong, case by case.


def test_a_model_whose_numbers_are_not_finite_is_refused():
    hf = random_hf("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="not finite"):
        load_model(hf)


class _Adapted(torch.nn.Module):
    """A linear layer with something added, as an adapter's."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x) + x.flip(-1)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_module_that_a_converter_does_not_see_makes_other_logits(kind):
    hf, tokens = random_hf("llama"), random_tokens()
    hf.model.layers[0].self_attn.q_proj = _Adapted(hf.model.layers[0].self_attn.q_proj)
    with torch.no_grad():
        expected = hf(tokens).logits
    try:
        model = load_model(hf, as_=kind)
    except ModelLoadError as refusal:
        assert "q_proj" in str(refusal) or "other logits" in str(refusal)  # noqa: PT017
    else:
        assert_close(Hooked(model).run(tokens), expected)


def test_an_encoder_is_not_measured_as_a_causal_model():
    with pytest.raises(UnsupportedModelError, match="not causal"):
        load_model(every_architecture.build_small("bert"))


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neo", "opt"])
def test_attention_that_can_only_be_watched_refuses_every_edit_of_its_pattern(model_type):
    hf = every_architecture.build_small(model_type)
    model, tokens = load_model(hf), random_tokens()
    corrupted, metric = tokens.roll(1, dims=0), logit_difference(answers=tokens[:, 1], wrong=tokens[:, 2])
    hooked = Hooked(model)
    if hooked.can("pattern edits"):  # a TransformerLens that mends it
        return
    with torch.no_grad():
        attention = hf(tokens, output_attentions=True).attentions[1]
    assert_close(read(hooked, tokens, "pattern", 1), attention)
    for call in (
        lambda: patch(model, tokens, corrupted, metric=metric, sites="pattern"),
        lambda: attribution_patch(model, tokens, corrupted, metric=metric, sites="pattern"),
        lambda: mh.probes.knock_out(model, [Edge(keys=0)], tokens),
        lambda: mh.probes.force_pattern(model, [Head(0, 0)], tokens, "previous"),
    ):
        with pytest.raises(CapabilityError, match=r"pattern edits.*only be watched"):
            call()
    mh.phenomena.induction(model, n_sequences=4, n_controls=0)  # only watches


def test_multipliers_are_in_direct_effects():
    hf = every_architecture.build_variant("granite, multiplied")
    hooked, tokens = Hooked(load_model(hf)), random_tokens()
    assert hooked.verification.logit_multiplier == pytest.approx(1 / 8, rel=1e-3)
    heads, bias = hooked.head_writes(1, read(hooked, tokens, "z", 1))
    assert_close(heads.sum(2) + bias, read(hooked, tokens, "attn_out", 1))
    streams, writes, scales = [], [], []
    hooks = [(site, layer, writes.append) for layer in range(hooked.n_layers) for site in ("attn_out", "mlp_out")]
    logits = hooked.run(tokens, [*hooks, ("embed", None, streams.append), ("final_scale", None, scales.append)])
    directions = target_directions(hooked, tokens)
    total = sum(((write * directions).sum(-1) for write in [streams[0], *writes]), torch.zeros(tokens.shape))
    assert_close(total / scales[0][..., 0], centred_logit(logits, tokens))


def test_gains_are_what_the_norm_multiplies_by_however_they_are_stored():
    hf = every_architecture.build_small("nemotron")
    hooked = Hooked(load_model(hf))
    torch.testing.assert_close(hooked.final_gain, hf.model.norm.weight.detach() + 1)
    torch.testing.assert_close(hooked.attention_gains(1)[0], hf.model.layers[1].input_layernorm.weight.detach() + 1)


def test_what_the_weights_say_is_left_out_where_they_do_not_make_the_activations():
    model = load_model(every_architecture.build_small("bloom"))  # it has a norm behind the embedding
    with pytest.warns(mh.results.MeasurementWarning, match="norm between"):
        result = mh.phenomena.induction(model, n_sequences=4, n_controls=0)
    assert bool(result.copying.isnull().all())
    assert bool(result.K_composition.isnull().all())
    assert bool(result.IND.notnull().all())


def test_a_sink_keeps_its_part_of_the_softmax_when_a_key_is_cut():
    hf = every_architecture.build_variant("gpt_oss, sinks without windows")
    model, tokens = load_model(hf), random_tokens()
    assert Hooked(model).verification.has_sinks
    assert check_knock_out(hf, model, tokens)  # compared with Hugging Face's own masking


def test_verification_is_in_every_result_and_its_absence_too():
    hf, tokens = random_hf("llama"), random_tokens()
    seen = mh.phenomena.hydra(load_model(hf), tokens, ablation="zero", n_null=0, min_probability=0.0)
    assert seen.attrs["verification"].startswith("verified: logits, causal")
    skipped = mh.phenomena.hydra(load_model(hf, verify=False), tokens, ablation="zero", n_null=0, min_probability=0.0)
    assert skipped.attrs["verification"] == "not verified"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_that_someone_else_built_is_looked_at_without_its_callers_edits(kind):
    model, tokens = load_model(random_hf("llama"), as_=kind), random_tokens()
    del model.__dict__[VERIFICATION]
    with ablated(model, [Head(1, 0)], ablation="zero"):
        del model.__dict__[VERIFICATION]
        inside = Hooked(model).run(tokens)
        assert not Hooked(model).verification.wrong
    assert float((Hooked(model).run(tokens) - inside).abs().max()) > 1e-3
    with ablated(model, [Head(1, 0)], ablation="zero"):
        assert_close(Hooked(model).run(tokens), inside, tolerance=1e-6)


@needs_hooked_transformer
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.parametrize("positions", ["standard", "rotary", "shortformer", "alibi"])
def test_positions_of_every_kind_are_kept_in_runs_that_are_not_whole(positions):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": CONTEXT, "d_vocab": VOCAB}
    rotary = {"rotary_dim": 8} if positions == "rotary" else {}
    config = HookedTransformerConfig(
        **sizes, **rotary, act_fn="relu", positional_embedding_type=positions, init_weights=True, seed=0
    )
    model = HookedTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hooked, tokens = Hooked(model), random_tokens()
    whole = hooked.run(tokens)
    for layer in range(3):
        entering = read(hooked, tokens, "resid_pre", layer)
        assert_close(hooked.run(tokens, start=(layer, entering)), whole)
    check_last_position(hooked, tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision_is_not_taken_for_another_model(kind, dtype):
    model = load_model(random_hf("llama"), as_=kind, dtype=dtype)
    assert not Hooked(model).verification.wrong


def test_looking_costs_passes_over_a_few_short_rows():
    model, tokens = load_model(random_hf("llama")), []
    model.embed.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].numel()))
    verification.verify(model)
    assert sum(tokens) < verification.LENGTH * (24 + 2 * 3)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", mh.models.planted.PLANTED)
def test_planted_models_do_what_they_are_told_however_many_of_their_weights_are_zero(name, kind):
    model = load_model(mh.models.planted.PLANTED[name]().model, as_=kind)
    assert not Hooked(model).verification.wrong
