"""The adapter against Hugging Face's own forward pass, for every architecture and both classes."""

from __future__ import annotations

import pytest
import torch
from random_models import (
    ARCHITECTURES,
    BRIDGE_ONLY,
    CLASSES,
    CONTEXT,
    EVERY_MODEL,
    HAS_HOOKED_TRANSFORMER,
    random_hf,
    random_hooked,
    random_tokens,
)

from mechhier.probes import Hooked, patterns, reduce_patterns

IN_BLOCK = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "pattern")
POST_NORM = ("olmo2", "olmo2-tied", "olmo2-gqa", "olmo2-biases", "olmo2-wide-heads", "gemma2")


def every_architecture(test):
    return pytest.mark.parametrize("architecture", ARCHITECTURES)(pytest.mark.parametrize("kind", CLASSES)(test))


def blocks_of(hf):
    """The list of blocks of a Hugging Face model, whatever it is called."""
    body = hf.base_model
    return getattr(body, "layers", None) or body.h


def attention_of(block):
    return getattr(block, "self_attn", None) or getattr(block, "attn", None) or block.attention


def writers_of(block):
    """The modules whose output a block adds to the residual stream; only post-norm blocks have this norm."""
    if hasattr(block, "post_feedforward_layernorm"):
        return block.post_attention_layernorm, block.post_feedforward_layernorm
    return attention_of(block), block.mlp


def record(hooked, tokens, sites):
    seen = {}

    def keep(site, layer):
        def read(activation):
            seen[(site, layer)] = activation.clone()

        return read

    hooks = [(site, layer, keep(site, layer)) for site in sites for layer in range(hooked.n_layers)]
    logits = hooked.run(tokens, hooks)
    return logits, seen


def record_hugging_face(hf, tokens):
    """Hugging Face's output, and what each block adds to the residual stream, by plain PyTorch hooks."""
    written = {}

    def keep(site, layer):
        def read(module, inputs, output):
            written[(site, layer)] = output[0] if isinstance(output, tuple) else output

        return read

    handles = [
        module.register_forward_hook(keep(site, layer))
        for layer, block in enumerate(blocks_of(hf))
        for site, module in zip(("attn_out", "mlp_out"), writers_of(block), strict=True)
    ]
    with torch.no_grad():
        out = hf(tokens, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return out, written


@pytest.fixture(scope="module", params=EVERY_MODEL, ids="-".join)
def measured(request):
    """A hooked model with what it and Hugging Face's own model of the same weights compute on the same tokens."""
    architecture, kind = request.param
    hf, tokens = random_hf(architecture), random_tokens()
    hooked = Hooked(random_hooked(architecture, kind))
    return hooked, tokens, record(hooked, tokens, IN_BLOCK), record_hugging_face(hf, tokens)


def test_logits_patterns_and_residual_stream_equal_hugging_faces(measured):
    hooked, _, (logits, seen), (expected, written) = measured
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    for layer in range(hooked.n_layers):
        torch.testing.assert_close(seen[("pattern", layer)], expected.attentions[layer], atol=1e-4, rtol=0)
        torch.testing.assert_close(seen[("resid_pre", layer)], expected.hidden_states[layer], atol=1e-4, rtol=1e-4)
        for site in ("attn_out", "mlp_out"):
            torch.testing.assert_close(seen[(site, layer)], written[(site, layer)], atol=1e-4, rtol=1e-4)


def test_writes_add_up_to_the_residual_stream_and_heads_to_attn_out(measured):
    hooked, _, (_, seen), _ = measured
    total = seen[("resid_pre", 0)]
    for layer in range(hooked.n_layers):
        total = total + seen[("attn_out", layer)] + seen[("mlp_out", layer)]
        torch.testing.assert_close(total, seen[("resid_post", layer)], atol=1e-4, rtol=1e-4)
        heads, bias = hooked.head_writes(layer, seen[("z", layer)])
        torch.testing.assert_close(heads.sum(2) + bias, seen[("attn_out", layer)], atol=1e-4, rtol=0)


def test_final_scale_gain_and_unembedding_give_the_logits(measured):
    hooked, tokens, _, _ = measured
    streams, scales = [], []
    logits = hooked.run(
        tokens, [("resid_post", hooked.n_layers - 1, streams.append), ("final_scale", None, scales.append)]
    )
    assert scales[0].shape == (*tokens.shape, 1)
    x = streams[0]
    if hooked.final_norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    by_hand = (x / scales[0] * hooked.final_gain) @ hooked.W_U
    # What is left are the norm's and the unembedding's biases, the same at every position.
    rest = logits - by_hand
    torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "kind"), [pair for pair in EVERY_MODEL if pair[0] in ("llama", *POST_NORM)])
def test_a_heads_write_is_what_the_heads_sum_loses_without_it_scaled_as_in_this_run(architecture, kind):
    """Against Hugging Face's output projection without one head, times the factor by which its own norm scales."""
    hf, tokens = random_hf(architecture), random_tokens()
    _, written = record_hugging_face(hf, tokens)
    block = blocks_of(hf)[1]
    projection = block.self_attn.o_proj
    into = []
    handle = projection.register_forward_hook(lambda module, inputs, output: into.append(inputs[0]))
    with torch.no_grad():
        hf(tokens)
        handle.remove()
        before_norm = projection(into[0])
        d_head = into[0].shape[-1] // 4
        without = into[0].clone()
        without[..., 2 * d_head : 3 * d_head] = 0.0
        factor = written[("attn_out", 1)] / before_norm
        expected = (before_norm - projection(without)) * factor
        expected_bias = projection(torch.zeros_like(into[0])) * factor
    hooked = Hooked(random_hooked(architecture, kind))
    z = []
    hooked.run(tokens, [("z", 1, z.append)])
    heads, bias = hooked.head_writes(1, z[0])
    torch.testing.assert_close(heads[:, :, 2], expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(bias, expected_bias, atol=1e-4, rtol=1e-3)
    last, _ = hooked.head_writes(1, z[0][:, -1:])
    torch.testing.assert_close(last, heads[:, -1:])
    directions = torch.randn(heads[:, :, 0].shape, generator=torch.Generator().manual_seed(0))
    projections = hooked.head_projections(1, z[0], directions)
    torch.testing.assert_close(projections[:, :, 2], (expected * directions).sum(-1), atol=1e-3, rtol=1e-3)


def test_heads_before_another_norm_than_rmsnorm_and_layers_that_do_not_exist_are_refused():
    hooked = Hooked(random_hooked("olmo2", "bridge"))
    z = torch.zeros(1, 2, hooked.n_heads, hooked.d_head)
    with pytest.raises(ValueError, match="layer -1 does not exist"):
        hooked.head_writes(-1, z)
    hooked.cfg.normalization_type, hooked.cfg.final_rms = "LN", False
    with pytest.raises(ValueError, match="other than RMSNorm"):
        hooked.head_writes(0, z)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has TransformerBridge only")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_heads_of_a_hooked_transformer_with_norms_on_both_sides_add_up_to_attn_out():
    """As `HookedTransformer.from_pretrained` makes them of Gemma 2."""
    from transformer_lens import HookedTransformer

    sizes = {"n_layers": 1, "d_model": 32, "d_head": 8, "n_heads": 4, "n_ctx": 48, "d_vocab": 50, "d_mlp": 64}
    norms = {"normalization_type": "RMS", "use_normalization_before_and_after": True}
    hooked = Hooked(HookedTransformer({**sizes, **norms, "act_fn": "relu", "seed": 0, "device": "cpu"}))
    with torch.no_grad():
        hooked.model.blocks[0].ln1_post.w.uniform_(0.5, 1.5)
    _, seen = record(hooked, random_tokens(), ("z", "attn_out"))
    heads, bias = hooked.head_writes(0, seen[("z", 0)])
    torch.testing.assert_close(heads.sum(2) + bias, seen[("attn_out", 0)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", BRIDGE_ONLY)
def test_what_hooked_transformer_cannot_represent_loads_as_a_bridge(architecture):
    assert type(random_hooked(architecture, None)).__name__ == "TransformerBridge"


@every_architecture
def test_starting_at_a_layer_equals_the_full_pass(architecture, kind):
    hooked, tokens = Hooked(random_hooked(architecture, kind)), random_tokens()
    streams = []
    full = hooked.run(tokens, [("resid_pre", 2, streams.append)])
    torch.testing.assert_close(hooked.run(tokens, start=(2, streams[0])), full, atol=1e-5, rtol=0)
    changed = hooked.run(tokens, start=(2, torch.zeros_like(streams[0])))
    assert (changed - full).abs().max() > 0.1


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_of_the_layer_that_a_run_starts_at_see_and_edit_what_is_handed_in(layer, kind):
    hooked, tokens = Hooked(random_hooked("llama", kind)), random_tokens()
    resid = torch.randn(*tokens.shape, hooked.d_model)
    seen = []
    edited = hooked.run(
        tokens,
        [("resid_pre", layer, lambda x: seen.append(x.clone())), ("resid_pre", layer, lambda x: 2 * x)],
        start=(layer, resid),
    )
    torch.testing.assert_close(seen, [resid])
    torch.testing.assert_close(edited, hooked.run(tokens, start=(layer, 2 * resid)))
    assert (edited - hooked.run(tokens, start=(layer, resid))).abs().max() > 0.1


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_that_a_run_cannot_start_at_are_refused(layer, kind):
    hooked, tokens = Hooked(random_hooked("llama", kind)), random_tokens()
    with pytest.raises(ValueError, match=f"cannot start at layer {layer}"):
        hooked.run(tokens, start=(layer, torch.zeros(*tokens.shape, hooked.d_model)))


@pytest.mark.parametrize("max_bytes", [2**26, 2**28])
@pytest.mark.parametrize(
    ("length", "past", "d_vocab"),
    [(4, 0, 50_000), (1024, 0, 50), (1, 1023, 50), (1, 4000, 50), (256, 4000, 50), (64, 0, 500)],
)
def test_a_batch_is_as_large_as_its_largest_tensors_allow(length, past, d_vocab, max_bytes):
    hooked = Hooked(random_hooked("llama", None), max_bytes=max_bytes)
    hooked.cfg.d_vocab = d_vocab
    n_layers, n_heads, d_head, float32 = 3, 4, 16, 4
    logits, pattern = d_vocab * length * float32, n_heads * length * (length + past) * float32
    cache = 2 * n_layers * n_heads * d_head * past * float32
    activations = (4 * 64 + 3 * 96) * length * float32
    size = hooked.batch_size(length, past=past)
    # Scores, probabilities and a float32 copy; the cache and a copy of it.
    assert size * max(3 * logits, 3 * pattern, 2 * cache) <= max_bytes
    assert (size + 1) * (3 * max(logits, pattern) + 2 * cache + activations) > max_bytes


def test_a_batch_has_at_least_one_sequence():
    assert Hooked(random_hooked("llama", None), max_bytes=1).batch_size(20, past=10) == 1
    with pytest.raises(ValueError, match="max_bytes must be a whole number of at least 1, got 0"):
        Hooked(random_hooked("llama", None), max_bytes=0)


@every_architecture
def test_blocks_before_the_start_are_not_run(architecture, kind):
    hooked, tokens = Hooked(random_hooked(architecture, kind)), random_tokens()
    resid = torch.randn(*tokens.shape, hooked.d_model)
    for start in range(hooked.n_layers + 1):
        ran = []
        hooked.run(
            tokens,
            [("z", layer, lambda _, layer=layer, ran=ran: ran.append(layer)) for layer in range(3)],
            start=(start, resid),
        )
        assert ran == list(range(start, hooked.n_layers))


@every_architecture
def test_stopping_after_a_layer_returns_the_stream_that_leaves_it(architecture, kind):
    hooked, tokens = Hooked(random_hooked(architecture, kind)), random_tokens()
    full, seen = record(hooked, tokens, ("resid_pre", "resid_post"))
    for stop in range(hooked.n_layers):
        torch.testing.assert_close(hooked.run(tokens, stop=stop), seen[("resid_post", stop)])
    entered = []
    resid = hooked.run(
        tokens, [("resid_pre", layer, entered.append) for layer in range(3)], start=(1, seen[("resid_pre", 1)]), stop=1
    )
    torch.testing.assert_close(resid, seen[("resid_post", 1)])
    assert len(entered) == 1
    torch.testing.assert_close(hooked.run(tokens), full)


@pytest.mark.parametrize(("architecture", "kind"), EVERY_MODEL)
def test_going_on_from_keys_and_values_equals_the_full_pass(architecture, kind):
    hooked, tokens = Hooked(random_hooked(architecture, kind)), random_tokens()
    full, seen = record(hooked, tokens, ("resid_pre",))
    past = hooked.key_values(tokens[:, :-2])
    for _ in range(2):  # the second run finds the cache as the first one did
        torch.testing.assert_close(hooked.run(tokens[:, -2:], past=past), full[:, -2:], atol=1e-4, rtol=0)
    index = torch.tensor([3, 0, 0, 2, 1])
    gone_on = hooked.run(tokens[index, -2:], past=past.rows(index))
    torch.testing.assert_close(gone_on, full[index, -2:], atol=1e-4, rtol=0)
    for layer in range(hooked.n_layers + 1):
        resid = seen[("resid_pre", layer)] if layer < hooked.n_layers else hooked.run(tokens, stop=layer - 1)
        chosen = past.rows(index, first_layer=layer)
        for _ in range(2):
            gone_on = hooked.run(tokens[index, -2:], start=(layer, resid[index, -2:]), past=chosen)
            torch.testing.assert_close(gone_on, full[index, -2:], atol=1e-4, rtol=0)


@every_architecture
def test_gradients_are_recorded_on_request_only(architecture, kind):
    hooked, tokens = Hooked(random_hooked(architecture, kind)), random_tokens()
    leaves = []

    def leaf(z):
        leaves.append(z.detach().requires_grad_())
        return leaves[-1]

    logits = hooked.run(tokens, [("z", 1, leaf)], gradients=True)
    (gradient,) = torch.autograd.grad(logits[:, -1, 0].sum(), leaves)
    step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    ends = [hooked.run(tokens, [("z", 1, lambda z, s=s: z + s * step)])[:, -1, 0].double().sum() for s in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2, (gradient * step).sum().double(), atol=1e-3, rtol=1e-2)
    assert not hooked.run(tokens).requires_grad
    assert all(parameter.grad is None for parameter in hooked.model.parameters())


@every_architecture
def test_zeroing_a_layers_attention_equals_a_raw_pytorch_hook(architecture, kind):
    hf, tokens = random_hf(architecture), random_tokens()
    block = blocks_of(hf)[1]
    # The norm of zeros is zero, so that for OLMo-2, too, attention adds nothing.
    handle = attention_of(block).register_forward_hook(lambda *args: (torch.zeros_like(args[2][0]), *args[2][1:]))
    with torch.no_grad():
        expected = hf(tokens).logits
    handle.remove()
    hooked = Hooked(random_hooked(architecture, kind))
    ablated = hooked.run(tokens, [("attn_out", 1, torch.zeros_like)])
    torch.testing.assert_close(ablated, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("architecture", ["llama", "olmo", "olmo2", "gpt2", "gpt_neox-sequential"])
def test_an_edit_of_resid_mid_acts_on_mlp_and_stream(architecture, kind):
    hooked, tokens = Hooked(random_hooked(architecture, kind)), random_tokens()
    seen = {}

    def flip(mid):
        seen["mid"] = mid.clone()
        return mid.flip(-1)

    hooked.run(
        tokens,
        [
            ("resid_mid", 1, flip),
            ("resid_pre", 1, lambda x: seen.update(pre=x.clone())),
            ("mlp_out", 1, lambda x: seen.update(mlp=x.clone())),
            ("resid_post", 1, lambda x: seen.update(post=x.clone())),
        ],
    )
    plain = {}
    hooked.run(
        tokens,
        [("attn_out", 1, lambda x: plain.update(attn=x)), ("mlp_out", 1, lambda x: plain.update(mlp=x))],
    )
    torch.testing.assert_close(seen["mid"], seen["pre"] + plain["attn"], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["post"], seen["mid"].flip(-1) + seen["mlp"], atol=1e-4, rtol=1e-4)
    assert (plain["mlp"] - seen["mlp"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", CLASSES)
def test_resid_mid_is_refused_where_attention_and_mlp_are_parallel(kind):
    hooked = Hooked(random_hooked("gpt_neox", kind))
    with pytest.raises(ValueError, match="parallel"):
        hooked.run(random_tokens(), [("resid_mid", 0, torch.zeros_like)])


@pytest.mark.parametrize("kind", CLASSES)
def test_model_is_left_as_the_caller_had_it_also_after_an_exception(kind):
    model = random_hooked("llama", kind)
    model.train()
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calls = []
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda x, hook: calls.append(1) or x)
    before = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}

    def fail(_):
        raise KeyError("in mid-run")

    hooked = Hooked(model)
    hooked.run(random_tokens(), [("pattern", 0, lambda pattern: None)])
    with pytest.raises(KeyError, match="in mid-run"):
        hooked.run(random_tokens(), [("pattern", 0, lambda pattern: None), ("z", 1, fail)])
    assert len(calls) == 2
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", CLASSES)
def test_patterns_of_chosen_heads_come_in_the_order_asked(kind):
    hooked, tokens = Hooked(random_hooked("llama", kind)), random_tokens(2, 9)
    everything = reduce_patterns(hooked, tokens, lambda pattern: pattern.clone())
    chosen = patterns(hooked, tokens, [(2, 3), (0, 1)])
    assert chosen.shape == (2, 2, 9, 9)
    torch.testing.assert_close(torch.as_tensor(chosen[:, 0]), everything[2][:, 3])
    torch.testing.assert_close(torch.as_tensor(chosen[:, 1]), everything[0][:, 1])
    with pytest.raises(ValueError, match="no L3H0"):
        patterns(hooked, tokens, [(3, 0)])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, CONTEXT + 1, dtype=torch.long), "longer than the model's context"),
        (torch.full((2, 4), 50), "token ids must lie in 0..49"),
        (torch.zeros(4, dtype=torch.long), "shape"),
        (torch.zeros(2, 4), "whole token ids"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_named(tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Hooked(random_hooked("llama", "bridge")).check_tokens(tokens)


def test_unknown_sites_and_models_are_refused():
    hooked = Hooked(random_hooked("llama", "bridge"))
    with pytest.raises(ValueError, match="no site 'resid_middle'"):
        hooked.run(random_tokens(), [("resid_middle", 0, torch.zeros_like)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        hooked.run(random_tokens(), [("z", 7, torch.zeros_like)])
    with pytest.raises(TypeError, match="load_model"):
        Hooked(random_hf("llama"))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_stop_before_the_start_is_refused(kind):
    hooked, tokens = Hooked(random_hooked("llama", kind)), random_tokens()
    with pytest.raises(ValueError, match="cannot stop after layer 1 in a run that starts at layer 2"):
        hooked.run(tokens, start=(2, torch.zeros(*tokens.shape, 64)), stop=1)
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        hooked.head_projections(3, torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 64))
