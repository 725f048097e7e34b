"""Results with the conventions of the phenomena and made-up numbers."""

import numpy as np
import pandas as pd
import xarray as xr

VECTORS = ["function_vector", "other_task", "random_heads", "random_norm", "grand_mean"]


def _with_interval(variables, name, dims, values, *, width, long_name, units):
    attrs = {"long_name": long_name, "units": units}
    variables[name] = (dims, values, attrs)
    variables[f"{name}_low"] = (dims, values - width, {**attrs, "long_name": f"{long_name}, lower end of the interval"})
    variables[f"{name}_high"] = (
        dims,
        values + width,
        {**attrs, "long_name": f"{long_name}, upper end of the interval"},
    )


def induction(*, layers=2, heads=4, seed=0):
    rng = np.random.default_rng(seed)
    variables = {}
    words = {
        "IND": "Attention to the token after the earlier copy (induction)",
        "DUP": "Attention to the earlier copy (duplicate token)",
        "PREV": "Attention to the previous token",
        "IND_text": "Mass on tokens that follow an earlier copy, grammar text",
        "DUP_text": "Mass on earlier copies, grammar text",
        "NEXT_text": "Mass on earlier copies of the true next token, grammar text",
    }
    for name, long_name in words.items():
        scores = rng.beta(0.6, 3, size=(layers, heads))
        _with_interval(
            variables, name, ("layer", "head"), scores, width=0.02, long_name=long_name, units="attention mass"
        )
        variables[f"{name}_uniform"] = ((), 0.08, {"long_name": f"{name} of uniform attention", "units": "1"})
        best = np.float64(scores.max())
        _with_interval(
            variables, f"{name}_best", (), best, width=0.03, long_name=f"{long_name}: best head", units="attention mass"
        )
        variables[f"{name}_best_layer"] = ((), 1, {"long_name": "layer of the best head", "units": "1"})
        variables[f"{name}_best_head"] = ((), 2, {"long_name": "index of the best head", "units": "1"})
    coords = {"layer": np.arange(layers), "head": np.arange(heads)}
    return xr.Dataset(variables, coords, {"phenomenon": "induction", "model": "llama 2x64", "seed": 0})


def hydra(*, layers=2, seed=0):
    rng = np.random.default_rng(seed)
    variables = {}
    dims = ("component", "layer")
    for name in (
        "total_effect",
        "direct_effect",
        "own_change",
        "attention_growth",
        "mlp_change",
        "norm_change",
        "self_repair",
        "compensation",
    ):
        values = rng.normal(size=(2, layers))
        _with_interval(variables, name, dims, values, width=0.3, long_name=name.replace("_", " "), units="logit")
        if name in ("total_effect", "attention_growth", "mlp_change", "self_repair"):
            null = values * 0.1
            variables[f"{name}_null"] = (
                dims,
                null,
                {"long_name": f"{name} of random directions", "units": "logit"},
            )
    response = rng.normal(size=(2, layers, 2, layers))
    variables["response"] = (
        ("component", "layer", "responding_component", "responding_layer"),
        response,
        {"long_name": "Change of a component's direct effect", "units": "logit"},
    )
    variables["n_positions"] = ((), 512, {"long_name": "positions used", "units": "1"})
    coords = {
        "component": ["attention", "mlp"],
        "layer": np.arange(layers),
        "responding_component": ["attention", "mlp"],
        "responding_layer": np.arange(layers),
    }
    return xr.Dataset(variables, coords, {"phenomenon": "hydra", "model": "llama 2x64"})


def function_vectors(*, layers=2, heads=4, seed=0):
    rng = np.random.default_rng(seed)
    variables = {}
    effects = rng.gamma(0.5, 0.1, size=(layers, heads))
    _with_interval(
        variables,
        "AIE",
        ("layer", "head"),
        effects,
        width=0.01,
        long_name="Average indirect effect",
        units="probability",
    )
    variables["AIE_null"] = (
        ("layer", "head"),
        effects * 0.05,
        {"long_name": "Average indirect effect, null", "units": "probability"},
    )
    variables["selected"] = (
        ("layer", "head"),
        effects > np.sort(effects.ravel())[-3],
        {"long_name": "selected", "units": "1"},
    )
    for name, long_name in (("accuracy", "Accuracy with injection"), ("recovery", "Recovered share of the logit gap")):
        values = rng.uniform(0, 0.9, size=(2, 5, layers))
        _with_interval(
            variables, name, ("prompt", "vector", "layer"), values, width=0.05, long_name=long_name, units="1"
        )
    for name, value in {"clean": 0.95, "shuffled": 0.2, "zero_shot": 0.12, "bayes": 0.99}.items():
        variables[f"accuracy_{name}"] = ((), value, {"long_name": f"accuracy, {name}", "units": "1"})
    variables["chance"] = ((), 1 / 16, {"long_name": "chance", "units": "1"})
    coords = {
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "prompt": ["zero_shot", "shuffled"],
        "vector": VECTORS,
    }
    return xr.Dataset(variables, coords, {"phenomenon": "function_vectors", "model": "llama 2x64"})


def published(*, layers=2, heads=4, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.repeat(rng.uniform(0, 0.5, size=(1, layers, heads)), 3, axis=0)
    attrs = {"units": "attention mass"}
    variables = {
        "k_order_induction": (("k", "layer", "head"), scores, {**attrs, "long_name": "k-order score"}),
        "k_order_induction_max": (
            ("k",),
            scores.max(axis=(1, 2)),
            {**attrs, "long_name": "k-order score, maximum over heads"},
        ),
        "k_order_induction_uniform": (("k",), np.full(3, 0.02), {**attrs, "long_name": "k-order score, uniform"}),
        "hydra_drop": (
            ("distance", "layer"),
            rng.normal(size=(2, layers)),
            {"units": "logit", "long_name": "Hydra score as published"},
        ),
        "syntax_mass": (
            ("transition",),
            rng.uniform(size=3),
            {"units": "probability", "long_name": "Mass on the right category"},
        ),
        "function_vector_probability": ((), 0.04, {"units": "probability", "long_name": "Probability of the object"}),
    }
    coords = {
        "k": [1, 2, 3],
        "distance": [1, 2],
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "transition": ["S → V", "V → O", "C → S"],
    }
    return xr.Dataset(variables, coords, {"phenomenon": "published", "model": "llama 2x64"})


RESULTS = {"induction": induction, "hydra": hydra, "function_vectors": function_vectors, "published": published}


def over_training(result, *, steps=(0, 20, 50, 120, 300, 600, 900), seed=0, **sizes):
    """A sweep's dataset: the result at every step, the baselines with a step dim too."""
    checkpoints = [result(seed=seed * 100 + i, **sizes) for i, _ in enumerate(steps)]
    return xr.concat(checkpoints, dim=pd.Index(steps, name="step"), data_vars="all", combine_attrs="override")


def sweep(arms=("pool of 64 lexicons", "per-document lexicon", "one fixed lexicon", "n-gram"), phenomena=RESULTS):
    return xr.DataTree.from_dict(
        {
            f"/{arm}/{name}": over_training(RESULTS[name], seed=index)
            for index, arm in enumerate(arms)
            for name in phenomena
        }
    )


def log(seed=0, steps=900):
    rng = np.random.default_rng(seed)
    at = np.arange(10, steps + 1, 10)
    loss = 2 + 2.5 * np.exp(-at / 120) + rng.normal(0, 0.03, at.size)
    evaluated = np.isin(at, (20, 50, 120, 300, 600, 900))
    frame = pd.DataFrame(
        {"step": at, "loss": loss, "eval_loss": np.where(evaluated, loss, np.nan), "learning_rate": 1e-3}
    )
    first = pd.DataFrame({"step": [0], "loss": [np.nan], "eval_loss": [4.6], "learning_rate": [0.0]})
    return pd.concat([first, frame], ignore_index=True)
