"""One view of `HookedTransformer` and `TransformerBridge`: the only file that knows one from the other.

Everything above this file speaks of *sites* (`("pattern", 3)`, `("attn_out", 0)`), reads and edits them in one way, and
gets the same numbers from both classes and both generations of TransformerLens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechhier.arguments import shown, whole_number
from mechhier.models.errors import CapabilityError
from mechhier.models.token_ids import token_ids
from mechhier.models.torch_state import default_torch_state, in_default_torch_state

SiteName: TypeAlias = Literal[
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "mlp_post",
    "final_scale",
]
HookFunction: TypeAlias = Callable[[Tensor], Tensor | None]
Hook: TypeAlias = tuple[SiteName, int | None, HookFunction]
"""Where (site, layer; layer is None for "embed" and "final_scale") and what: a function that returns None only reads,
one that returns a tensor of the same shape replaces the activation."""

_IN_BLOCK = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "mlp_post": "mlp.hook_post",
}
MAX_BYTES = 2**30
"""Default working memory of one batch beyond the weights."""
_COPIES = 3
"""Tensors of the size of the logits, and of a layer's pattern, that exist at a time: scores, softmax, float32 copy."""


_ROWS: ContextVar[Tensor | None] = ContextVar("rows", default=None)


def rows_being_run() -> Int[Tensor, " batch"] | None:
    """Which sequences of a measurement the rows of the batch being run are; None in a call of the model itself.

    For edits of a caller that differ from row to row, so that they do not depend on how a measurement makes batches.
    """
    return _ROWS.get()


VERIFICATION = "_mechhier_verification"
"""Where a hooked model carries its `Verification`."""


@dataclass(frozen=True)
class Verification:
    """What was seen of a hooked model before any number was measured on it (`mechhier.models.verification`).

    Attributes:
        right: What was looked at and found right; empty where nobody looked (`verify=False`).
        wrong: What must not be used, and why. Names of sites ("z": it can be neither read nor edited), of edits
            ("pattern edits"), and "component writes", "head writes", "head weights", "direct effects", "restart",
            "cached keys". For the last two the whole run takes their place.
        n_kv_heads: Number of heads that keys and values have; None: as the config says.
        parallel: Whether attention and MLP of a block do not see each other; None: as the config says.
        head_multiplier: By what z times W_O is multiplied before it is `attn_out`.
        logit_multiplier: By what the normed stream times the unembedding is multiplied.
        has_sinks: Whether a part of the attention goes to no key.
    """

    right: tuple[str, ...] = ()
    wrong: Mapping[str, str] = field(default_factory=dict)
    n_kv_heads: int | None = None
    parallel: bool | None = None
    head_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    has_sinks: bool = False

    def __str__(self) -> str:
        if not self.right:
            return "not verified"
        wrong = "".join(f"; not {name}: {why}" for name, why in self.wrong.items())
        return f"verified: {', '.join(self.right)}{wrong}"


class _Stop(Exception):
    """Raised in a hook to end a forward pass early; carries the residual stream."""

    def __init__(self, resid: Tensor):
        self.resid = resid


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of every layer for some tokens, from which a run on the tokens after them goes on.

    Attributes:
        cache: In the hooked model's own form; never changed.
    """

    cache: Any

    def rows(self, index: Int[Tensor, " row"], *, first_layer: int = 0) -> KeyValues:
        """Those of the given sequences, in that order, for runs from a layer on; a sequence may be given several times.

        Copies them. The earlier layers' are left as they are.
        """
        fresh = self.unshared()
        if hasattr(fresh, "layers"):
            for layer in fresh.layers[first_layer:]:
                layer.batch_select_indices(index)
        else:
            fresh.entries = [
                entry
                if layer < first_layer
                else type(entry)(entry.past_keys[index], entry.past_values[index], frozen=True)
                for layer, entry in enumerate(fresh.entries)
            ]
            fresh.previous_attention_mask = fresh.previous_attention_mask[index]
        return KeyValues(fresh)

    def unshared(self) -> Any:
        """A cache to hand to the model, which appends to what it is given: the same tensors in containers of its own."""
        cache = copy.copy(self.cache)
        if hasattr(cache, "layers"):
            cache.layers = [copy.copy(layer) for layer in cache.layers]
        return cache


def _described(model: Any) -> str:
    """What was given in place of a hooked model, and how it becomes one."""
    kind = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__}: load one, mechhier.load_model(...)"
    if isinstance(model, str | Path):
        return f"{shown(str(model))}: load it first, mechhier.load_model({shown(str(model))})"
    if kind == "Run" and hasattr(model, "load"):
        return "a Run: give one of its checkpoints, run.load('last')"
    if kind == "PlantedModel":
        return "a PlantedModel: load it first, mechhier.load_model(planted.model)"
    if hasattr(model, "config") and hasattr(model, "generate"):
        return f"the Hugging Face model {kind}: load it first, mechhier.load_model(model)"
    return f"{kind}; mechhier.load_model(...) makes one from a Hugging Face model, a folder, or a hub name"


class Hooked:
    """A hooked model, whichever of TransformerLens's classes it is.

    Sites and shapes (`pos` is the position in the sequence):

    | site | shape | meaning |
    |---|---|---|
    | embed | batch pos d_model | the residual stream that enters layer 0 (token and learned position embeddings) |
    | resid_pre, resid_mid, resid_post | batch pos d_model | the stream before, within (if not parallel), after a layer |
    | attn_out, mlp_out | batch pos d_model | what attention, MLP add to the residual stream, biases and post-norms included |
    | q | batch pos head d_head | a head's queries, before any norm or rotation of them |
    | k, v | batch pos kv_head d_head | keys (as q) and values; with grouped queries fewer heads than q |
    | z | batch pos head d_head | a head's output before W_O |
    | pattern | batch head query key | attention probabilities |
    | mlp_post | batch pos d_mlp | the MLP's neurons: what enters its output matrix |
    | final_scale | batch pos 1 | the final norm's sigma; can only be read; not in a model without norms |

    Args:
        model: A `HookedTransformer` or a `TransformerBridge` of a decoder-only model with unfolded or folded weights.
        max_bytes: Working memory of one batch, from which `batch_size` follows.

    A model that `load_model` has not looked at is looked at here, once: see `mechhier.models.verification`.

    Raises:
        TypeError: `model` is neither.
        ValueError: `max_bytes` is not positive; a model on the device "meta".
        UnsupportedModelError: The model was seen to be none that can be measured.
    """

    def __init__(self, model: Any, *, max_bytes: int = MAX_BYTES):
        if isinstance(model, type) or not all(hasattr(model, name) for name in ("cfg", "hook_dict", "run_with_hooks")):
            raise TypeError(
                f"expected a TransformerLens HookedTransformer or TransformerBridge, got {_described(model)}"
            )
        max_bytes = whole_number("max_bytes", max_bytes, at_least=1)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "the model is on the device 'meta', where weights have no values: load it with its weights, "
                "mechhier.load_model(...)"
            )
        self.model = model
        self.cfg = model.cfg
        self.max_bytes = max_bytes
        self._hook_names = frozenset(model.hook_dict)  # TransformerBridge makes the dictionary anew each time
        self._is_bridge = type(model).__name__ == "TransformerBridge"
        self._block_returns: type | None = None
        if VERIFICATION not in model.__dict__:
            from mechhier.models.verification import verify

            verify(model)

    @property
    def verification(self) -> Verification:
        """What was seen of the model when it was loaded."""
        return self.model.__dict__[VERIFICATION]

    def require(self, capability: str) -> None:
        """Refuse to go on without something that was seen to be wrong.

        Raises:
            CapabilityError: The model cannot do this; the message says what was seen.
        """
        why = self.verification.wrong.get(capability)
        if why is not None:
            raise CapabilityError(
                f"{type(self.model).__name__} of this architecture has no sound {capability}: {why}. This was seen when "
                "the model was loaded. What to do: what does not need it can be measured; else load the other class of "
                "model (as_=), or another architecture"
            )

    def can(self, capability: str) -> bool:
        """Whether nothing speaks against a capability; see `Verification.wrong` for their names."""
        return capability not in self.verification.wrong

    n_layers = property(lambda self: int(self.cfg.n_layers), doc="Number of blocks.")
    n_heads = property(lambda self: int(self.cfg.n_heads), doc="Number of query heads in a layer.")
    d_model = property(lambda self: int(self.cfg.d_model), doc="Width of the residual stream.")
    d_head = property(lambda self: int(self.cfg.d_head), doc="Width of one head.")
    d_vocab = property(lambda self: int(self.cfg.d_vocab), doc="Number of tokens.")
    n_ctx = property(lambda self: int(self.cfg.n_ctx), doc="Longest sequence, in tokens.")
    eps = property(lambda self: float(self.cfg.eps), doc="What the norms add to the variance.")
    d_mlp = property(lambda self: int(getattr(self.cfg, "d_mlp", None) or 0), doc="Number of neurons of an MLP.")
    attn_only = property(lambda self: bool(getattr(self.cfg, "attn_only", False)), doc="Whether there are no MLPs.")

    @property
    def parallel(self) -> bool:
        """Whether a block's attention and MLP both read resid_pre (GPT-NeoX), so that neither sees the other."""
        seen = self.verification.parallel
        return bool(getattr(self.cfg, "parallel_attn_mlp", False)) if seen is None else seen

    @property
    def n_kv_heads(self) -> int:
        """Number of heads that keys and values have; fewer than `n_heads` with grouped queries."""
        return int(self.verification.n_kv_heads or getattr(self.cfg, "n_key_value_heads", None) or self.n_heads)

    @property
    def rope_types(self) -> frozenset[str]:
        """The kinds of scaled rotary embedding in the model, by Hugging Face's names, where it says them."""
        config = getattr(getattr(self.model, "original_model", None), "config", None)
        settings = getattr(config, "rope_parameters", None) or {}
        # Models with layers of several kinds have settings for each.
        kinds = [each.get("rope_type") for each in (settings, *settings.values()) if isinstance(each, dict)]
        return frozenset(str(kind) for kind in kinds if kind not in (None, "default"))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding."""
        return self.model.W_E.detach()

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.model.W_U.detach()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.W_U.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.W_U.dtype

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of every head of a layer; what a head adds to the residual stream is in `head_writes`."""
        return self.model.blocks[layer].attn.W_O.detach()

    def W_Q(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """Query weights of every head of a layer."""
        return self._of_query_heads(self.model.blocks[layer].attn.W_Q)

    def W_K(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """Key weights of every query head of a layer; heads of one group have the same."""
        return self._of_query_heads(self.model.blocks[layer].attn.W_K)

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """Value weights of every query head of a layer; heads of one group have the same."""
        return self._of_query_heads(self.model.blocks[layer].attn.W_V)

    def _of_query_heads(self, weights: Tensor) -> Float[Tensor, "head d_model d_head"]:
        # HookedTransformer repeats the weights of grouped heads, TransformerBridge does not.
        return weights.detach().repeat_interleave(self.n_heads // len(weights), dim=0)

    def attention_gains(self, layer: int) -> tuple[Float[Tensor, " d_model"] | None, Float[Tensor, " d_model"] | None]:
        """Gains gamma of the norms before a layer's queries, keys and values, and after its heads' sum.

        Ones for a norm without a gain (OLMo, folded weights), None where there is no norm: before attention in OLMo-2,
        after it in most.
        """
        self._check_layer(layer)
        before, after = getattr(self.model.blocks[layer], "ln1", None), self._post_attention_norm(layer)
        if self.final_norm == "none" or before is after:
            before = None
        return None if before is None else self._gain(before), None if after is None else self._gain(after)

    def head_writes(
        self, layer: int, z: Float[Tensor, "batch pos head d_head"]
    ) -> tuple[Float[Tensor, "batch pos head d_model"], Float[Tensor, "batch pos d_model"]]:
        """What every head of a layer, and the output bias, add to the residual stream; together they are `attn_out`.

        Where attention writes to the stream directly, a head's write is `z[head] @ W_O[head]` (in Granite times its
        multiplier). In a post-norm model (OLMo-2) an RMSNorm stands between the two: attn_out = gamma x / sigma(x) with x
        the sum over heads of `z[head] @ W_O[head]`, plus the bias. Each summand is given its share, gamma
        `z[head] @ W_O[head]` / sigma, with sigma frozen at this run's value for the position. The shares add up exactly,
        but sigma depends on all heads: without one head the others' writes change too, so that ablating a head (an edit
        of `z`) does not just remove its write.

        Args:
            layer: Index of the layer.
            z: The site `"z"` of that layer, of all heads, at any positions.

        Returns:
            The heads' writes and the bias's (zeros where there is none), float32. Memory: n_heads times that of
            `attn_out`; no forward pass.

        Raises:
            ValueError: No such layer, or a norm after attention that is not an RMSNorm.
        """
        self._check_layer(layer)
        self.require("head writes")
        multiplier = self.verification.head_multiplier
        writes = torch.einsum("bphd,hdm->bphm", z.float(), self.W_O(layer).float()) * multiplier
        bias = self.model.blocks[layer].attn.b_O
        bias = torch.zeros_like(writes[:, :, 0]) if bias is None else bias.detach().float().expand_as(writes[:, :, 0])
        bias = bias * multiplier
        norm = self._post_attention_norm(layer)
        if norm is None:
            return writes, bias
        if self.final_norm != "rms":
            raise ValueError("the writes of single heads are not defined before a norm other than RMSNorm")
        sigma = ((writes.sum(2) + bias).pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt()
        share = self._gain(norm).float() / sigma
        return writes * share[:, :, None], bias * share

    def head_projections(
        self,
        layer: int,
        z: Float[Tensor, "batch pos head d_head"],
        directions: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos head"]:
        """Each head's write (`head_writes`) times a direction, without making the writes; float32.

        Raises:
            ValueError: As `head_writes`.
        """
        self._check_layer(layer)
        self.require("head writes")
        if self._post_attention_norm(layer) is not None:
            writes, _ = self.head_writes(layer, z)
            return torch.einsum("bphm,bpm->bph", writes, directions)
        by_head = torch.einsum("bpm,hdm->bphd", directions, self.W_O(layer).float())
        return torch.einsum("bphd,bphd->bph", z.float(), by_head) * self.verification.head_multiplier

    def _post_attention_norm(self, layer: int) -> torch.nn.Module | None:
        """The norm between the heads' sum and the residual stream, if there is one."""
        block = self.model.blocks[layer]
        if self._is_bridge:
            # The Bridge names the norms of post-norm models differently from version to version; what is behind
            # hook_attn_out tells.
            attn_out = self.model.hook_dict[f"blocks.{layer}.hook_attn_out"]
            norms = (getattr(block, name, None) for name in ("ln1", "ln1_post"))
            return next((norm for norm in norms if getattr(norm, "hook_out", None) is attn_out), None)
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

        if self.cfg.original_architecture in POST_NORM_ARCHITECTURES:
            return block.ln1
        return getattr(block, "ln1_post", None)

    def _gain(self, norm: torch.nn.Module) -> Float[Tensor, " d_model"]:
        """A norm's gain gamma; ones where it has none (OLMo, folded weights).

        HookedTransformer stores gamma. The Bridge leaves the weight as the architecture has it, gamma or gamma - 1
        (Gemma, Nemotron); which, the norm itself tells.
        """
        weight = getattr(norm, "w", None)
        if weight is None:
            return torch.ones(self.d_model, device=self.device, dtype=self.dtype)
        inner = getattr(norm, "original_component", None) if self._is_bridge else None
        return weight.detach() if inner is None else weight.detach() + self._offset(inner, weight.detach())

    def _offset(self, norm: torch.nn.Module, weight: Float[Tensor, " d_model"]) -> float:
        """What a norm adds to its weight before it multiplies: 0 or 1."""
        # The norm is odd but for its bias: norm(x) - norm(-x) = 2 gamma x / sigma(x), and x has mean 0.
        x = torch.ones_like(weight)
        x[1::2] = -1
        x[len(x) // 2 * 2 :] = 0
        with torch.no_grad():
            both = norm(torch.stack([x, -x])[None])[0].float()
        gain = ((both[0] - both[1]) / 2)[x != 0] * x.float()[x != 0] * x.float().pow(2).mean().sqrt()
        return float((gain - weight.float()[x != 0]).median().round())

    @property
    def final_gain(self) -> Float[Tensor, " d_model"]:
        """The final norm's gain gamma; ones where the norm has none (OLMo, folded weights) or there is no norm."""
        if self.final_norm == "none":
            return torch.ones(self.d_model, device=self.device, dtype=self.dtype)
        return self._gain(self.model.ln_final)

    @property
    def final_norm(self) -> Literal["layer", "rms", "none"]:
        """The kind of the final norm: LayerNorm (which also centres over d_model), RMSNorm, or none at all."""
        kind = getattr(self.cfg, "normalization_type", None)
        if kind is None:
            return "none"
        return "rms" if kind.startswith("RMS") or getattr(self.cfg, "final_rms", False) else "layer"

    def batch_size(self, length: int, *, past: int = 0) -> int:
        """Sequences of `length` tokens whose logits, attention patterns and activations fit in `max_bytes`; at least one.

        An estimate for one forward pass, three copies of the largest tensors included, and with the keys and values of
        `past` earlier tokens two copies of those.
        """
        logits = _COPIES * 4 * self.d_vocab
        pattern = _COPIES * 4 * self.n_heads * (length + past)
        stream = 4 * (4 * self.d_model + 3 * self.d_mlp)
        kept = 2 * 2 * self.n_layers * past * self.n_heads * self.d_head * self.dtype.itemsize
        return max(1, self.max_bytes // (length * (max(logits, pattern) + stream) + kept))

    @classmethod
    def of(cls, model: Any, *, max_bytes: int = MAX_BYTES) -> Hooked:
        """The view of a model; a view is returned as it is."""
        return model if isinstance(model, Hooked) else cls(model, max_bytes=max_bytes)

    @in_default_torch_state
    def check_tokens(self, tokens: Any, name: str = "tokens") -> Int[Tensor, "batch pos"]:
        """`tokens` as a long tensor on the model's device; `token_ids` says what is accepted.

        Args:
            tokens: Ids.
            name: What an error calls them.

        Raises:
            TypeError: Text, floats, a mask, or anything else that holds no ids.
            ValueError: Not two-dimensional, longer than the context, empty, or an id outside the vocabulary.
        """
        tokens = token_ids(tokens, name)
        if tokens.shape[1] > self.n_ctx:
            raise ValueError(
                f"sequences of {tokens.shape[1]} {name} are longer than the model's context of {self.n_ctx}; "
                f"cut them to {name}[:, :{self.n_ctx}]"
            )
        outside = tokens[(tokens < 0) | (tokens >= self.d_vocab)]
        if len(outside):
            found = f"{int(outside.min())}..{int(outside.max())}"
            raise ValueError(
                f"{name}: token ids must lie in 0..{self.d_vocab - 1} for this model, got {found} outside of that, in "
                f"{len(outside)} places: they are of another tokenizer or vocabulary, or padding"
            )
        tokens = tokens.to(device=self.device)
        return tokens.clone() if tokens.is_inference() else tokens  # autograd keeps no tensor of inference mode

    @contextmanager
    def preserved(self, *, gradients: bool = False) -> Iterator[None]:
        """Evaluation mode, with gradients if asked, torch as in a fresh process; all as it was afterwards, come what may."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with default_torch_state(), torch.set_grad_enabled(gradients):
                yield
        finally:
            for module in training:
                module.training = True

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        hooks: Iterable[Hook] = (),
        *,
        start: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
        stop: int | None = None,
        past: KeyValues | None = None,
        gradients: bool = False,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "batch pos d_model"]:
        """Logits of one forward pass with hooks, which are gone afterwards; hooks of the caller stay and act.

        Args:
            tokens: Token ids, without padding.
            hooks: What to read and edit. Hooks of one site act in the order given.
            start: `(layer, resid_pre)`: begin at that layer with that residual stream instead of at the tokens;
                `n_layers` leaves the final norm and the unembedding. The layers before it are not run, nor are
                their hooks.
            stop: End after this layer and return the residual stream that leaves it instead of logits.
            past: Keys and values of the tokens before `tokens` (`key_values`); exact, because they are causal.
            gradients: Record gradients.
            rows: Which sequences of a measurement these are (`rows_being_run`).

        Raises:
            ValueError: No such site or layer in this model, or a stop before the start.
        """
        if start is not None and stop is not None and stop < start[0]:
            raise ValueError(f"cannot stop after layer {stop} in a run that starts at layer {start[0]}")
        named = self.named(hooks)
        if stop is not None:
            named += self._named(("resid_post", stop, _stop))
        arguments: dict[str, Any] = {"return_type": "logits"}
        if past is not None and self._is_bridge:
            arguments |= {"past_key_values": past.unshared(), "use_cache": True}
        elif past is not None:
            arguments["past_kv_cache"] = past.unshared()
            if start is None:
                arguments["attention_mask"] = torch.ones_like(tokens)
        outer = _ROWS.set(_ROWS.get() if rows is None else rows)
        with self.preserved(gradients=gradients):
            try:
                if start is None:
                    with self._learning_what_blocks_return():
                        return self.model.run_with_hooks(tokens, fwd_hooks=named, **arguments)
                return self._run_from(*start, tokens, named, arguments)
            except _Stop as stopped:
                return stopped.resid
            finally:
                _ROWS.reset(outer)

    def _run_from(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        tokens: Int[Tensor, "batch pos"],
        named: list[tuple[str, Callable[..., Tensor]]],
        arguments: dict[str, Any],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        if not 0 <= layer <= self.n_layers:
            raise ValueError(f"cannot start at layer {layer}: the model has layers 0..{self.n_layers - 1}")
        if not self.can("restart"):
            return self._run_whole(layer, resid, tokens, named, arguments)
        if not self._is_bridge:
            return self.model.run_with_hooks(resid, fwd_hooks=named, start_at_layer=layer, **arguments)
        if layer == 0:
            named = [self._adapt("blocks.0.hook_resid_pre", lambda _: resid), *named]
        # Hugging Face's model loops over its blocks itself: those to be left out hand the stream on meanwhile.
        # (TransformerLens 4 has start_at_layer for the Bridge, but runs the earlier blocks all the same.)
        skipped = list(self.model.blocks[:layer])
        if self._block_returns is None:
            # On the batch itself, because the caller's hooks of the first layer act here, too.
            with self._learning_what_blocks_return(stop=True), suppress(_Stop):
                self.model(tokens, return_type="logits")
        handed_on = resid if self._block_returns is Tensor else (resid,)
        try:
            for block in skipped:
                # In the instance's own dictionary: the Bridge's setattr goes to Hugging Face's module instead.
                block.__dict__["forward"] = lambda *args, **kwargs: handed_on
            return self.model.run_with_hooks(tokens, fwd_hooks=named, **arguments)
        finally:
            for block in skipped:
                block.__dict__.pop("forward", None)

    def _run_whole(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        tokens: Int[Tensor, "batch pos"],
        named: list[tuple[str, Callable[..., Tensor]]],
        arguments: dict[str, Any],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The run from a layer as a whole run in which the stream is replaced there: exact in every architecture."""
        entering = "hook_resid_pre" if layer < self.n_layers else "hook_resid_post"
        place = self._adapt(f"blocks.{min(layer, self.n_layers - 1)}.{entering}", lambda _: resid)
        skipped = tuple(f"blocks.{earlier}." for earlier in range(layer))
        later = [pair for pair in named if not pair[0].startswith(skipped)]
        return self.model.run_with_hooks(tokens, fwd_hooks=[place, *later], **arguments)

    @contextmanager
    def _learning_what_blocks_return(self, *, stop: bool = False) -> Iterator[None]:
        """Note in a run from the tokens whether the Bridge's blocks return a tensor or a tuple.

        That differs between versions of transformers. With `stop` the run ends there.
        """
        if not self._is_bridge or self._block_returns is not None:
            yield
            return

        def look(block: torch.nn.Module, inputs: Any, output: Any) -> None:
            is_tuple = isinstance(output, tuple)
            self._block_returns = tuple if is_tuple else Tensor
            if stop:
                raise _Stop(output[0] if is_tuple else output)

        handle = self.model.blocks[0].register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def key_values(self, tokens: Int[Tensor, "batch pos"], *, rows: Int[Tensor, " batch"] | None = None) -> KeyValues:
        """Keys and values of `tokens`, for runs on what follows them; one forward pass without the unembedding.

        Memory: 2 n_layers tensors of [batch, pos, kv_head, d_head]. `rows` as for `run`.
        """
        outer = _ROWS.set(_ROWS.get() if rows is None else rows)
        try:
            return self._key_values(tokens)
        finally:
            _ROWS.reset(outer)

    def _key_values(self, tokens: Int[Tensor, "batch pos"]) -> KeyValues:
        with self.preserved():
            if self._is_bridge:
                from transformers import DynamicCache

                cache: Any = DynamicCache(config=self.model.original_model.config)
                arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
            else:
                from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

                cache = TransformerLensKeyValueCache.init_cache(self.cfg, self.device, len(tokens))
                # Without a mask HookedTransformer makes one with the tokenizer, which it may lack.
                arguments = {"past_kv_cache": cache, "attention_mask": torch.ones_like(tokens)}
            hooks = self._named(("resid_post", self.n_layers - 1, _stop))
            with suppress(_Stop):
                self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", **arguments)
            if not self._is_bridge:
                cache.freeze()
            return KeyValues(cache)

    def named(self, hooks: Iterable[Hook]) -> list[tuple[str, Callable[..., Tensor]]]:
        """Hooks as TransformerLens takes them, for its own `model.hooks(fwd_hooks=...)` and `run_with_hooks`.

        Raises:
            ValueError: No such site or layer in this model.
        """
        return [pair for hook in hooks for pair in self._named(hook)]

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} does not exist: the model has layers 0..{self.n_layers - 1}")

    def has(self, site: SiteName, layer: int | None) -> bool:
        """Whether the model has a hook for a site (layer None for "embed" and "final_scale")."""
        try:
            return all(name in self._hook_names for name, _ in self._named((site, layer, lambda _: None)))
        except ValueError:
            return False

    def _named(self, hook: Hook) -> list[tuple[str, Callable[..., Tensor]]]:
        """TransformerLens's (name, function) pairs for one hook, checked: an unknown name is silent on some classes."""
        site, layer, function = hook
        if layer is not None:
            self._check_layer(layer)
        if site == "embed":
            return [self._adapt("blocks.0.hook_resid_pre", function)]
        if site == "final_scale":
            return [self._adapt("ln_final.hook_scale", function)]
        self.require(site)
        if site == "resid_mid":
            return self._mid(layer, function)
        if site not in _IN_BLOCK or layer is None:
            known = ", ".join(["embed", "resid_mid", "final_scale", *_IN_BLOCK])
            raise ValueError(f"no site {site!r} at layer {layer}; sites are {known}, those in a block with a layer")
        name, adapted = self._adapt(f"blocks.{layer}.{_IN_BLOCK[site]}", self._sound(site, function))
        return [(name, adapted)]

    def _sound(self, site: SiteName, function: HookFunction) -> HookFunction:
        """The function, refused where its edit would not act."""

        def act(activation: Tensor) -> Tensor | None:
            edited = function(activation)
            if edited is not None:
                self.require(f"{site} edits")
            return edited

        return act

    def _mid(self, layer: int | None, function: HookFunction) -> list[tuple[str, Callable[..., Tensor]]]:
        """The stream between attention and MLP, as resid_pre + attn_out.

        The Bridge's own hook_resid_mid is the MLP's input: an edit there changes that branch alone.
        """
        if self.parallel:
            raise ValueError("resid_mid does not exist in a model whose attention and MLP run in parallel")
        self.require("attn_out")
        resid_pre: list[Tensor] = []

        def keep(resid: Tensor) -> None:
            resid_pre[:] = [resid]

        def edit(attn_out: Tensor) -> Tensor | None:
            mid = function(resid_pre[0] + attn_out)
            return None if mid is None else mid - resid_pre[0]

        return [
            self._adapt(f"blocks.{layer}.hook_resid_pre", keep),
            self._adapt(f"blocks.{layer}.hook_attn_out", self._sound("attn_out", edit)),
        ]

    def _adapt(self, name: str, function: HookFunction) -> tuple[str, Callable[..., Tensor]]:
        if name not in self._hook_names:
            raise CapabilityError(f"{type(self.model).__name__} of this architecture has no hook {name!r}")

        def always_return(activation: Tensor, hook: Any) -> Tensor:
            edited = function(activation)
            return activation if edited is None else edited

        return name, always_return


def _stop(resid: Tensor) -> None:
    raise _Stop(resid)
