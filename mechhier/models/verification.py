"""Whether a hooked model is the model, and does what it is told: seen once, on a few short rows, before any number.

TransformerLens has an adapter for some hundred architectures. Some compute other logits than Hugging Face's model; in
some a hook can be read but an edit there changes nothing; in some a run cannot be continued from cached keys. None of
that raises an error. So every model is looked at when it is loaded (or first measured, if someone else built it): what is
wrong is refused by name, or that capability alone is switched off and says so when it is asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mechhier.models.errors import UnsupportedModelError
from mechhier.models.hooked import VERIFICATION, Hook, Hooked, SiteName, Verification

LENGTH = 16
"""Tokens in a row: longer than the sliding windows of small models, short enough to cost nothing."""
_LOGITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits to Hugging Face's, relative to the largest logit, by dtype."""
_ACTIVATIONS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of an activation to what it should be, relative to the largest entry."""
_ESSENTIAL: tuple[SiteName, ...] = ("resid_pre", "resid_post", "attn_out")
_RECORDED: tuple[SiteName, ...] = (
    "resid_pre",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "mlp_post",
)
_VARIANTS: dict[str, dict[SiteName, int]] = {
    "clean": {},
    "v": {"v": 1},
    "pattern": {"v": 1, "pattern": 1},
    "z": {"z": 1},
    "other z": {"z": 2},
    "q and k": {"q": 1, "k": 1},
    "other q": {"q": 2, "k": 1},
    "other k": {"q": 1, "k": 2},
    "attn_out": {"resid_pre": 1, "attn_out": 1},
    "other attn_out": {"resid_pre": 1, "attn_out": 2},
    "mlp_out": {"mlp_out": 1},
    "mlp_post": {"resid_pre": 1, "mlp_post": 1},
    "other mlp_post": {"resid_pre": 1, "mlp_post": 2},
    "resid_post": {"resid_post": 1},
}
"""Rows of one pass: at which sites, in every layer, a random activation is put in, and which one."""
_READ: dict[SiteName, tuple[str, ...]] = {
    "resid_pre": ("clean", "attn_out", "other attn_out", "mlp_out", "resid_post"),
    "resid_post": ("clean", "attn_out", "other attn_out", "mlp_out", "resid_post"),
    "attn_out": ("clean", "z", "other z", "attn_out", "other attn_out", "mlp_out"),
    "mlp_out": ("clean", "attn_out", "other attn_out", "mlp_out", "mlp_post", "other mlp_post"),
    "v": ("clean", "pattern", "v"),
    "z": ("clean", "pattern", "v", "z"),
    "pattern": ("clean", "pattern", "v", "q and k", "other q", "other k"),
    "final_scale": ("clean", "resid_post"),
}
"""What is kept of which rows: all of it would be large in a large model."""
# Keys that were made at one length of the text are wrong at another: these rotate by the length.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

Seen = dict[tuple[SiteName, int], Tensor]


class Expected(NamedTuple):
    """What Hugging Face's model computes, before TransformerLens has touched it."""

    rows: Int[Tensor, "row pos"]
    logits: Float[Tensor, "row pos d_vocab"]


def hugging_face(model: PreTrainedModel) -> Expected:
    """Logits of a Hugging Face model in evaluation mode, for the rows that `verify` looks at.

    Raises:
        UnsupportedModelError: The model cannot be run on tokens alone, or has no logits.
    """
    config: Any = model.config.get_text_config()
    n_ctx = getattr(config, "max_position_embeddings", None) or LENGTH
    rows = _rows(config.vocab_size, n_ctx if n_ctx > 0 else LENGTH)  # XLNet's -1 is no limit
    try:
        with torch.no_grad():
            return Expected(rows, model.eval()(input_ids=rows.to(model.device), use_cache=False).logits)
    except Exception as error:  # noqa: BLE001  a model of any kind can fail in any way
        raise UnsupportedModelError(
            f"Hugging Face's own {type(model).__name__} does not give logits for {rows.shape[1]} tokens "
            f"({type(error).__name__}: {error}). What to do: load a causal language model, which needs nothing but tokens"
        ) from None


def _rows(d_vocab: int, n_ctx: int) -> Int[Tensor, "row pos"]:
    """Three rows of random tokens, the same every time; the third is the first with another last token."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(d_vocab, (3, min(LENGTH, n_ctx)), generator=generator)
    rows[2, :-1] = rows[0, :-1]
    rows[2, -1] = (rows[0, -1] + 1 + int(torch.randint(max(1, d_vocab - 1), (1,), generator=generator))) % d_vocab
    return rows


def verify(model: Any, *, expected: Expected | None = None) -> Verification:
    """Look at a hooked model and attach what was seen to it, for `Hooked`.

    On three rows of `LENGTH` tokens: (a) logits equal Hugging Face's (up to a constant at each position, which folding
    changes); (b) an activation that is put in at a site, the attention pattern included, is what the model goes on
    with; (c) a run restarted at each layer, and one continued from cached keys, equal the whole run; (d) heads add up to
    `attn_out`, components to the stream, and the stream gives the logits through the final norm and the unembedding,
    with every multiplier in between (those found are used by `Hooked`); (e) a later token changes nothing earlier.

    Hooks of the caller do not act meanwhile.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        expected: Hugging Face's logits; without them (a) is left out.

    Cost: in tokens run through the model, about 16 (20 + 1.5 n_layers).

    Raises:
        UnsupportedModelError: Logits that are not Hugging Face's or not finite, attention to later tokens, or layers
            without attention or a residual stream that can be hooked.
    """
    # Hooked of a model that is being looked at takes it as it is.
    model.__dict__[VERIFICATION] = Verification()
    try:
        with _without_hooks(model):
            seen = _Look(Hooked(model), expected).all()
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a {type(model).__name__} of this architecture cannot be run on {LENGTH} tokens: "
            f"{type(error).__name__}: {error}. What to do: load it as the other class (as_=), or another architecture"
        ) from error
    finally:
        # Also when interrupted: nothing was seen then.
        del model.__dict__[VERIFICATION]
    model.__dict__[VERIFICATION] = seen
    return seen


def skip(model: Any) -> None:
    """Note that a model was not looked at, so that nobody will; results say so."""
    model.__dict__[VERIFICATION] = Verification()


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """Inside the block the hooks that are on the model's hook points do not act."""
    points = [point for point in model.hook_dict.values() if point._forward_hooks]
    kept = [point._forward_hooks for point in points]
    for point in points:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in zip(points, kept, strict=True):
            point._forward_hooks = hooks


class _Look:
    def __init__(self, hooked: Hooked, expected: Expected | None):
        self.hooked, self.expected = hooked, expected
        rows = _rows(hooked.d_vocab, hooked.n_ctx) if expected is None else expected.rows
        self.tokens = rows.to(hooked.device)
        self.layers = range(hooked.n_layers)
        self.right: list[str] = []
        self.wrong: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.tolerance = _ACTIVATIONS.get(hooked.dtype, 1e-3)

    def all(self) -> Verification:
        self.clean, self.logits = self._record()
        self._check_logits()
        self._check_causal()
        self._check_shapes()
        self.edited = self._edited()
        self._try("component writes", self._check_components)
        self._try("head writes", self._check_heads)
        self._try("direct effects", self._check_logit_of_stream)
        for site in ("pattern", "v", "z", "q", "k", "attn_out", "mlp_out", "mlp_post", "resid_post"):
            self._try(f"{site} edits", getattr(self, f"_check_edits_of_{site}"))
        self._try("order of attention and MLP", self._check_order)
        self._try("head weights", self._check_head_weights)
        self._try("restart", self._check_restart)
        self._try("cached keys", self._check_cached_keys)
        return Verification(right=tuple(self.right), wrong=self.wrong, **self.facts)

    def _try(self, capability: str, check: Callable[[], str | None]) -> None:
        """Note what a check finds: nothing, or what is wrong."""
        site = capability.removesuffix(" edits")
        if site in self.wrong:
            return
        try:
            found = check()
        except KeyError as error:
            found = (
                f"there is no {' '.join(map(str, error.args[0]))}" if isinstance(error.args[0], tuple) else str(error)
            )
        except Exception as error:  # noqa: BLE001  whatever an adapter raises here, it cannot do this
            found = f"{type(error).__name__}: {error}"
        if found is None:
            self.right.append(capability)
        else:
            self.wrong[capability] = found

    def _record(self) -> tuple[Seen, Tensor]:
        """Activations of every site that there is, and the logits."""
        seen: Seen = {}

        def keep(site: SiteName, layer: int) -> Callable[[Tensor], None]:
            def read(activation: Any) -> None:
                if isinstance(activation, Tensor):
                    seen[site, layer] = activation.clone()

            return read

        reading: list[Hook] = [
            (site, layer, keep(site, layer))
            for site in _RECORDED
            for layer in self.layers
            if self.hooked.has(site, layer)
        ]
        return seen, self.hooked.run(self.tokens, reading)

    def _differ(self, one: Tensor, other: Tensor, *, tolerance: float | None = None) -> bool:
        size = other.float().abs().max()
        return not bool((one.float() - other.float()).abs().max() <= (tolerance or self.tolerance) * size + 1e-30)

    # (a), (e): what cannot be measured at all.

    def _check_logits(self) -> None:
        if not self.logits.isfinite().all():
            raise UnsupportedModelError(
                "the model's logits are not finite numbers. What to do: load it in float32, or another checkpoint "
                "(its weights may be damaged, or its training may have diverged)"
            )
        if self.expected is not None:
            ours, theirs = (
                each.float() - each.float().mean(-1, keepdim=True) for each in (self.logits, self.expected.logits)
            )
            worst = float((ours - theirs.to(ours.device)).abs().max())
            if not worst <= _LOGITS.get(self.hooked.dtype, 1e-4) * max(1.0, float(theirs.abs().max())):
                raise UnsupportedModelError(
                    f"{type(self.hooked.model).__name__} computes other logits than Hugging Face's model, by up to "
                    f"{worst:.2g} on {len(self.tokens)} rows of {self.tokens.shape[1]} tokens. What to do: load it as the "
                    "other class (as_=), or another architecture; its numbers would be those of another model"
                )
            self.right.append("logits")
        absent = {
            site: [layer for layer in self.layers if (site, layer) not in self.clean]
            for site in _RECORDED
            if not (self.hooked.attn_only and site.startswith("mlp"))
        }
        for site in _ESSENTIAL:
            if absent[site]:
                raise UnsupportedModelError(
                    f"this is not a stack of attention layers with a residual stream: {type(self.hooked.model).__name__} "
                    f"has no {site} at layers {absent[site]}. What to do: load a model with attention in every layer"
                )
        for site, layers in absent.items():
            if layers:
                self.wrong[site] = f"there is none at layers {layers}"

    def _check_causal(self) -> None:
        before = slice(None, -1)
        changed = float((self.logits[0, before] - self.logits[2, before]).abs().max())
        patterns = [self.clean["pattern", layer] for layer in self.layers if ("pattern", layer) in self.clean]
        later = max([0.0, *(float(pattern.float().triu(1).abs().max()) for pattern in patterns if pattern.ndim == 4)])
        if self.tokens.shape[1] > 1 and (self._differ(self.logits[2, before], self.logits[0, before]) or later > 0):
            raise UnsupportedModelError(
                "this model is not causal: another last token changes the logits before it (by up to "
                f"{changed:.2g}), or attention reaches later tokens (by up to {later:.2g}). What to do: load a model "
                "that predicts the next token; for an encoder there is nothing to measure here"
            )
        self.right.append("causal")

    def _check_shapes(self) -> None:
        rows, length = self.tokens.shape
        heads, d_head = self.hooked.n_heads, self.hooked.d_head
        wanted: dict[SiteName, tuple[int | None, ...]] = {
            "q": (rows, length, heads, None),
            "k": (rows, length, None, None),
            "v": (rows, length, None, None),
            "z": (rows, length, heads, d_head),
            "pattern": (rows, heads, length, length),
        }
        for site, shape in wanted.items():
            found = {tuple(self.clean[site, layer].shape) for layer in self.layers if (site, layer) in self.clean}
            fits = all(
                len(each) == len(shape) and all(n in (None, m) for n, m in zip(shape, each, strict=True))
                for each in found
            )
            if site in "kv" and fits:
                # Layers of different numbers of groups have no common shape.
                fits = len(found) < 2 and all(heads % each[2] == 0 for each in found)
            if site == "k" and fits and found:
                (self.facts["n_kv_heads"],) = {each[2] for each in found}
            if not fits:
                self.wrong[site] = f"it has the shape {sorted(found)[0]}"

    # (b): edits, all in one pass, a row for each variant, in every layer at once.

    def _edited(self) -> dict[str, Seen]:
        rows = {name: row for row, name in enumerate(_VARIANTS)}
        seen: dict[str, Seen] = {name: {} for name in rows}

        def keep(site: SiteName, layer: int) -> Callable[[Tensor], None]:
            def read(activation: Tensor) -> None:
                if len(activation) == len(rows):
                    for name in _READ[site]:
                        seen[name][site, layer] = activation[rows[name]].clone()

            return read

        hooks: list[Hook] = []
        for site, layer in [key for key in self.clean if key[0] not in self.wrong]:
            of_site = {rows[name]: edits[site] for name, edits in _VARIANTS.items() if site in edits}
            hooks.append((site, layer, self._putting(site, layer, of_site)))
            if site in _READ:
                hooks.append((site, layer, keep(site, layer)))
        if self.hooked.has("final_scale", None):
            hooks.append(("final_scale", None, keep("final_scale", 0)))
        logits = self.hooked.run(self.tokens[:1].expand(len(rows), -1), hooks)
        self.edited_logits = dict(zip(rows, logits, strict=True))
        return seen

    def _putting(self, site: SiteName, layer: int, of_site: dict[int, int]) -> Callable[[Tensor], Tensor]:
        def put(activation: Tensor) -> Tensor:
            edited = activation.clone()
            for row, which in of_site.items():
                new = self._random(site, layer, which)
                if new.shape == activation.shape[1:]:  # a mixture of experts may have tokens as rows
                    edited[row] = new.to(edited)
            return edited

        return put

    def _random(self, site: SiteName, layer: int, which: int) -> Tensor:
        """A random activation as large as the clean one's; a pattern is one over the past."""
        clean = self.clean[site, layer][0].float()
        generator = torch.Generator().manual_seed(1000 * which + layer + 31 * len(site))
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        if site == "pattern":
            later = torch.ones_like(noise, dtype=torch.bool).triu(1)
            return noise.masked_fill(later, -torch.inf).softmax(-1)
        return noise * clean.pow(2).mean().sqrt().clamp(min=0.1)

    def _unchanged(self, site: SiteName, one: str, other: str) -> list[int]:
        """Layers in which two variants have the same activation."""
        a, b = self.edited[one], self.edited[other]
        return [layer for layer in self.layers if not self._differ(a[site, layer], b[site, layer], tolerance=1e-6)]

    def _is_attended(self, variant: str) -> bool:
        """Whether z is the pattern times the values; it is not where a gate or another projection follows."""
        if {"pattern", "v", "z"} & set(self.wrong):
            return False
        row = self.edited[variant]
        for layer in self.layers:
            values = row["v", layer].float().repeat_interleave(self.hooked.n_heads // row["v", layer].shape[1], dim=1)
            attended = torch.einsum("hqk,khd->qhd", row["pattern", layer].float(), values)
            if self._differ(attended, row["z", layer]):
                return False
        return True

    def _check_edits_of_pattern(self) -> str | None:
        if "z" in self.wrong:
            return "the heads' outputs cannot be read, so that an edit's effect is not seen"
        # With random values, which attention to other keys surely makes others of.
        if unchanged := self._unchanged("z", "v", "pattern"):
            return f"an edit changes nothing at layers {unchanged}: the attention there can only be watched"
        if self._is_attended("clean") and not self._is_attended("pattern"):
            return "an edit is not what the values are attended with"
        rows = [self.clean["pattern", layer].float().sum(-1) for layer in self.layers]
        self.facts["has_sinks"] = any(bool((row < 1 - self.tolerance).any()) for row in rows)
        return None

    def _check_edits_of_v(self) -> str | None:
        unchanged = [] if "z" in self.wrong else self._unchanged("z", "clean", "v")
        if unchanged:
            return f"an edit changes nothing at layers {unchanged}"
        edited = self._is_attended("v") or not self._is_attended("clean")
        return None if edited else "an edit is not what is attended to"

    def _check_edits_of_z(self) -> str | None:
        unchanged = [
            layer for layer in self._unchanged("attn_out", "z", "other z") if bool(self.hooked.W_O(layer).any())
        ]
        return f"an edit changes nothing at layers {unchanged}" if unchanged else None

    def _check_edits_of_q(self) -> str | None:
        return self._check_scores("other q")

    def _check_edits_of_k(self) -> str | None:
        return self._check_scores("other k")

    def _check_scores(self, other: str) -> str | None:
        if "pattern" in self.wrong or {"q", "k"} & set(self.wrong):
            return "the pattern, the queries or the keys cannot be read"
        if self.tokens.shape[1] == 1:
            return None
        unchanged = self._unchanged("pattern", "q and k", other)
        return f"an edit changes nothing at layers {unchanged}" if unchanged else None

    def _check_edits_of_attn_out(self) -> str | None:
        return self._wrong_sum("attn_out") or self._wrong_sum("other attn_out")

    def _check_edits_of_mlp_out(self) -> str | None:
        return self._wrong_sum("mlp_out")

    def _check_edits_of_mlp_post(self) -> str | None:
        if not (unchanged := self._unchanged("mlp_out", "mlp_post", "other mlp_post")):
            return None
        idle = [layer for layer in unchanged if not bool(self.hooked.model.blocks[layer].mlp.W_out.any())]
        reached = [layer for layer in unchanged if layer not in idle]
        return f"an edit changes nothing at layers {reached}" if reached else None

    def _check_edits_of_resid_post(self) -> str | None:
        row = self.edited["resid_post"]
        for layer in self.layers[:-1]:
            if self._differ(row["resid_pre", layer + 1], row["resid_post", layer]):
                return f"what leaves layer {layer} is not what enters the next"
        return None

    # (d): sums.

    def _check_components(self) -> str | None:
        wrong = self._wrong_sum("clean")
        if wrong is not None:
            self.wrong["attn_out"] = self.wrong["mlp_out"] = wrong
        return wrong

    def _wrong_sum(self, variant: str) -> str | None:
        row = self.edited[variant]
        for layer in self.layers:
            write = row["attn_out", layer]
            if not self.hooked.attn_only:
                write = write + row["mlp_out", layer]
            if self._differ(row["resid_pre", layer] + write, row["resid_post", layer]):
                return f"what attention and MLP of layer {layer} write does not add up to the change of the stream"
        return None

    def _check_heads(self) -> str | None:
        """Find the multiplier of what heads write; 1 in most architectures."""
        if "z" in self.wrong or "component writes" in self.wrong:
            return "the heads' outputs, or what attention writes, cannot be read"
        found, expected = [], []
        for row in (self.edited["clean"], self.edited["z"]):
            for layer in self.layers:
                heads, bias = self.hooked.head_writes(layer, row["z", layer][None])
                found.append((heads.sum(2) + bias)[0])
                expected.append(row["attn_out", layer].float())
        multiplier = self._multiplier(torch.stack(found), torch.stack(expected))
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if self._differ(multiplier * ours, theirs):
                return f"the heads of layer {number % len(self.layers)} do not add up to what attention writes"
        self.facts["head_multiplier"] = multiplier
        return None

    def _multiplier(self, ours: Tensor, theirs: Tensor) -> float:
        """The number times which `ours` is nearest to `theirs`; 1 where that is near enough."""
        if not self._differ(ours, theirs):
            return 1.0
        return float((ours * theirs).sum() / (ours * ours).sum().clamp(min=1e-30))

    def _check_logit_of_stream(self) -> str | None:
        if "component writes" in self.wrong:
            return self.wrong["component writes"]
        last = self.hooked.n_layers - 1
        predicted, actual = [], []
        for variant in ("clean", "resid_post"):
            row = self.edited[variant]
            stream = row["resid_post", last].float()
            if self.hooked.final_norm == "layer":
                stream = stream - stream.mean(-1, keepdim=True)
            if self.hooked.final_norm != "none":
                stream = stream * self.hooked.final_gain.float() / row["final_scale", 0].float()
            for into, logits in ((predicted, stream @ self.hooked.W_U.float()), (actual, self.edited_logits[variant])):
                into.append(logits.float() - logits.float().mean(-1, keepdim=True))
        ours, theirs = torch.cat(predicted), torch.cat(actual)
        # Biases of the norm and of the unembedding are the same at every position.
        ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
        multiplier = self._multiplier(ours, theirs)
        if self._differ(multiplier * ours, theirs):
            return "the logits are not the normed stream times the unembedding (are they capped?)"
        self.facts["logit_multiplier"] = multiplier
        return None

    def _check_order(self) -> str | None:
        """Whether attention's output reaches the MLP of its own layer, whatever the config says."""
        if self.hooked.attn_only or "mlp_out" in self.wrong:
            return None
        same = self._unchanged("mlp_out", "attn_out", "other attn_out")
        if not same:
            self.facts["parallel"] = False
        elif len(same) == len(self.layers) and self._unchanged("mlp_out", "clean", "attn_out") != same:
            self.facts["parallel"] = True
        return None

    def _check_head_weights(self) -> str | None:
        """Whether queries, keys and values are the normed stream times the weights, plus a bias."""
        if missing := {"q", "k", "v"} & set(self.wrong):
            return f"{sorted(missing)} cannot be read"
        readers: list[tuple[SiteName, Callable[[int], Tensor]]] = [
            ("q", self.hooked.W_Q),
            ("k", self.hooked.W_K),
            ("v", self.hooked.W_V),
        ]
        for layer in self.layers:
            stream = self.clean["resid_pre", layer].float()
            gain = self.hooked.attention_gains(layer)[0]
            if gain is not None:
                if self.hooked.final_norm == "layer":
                    stream = stream - stream.mean(-1, keepdim=True)
                stream = stream / (stream.pow(2).mean(-1, keepdim=True) + self.hooked.eps).sqrt() * gain.float()
            for site, weights in readers:
                read = torch.einsum("bpm,hmd->bphd", stream, weights(layer).float())
                actual = self.clean[site, layer].float()
                actual = actual.repeat_interleave(self.hooked.n_heads // actual.shape[2], dim=2)
                read, actual = (each - each.mean((0, 1)) for each in (read, actual))
                if self._differ(read, actual):
                    return f"the {site} of layer {layer} are not the normed stream times their weights"
        embedded, entering = self.hooked.W_E[self.tokens].float(), self.clean["resid_pre", 0].float()
        # The same position of two rows: what it adds itself is the same.
        embedded, entering = embedded[0] - embedded[1], entering[0] - entering[1]
        scale = (embedded * entering).sum() / (embedded * embedded).sum().clamp(min=1e-30)
        if self._differ(scale * embedded, entering):
            return "what enters layer 0 is not the token's embedding plus its position's (is there a norm between?)"
        return None

    # (c): runs that are not whole.

    def _check_restart(self) -> str | None:
        # Of another row: a stream that the model knows, since rounding grows in one that it does not.
        n = self.hooked.n_layers
        streams = [self.clean["resid_pre", layer][1] for layer in self.layers] + [self.clean["resid_post", n - 1][1]]
        sites: list[tuple[SiteName, int]] = [("resid_pre", layer) for layer in self.layers]
        sites.append(("resid_post", n - 1))

        def put(row: int) -> Callable[[Tensor], Tensor]:
            def edit(stream: Tensor) -> Tensor:
                stream = stream.clone()
                stream[row] = streams[row].to(stream)
                return stream

            return edit

        hooks: list[Hook] = [(site, layer, put(row)) for row, (site, layer) in enumerate(sites)]
        whole = self.hooked.run(self.tokens[:1].expand(n + 1, -1), hooks)
        for layer, stream in enumerate(streams):
            restarted = self.hooked.run(self.tokens[:1], start=(layer, stream[None]))
            if self._differ(restarted[0], whole[layer]):
                return f"a run that begins at layer {layer} is not the rest of the whole run"
        return None

    def _check_cached_keys(self) -> str | None:
        if self.tokens.shape[1] < 2:
            return None
        if kinds := self.hooked.rope_types & _LENGTH_DEPENDENT_ROPE:
            return f"the rotation of keys depends on the length of the text (rope_type {', '.join(sorted(kinds))})"
        past = self.hooked.key_values(self.tokens[:2, :-1])
        last = self.tokens[:2, -1:]
        continued = self.hooked.run(last, past=past)[:, -1]
        if self._differ(continued, self.logits[:2, -1]):
            return "a run that goes on from cached keys is not the end of the whole run"
        if "restart" in self.wrong:
            return "a run cannot begin at a layer"
        middle = self.hooked.n_layers // 2
        index = torch.tensor([1, 0, 1], device=self.hooked.device)
        stream = self.clean["resid_pre", middle][index, -1:]
        continued = self.hooked.run(last[index], start=(middle, stream), past=past.rows(index, first_layer=middle))[
            :, -1
        ]
        if self._differ(continued, self.logits[index, -1]):
            return "a run that begins at a layer and goes on from cached keys is not the end of the whole run"
        return None
