"""The scores that the paper published, computed as its released code computes them, beside what they measure.

None of these measures what its name says (except the syntax masses); they exist so that the paper's figures can be set
against sound measures of the same model. The definitions are in `published`'s docstring.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechhier.arguments import seed_number, whole_number
from mechhier.grammars import DocumentGrammar
from mechhier.models.hooked import MAX_BYTES, Hook, Hooked
from mechhier.models.loading import model_info
from mechhier.models.torch_state import in_default_torch_state
from mechhier.phenomena._tokens import natural_tokens
from mechhier.probes.attention import reduce_patterns
from mechhier.probes.provenance import provenance
from mechhier.results import MIN_SAMPLES, Variables, scored, warn_undefined
from mechhier.specs import Drawn, Size

DEFINITION = (
    "k_order_induction: attention at lag exactly n on r r, i.e. to the same token's earlier copy. hydra_drop: logit of "
    "the last input token after layer l, unembedded without the final norm, minus the same after the whole residual "
    "stream behind layer l-k was set to zero. function_vector_probability: P(o) after 's v o c s v' with random words. "
    "syntax_mass: probability of the right category after 's', 's v', 's v o c'."
)
SOURCE = "released code of arXiv 2603.06592 (Rohweder, Dutta, Gurevych 2026)"

ORDERS = tuple(range(1, 11))
DISTANCES = (1, 2)
SEGMENT = 64
MARGIN = 100
"""Token ids closer than this to either end of the vocabulary are not drawn by the released code."""
N_FUNCTION_PROMPTS = 16
TRANSITIONS = ("S->V", "V->O", "C->S")


@in_default_torch_state
def published(model: Any, *, n_sequences: Drawn = 20, max_bytes: Size = MAX_BYTES, seed: int = 0) -> xr.Dataset:
    """The paper's four scores as released, for comparison with `induction`, `function_vectors` and `hydra`.

    What they measure:

    - `k_order_induction`: attention from a token to its own earlier copy, at lag n. A perfect induction head scores 0, a
      perfect duplicate-token head 1, for every k (k only drops the first k positions). The paper plots the maximum over
      heads (`k_order_induction_max`). `induction`'s IND is the sound score.
    - `hydra_drop`: in a bias-free model the zeroed stream stays zero, so this is the clean logit of the token just read;
      it holds no ablation. `hydra` is the sound score.
    - `function_vector_probability`: subject and verb do not determine the object in the paper's language, so there is no
      function; the best possible value is the frequency of the commonest object.
    - `syntax_mass`: sound.

    The last two exist only for a model that carries a document grammar. Where the vocabulary or the context is too small
    for the released constants (n = 64, ids in [100, V - 100)), both shrink with it; attributes `segment`, `margin`.

    Cost: one forward pass for the first score; for `hydra_drop`, all layers and both distances, one without the
    unembedding and two layers for each zeroed one, together less than three; and two of a few tokens.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        n_sequences: Number of sequences for the first two scores (20 in the released code).
        max_bytes: Working memory of one batch beyond the weights.
        seed: Seed of everything drawn.

    Returns:
        `k_order_induction` `[k, layer, head]`, `k_order_induction_max` `[k]`, `hydra_drop` `[distance, layer]` (logit; NaN
        for layer < distance), `syntax_mass` `[transition]`, `function_vector_probability`; with `_low`, `_high` except
        the maximum, and `_uniform` for the first and for `syntax_mass`. With fewer than 4 sequences bounds are NaN.

    Raises:
        TypeError: Not a hooked model, or not whole numbers.
        ValueError: No sequences; a context of fewer than 32 tokens, in which ten orders have no room.
    """
    n_sequences, seed = whole_number("n_sequences", n_sequences, at_least=1), seed_number(seed)
    hooked = Hooked(model, max_bytes=max_bytes)
    segment = min(SEGMENT, hooked.n_ctx // 2)
    margin = min(MARGIN, hooked.d_vocab // 10)
    if segment <= max(ORDERS) + 4:
        raise ValueError(f"the published score needs a context of at least 32 tokens, the model has {hooked.n_ctx}")
    if n_sequences < MIN_SAMPLES:
        warn_undefined(
            f"published: an interval needs {MIN_SAMPLES} sequences, of {n_sequences} there is none: the bounds of "
            "k_order_induction, hydra_drop and syntax_mass are NaN"
        )
    rng = np.random.default_rng(seed)
    variables = _k_order(hooked, segment, margin, n_sequences, rng, seed=seed)
    text, tokens = natural_tokens(hooked, n_sequences, seed=seed)
    variables |= _hydra_drop(hooked, tokens, seed=seed)
    info = model_info(model)
    if info is not None and isinstance(info.grammar, DocumentGrammar):
        variables |= _syntax(hooked, info.grammar, n_sequences, rng, seed=seed)
        variables |= _function_prompts(hooked, info.grammar, rng, seed=seed)
    return xr.Dataset(
        variables,
        coords={
            "k": list(ORDERS),
            "layer": np.arange(hooked.n_layers),
            "head": np.arange(hooked.n_heads),
            "distance": list(DISTANCES),
            "transition": list(TRANSITIONS),
        },
        attrs=provenance(
            hooked,
            phenomenon="published",
            definition=DEFINITION,
            source=SOURCE,
            ablation="whole residual stream set to zero (hydra_drop)",
            seed=seed,
            n_sequences=n_sequences,
            segment=segment,
            margin=margin,
            text=text,
        ),
    )


def _k_order(
    hooked: Hooked, segment: int, margin: int, n_sequences: int, rng: np.random.Generator, *, seed: int
) -> Variables:
    once = rng.integers(margin, hooked.d_vocab - margin, (n_sequences, segment))
    tokens = hooked.check_tokens(np.concatenate([once, once], axis=1))

    def at_lag(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head index"]:
        return pattern.diagonal(offset=-segment, dim1=-2, dim2=-1).cpu()

    batches = [
        torch.stack(reduce_patterns(hooked, batch, at_lag), dim=1)
        for batch in tokens.split(hooked.batch_size(2 * segment))
    ]
    lagged = torch.cat(batches).double().numpy()
    by_order = np.stack([lagged[..., k:].mean(-1) for k in ORDERS], axis=1)
    long_name = "published k-order induction score: attention at lag n"
    dims = ("k", "layer", "head")
    variables = scored(
        "k_order_induction",
        dims,
        by_order,
        np.ones((1, 1, 1, 1)),
        long_name=long_name,
        units="attention mass",
        seed=seed,
    )
    uniform = 1.0 / (segment + 1.0 + np.arange(segment))
    extra = {
        "k_order_induction_max": (
            ("k",),
            variables["k_order_induction"][1].max((1, 2)),
            f"{long_name}, maximum over heads",
        ),
        "k_order_induction_uniform": (("k",), np.array([uniform[k:].mean() for k in ORDERS]), f"{long_name}, uniform"),
    }
    for name, (dims, value, label) in extra.items():
        variables[name] = (dims, value, {"long_name": label, "units": "attention mass"})
    return variables


def _hydra_drop(hooked: Hooked, tokens: Tensor, *, seed: int) -> Variables:
    drops = np.full((len(tokens), len(DISTANCES), hooked.n_layers), np.nan)
    for start in range(0, len(tokens), size := hooked.batch_size(tokens.shape[1])):
        rows = slice(start, start + size)
        batch = tokens[rows]
        directions = hooked.W_U.T[batch[:, -1]].float()
        logits: dict[int, Tensor] = {}
        streams: list[Tensor] = []

        def read(resid: Tensor, layer: int, into: dict[int, Tensor] = logits, to: Tensor = directions) -> None:
            into[layer] = (resid[:, -1].float() * to).sum(-1)

        def keep(resid: Tensor, to: list[Tensor] = streams) -> None:
            to.append(resid)

        last = hooked.n_layers - 1
        everywhere: list[Hook] = [("resid_post", layer, partial(read, layer=layer)) for layer in range(hooked.n_layers)]
        numbers = torch.arange(start, start + len(batch))
        hooked.run(batch, [*everywhere, ("embed", None, keep)], stop=last, rows=numbers)
        clean = dict(logits)
        for zeroed in range(last):
            logits.clear()
            furthest = min(zeroed + max(DISTANCES), last)
            hooked.run(
                batch,
                everywhere[zeroed + 1 : furthest + 1],
                start=(zeroed + 1, torch.zeros_like(streams[0])),
                stop=furthest,
                rows=numbers,
            )
            for index, distance in enumerate(DISTANCES):
                layer = zeroed + distance
                if layer <= last:
                    drops[rows, index, layer] = (clean[layer] - logits[layer]).cpu().numpy()
    return scored(
        "hydra_drop",
        ("distance", "layer"),
        drops,
        np.ones((1, 1, 1)),
        long_name="published Hydra score: un-normed logit of the last input token",
        units="logit",
        seed=seed,
    )


def _random_clause(grammar: DocumentGrammar, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` rows of subject, verb, object (uniform, independent) and the middle connector."""
    offsets = grammar.offsets
    words = [rng.integers(offsets[category], offsets[category + 1], n) for category in range(3)]
    return np.stack([*words, np.full(n, offsets[3] + grammar.n_connectors // 2)], axis=1)


def _syntax(
    hooked: Hooked, grammar: DocumentGrammar, n_sequences: int, rng: np.random.Generator, *, seed: int
) -> Variables:
    clauses = hooked.check_tokens(_random_clause(grammar, n_sequences, rng))
    probabilities = hooked.run(clauses).float().softmax(-1)
    # After the subject (position 0) verbs are right, after the verb objects, after the connector subjects.
    masses, shares = [], []
    for position, category in ((0, 1), (1, 2), (3, 0)):
        right = torch.as_tensor(grammar.token_categories == category, device=probabilities.device)
        masses.append(probabilities[:, position, right].sum(-1).cpu().double().numpy())
        shares.append(float(right.float().mean()))
    long_name, units = "probability of the right category", "probability"
    variables = scored(
        "syntax_mass",
        ("transition",),
        np.stack(masses, axis=1),
        np.ones((1, 1)),
        long_name=long_name,
        units=units,
        seed=seed,
    )
    label = {"long_name": f"{long_name}, uniform over tokens", "units": units}
    variables["syntax_mass_uniform"] = (("transition",), np.array(shares), label)
    return variables


def _function_prompts(hooked: Hooked, grammar: DocumentGrammar, rng: np.random.Generator, *, seed: int) -> Variables:
    clause = _random_clause(grammar, N_FUNCTION_PROMPTS, rng)
    tokens = hooked.check_tokens(np.concatenate([clause, clause[:, :2]], axis=1))
    probabilities = hooked.run(tokens)[:, -1].float().softmax(-1).cpu().double().numpy()
    return scored(
        "function_vector_probability",
        (),
        probabilities[np.arange(len(clause)), clause[:, 2]],
        np.ones(1),
        long_name="probability of o after 's v o c s v'",
        units="probability",
        seed=seed,
    )
