"""A newcomer's mistakes, one a line: what is called, and what the message must say."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from random_models import random_hooked

import mechhier as mh
from mechhier.grammars import PCFG, DocumentGrammar
from mechhier.probes import MLP, Attention, ablate, ablated

WRONG_CALLS = r"""
DocumentGrammar(n_word=30)                                   | n_word: no such field; did you mean n_words
DocumentGrammar(n_words=0)                                   | n_words: must be at least 1
DocumentGrammar(n_words="30")                                | n_words: must be a whole number.* got '30'
DocumentGrammar(n_words=True)                                | n_words: must be a whole number
DocumentGrammar(n_words=3.5)                                 | n_words: must be a whole number
DocumentGrammar(n_words=10**9)                               | DocumentGrammar: .*at most
DocumentGrammar(zipf=-1)                                     | zipf: must be at least 0
DocumentGrammar(zipf=float("nan"))                           | zipf: must be finite
DocumentGrammar(lexicon="per_dokument")                      | lexicon: must be .*'fixed' or 'per_document'
DocumentGrammar(lexicon=1)                                   | lexicon: must be .*at least 2
DocumentGrammar(binding=2)                                   | binding: must be at most 1
DocumentGrammar(p_chain="half")                              | p_chain: must be a number, got 'half'
DocumentGrammar(context=3)                                   | context: must be at least 4
DocumentGrammar(hierarchical="yes")                          | hierarchical: must be true or false
DocumentGrammar(n_words=(3, 4, 5), binding=0.5)              | their numbers must be equal
DocumentGrammar(repetitions=3, lexicon="fixed")              | leave repetitions at 1
DocumentGrammar(language_seed=-1)                            | language_seed: must be at least 0
NGram(n_tokens=40, order=3)                                  | order: no such field
NGram(n_tokens="many")                                       | n_tokens: must be a whole number
cfg3(n_levels="3")                                           | n_levels: must be a whole number
cfg3(n_levels=10**6)                                         | n_levels: must be at most
cfg3(levels=3)                                               | levels: no such field; did you mean n_levels
dyck(p_nest=1)                                               | p_nest
dyck(max_depth=10**6)                                        | max_depth
random_hierarchy(n_tuples=100, n_symbols=2)                  | the rules need
PCFG.from_string("")                                         | the text has no rules
PCFG.from_string("S => 'a' [1.0]")                           | line 1.*a rule reads
PCFG.from_string("S -> 'a'")                                 | every alternative ends with its probability
PCFG.from_string("S -> 'a' [0.5]")                           | sum to
PCFG.from_string("S -> NPP 'a' [1.0]\nNP -> 'b' [1.0]")      | did you mean 'NP'
PCFG.from_string("S -> S 'a' [1.0]")                         | unproductive
PCFG.from_string("S -> S S [0.6]\nS -> 'a' [0.4]")            | S -> S S
PCFG.from_string(3)                                          | text
PCFG.from_cfg3({"all": 3})                                   | not a cfg3 table
pcfg.log_probability([0, 9])                                 | token ids must be 0
pcfg.log_probability([[0]])                                  | one dimension
pcfg.log_probability([0.5])                                  | integers|whole
pcfg.log_probability("a")                                    | tokens must be integers
pcfg.next_token_probabilities([0, 1])                        | rows
pcfg.next_token_probabilities([[1, 1], [0]])                 | one length
pcfg.most_probable_tree([])                                  | the empty string has no tree
pcfg.generate(0, 8, rng)                                     | n_rows must be at least 1
pcfg.generate(1, 8, 3)                                       | rng must be a generator
pcfg.generate(1, 2, rng)                                     | context must be at least 4
grammar.corpus(10)                                           | less than one row
grammar.corpus("1e6")                                        | tokens must be a whole number
grammar.corpus(1000, seed=-1)                                | seed
grammar.corpus(1000, seed=0.5)                               | seed
grammar.corpus(1000, split="training")                       | must be one of train, validation, test
grammar.corpus(1000, disjoint=True, context=2)               | context must be at least 4
corpus.rows(0, 10**6)                                        | rows 0 to 1000000 of a corpus of
corpus[10**6]                                                | row 1000000 of a corpus of
corpus.sample(3, 3)                                          | ask for at least one row
corpus.held_out("train")                                     | this corpus is the 'train' split
corpus.floor(1)                                              | n_rows must be at least 2
corpus.save(file)                                            | is a file; a corpus is stored in a folder
mh.Corpus.open(folder)                                       | holds no corpus: there is no manifest.json
mh.Corpus.open(3)                                            | no path
mh.ModelSpec("lama", n_layers=1, d_model=8, n_heads=2)       | architecture: must be
mh.ModelSpec("llama", n_layer=1, d_model=8, n_heads=2)       | n_layer: no such field; did you mean n_layers
mh.ModelSpec("llama", n_layers=1, d_model=9, n_heads=2)      | must be divisible by n_heads=2
mh.ModelSpec("llama", n_layers="1", d_model=8, n_heads=2)    | n_layers: must be a whole number, got '1'
mh.ModelSpec("llama", n_layers=10**9, d_model=8, n_heads=2)  | n_layers: must be at most
mh.ModelSpec(preset="large")                                 | no preset 'large': choose from tiny, paper
mh.ModelSpec("gpt2", n_layers=1, d_model=8, n_heads=2, n_key_value_heads=1) | n_key_value_heads applies to llama
spec.build(vocab_size=10, eos_token_id=0)                    | n_ctx is open
mh.TrainSpec(step=10)                                        | step: no such field; did you mean steps
mh.TrainSpec(steps=0)                                        | steps: must be at least 1
mh.TrainSpec(learning_rate="fast")                           | learning_rate: must be a number
mh.TrainSpec(learning_rate=float("inf"))                     | learning_rate: must be finite
mh.TrainSpec(steps=10, warmup_steps=10)                      | warmup_steps=10 must be below steps=10
mh.TrainSpec(batch_size=6, gradient_accumulation=4)          | must be divisible by gradient_accumulation=4
mh.TrainSpec(precision="fp16")                               | precision: must be
mh.TrainSpec(steps=10, checkpoints_at=[20])                  | lie beyond steps=10
mh.train(spec, corpus, file)                                 | is a file; out must be a folder
mh.train(spec, corpus, other_folder)                         | is not empty and not a run
mh.train(spec, corpus, folder / "run", train=mh.TrainSpec(batch_size=10**4)) | longer corpus, smaller batches
mh.train(spec.model_copy(update={"n_ctx": 8}), corpus, folder / "run") | do not fit the model's n_ctx=8
mh.Run.open(folder)                                          | is not a run: there is no manifest.json
mh.Run.open(folder / "nowhere")                              | is not a run
mh.load_model(folder / "nowhere")                            | no folder
mh.load_model(folder)                                        | holds no model
mh.load_model("not a hub name")                              | it is no hub name
mh.load_model(None)                                          | a folder, a hub name
mh.load_model(corpus)                                        | A corpus is what a model is trained on
mh.load_model(spec)                                          | A ModelSpec has no weights
mh.load_model(model, as_="bridges")                          | as_ must be
mh.load_model(model, dtype="float8")                         | dtype must be one of
mh.load_model(model, device="gpu")                           | is no device of torch
mh.load_model(model, processing="fold")                      | processing must be
mh.load_model(model, revision="main")                        | this model is in memory
mh.models.revisions(folder)                                  | no revision that is named as a training step
mh.models.revisions(folder, n=1)                             | n must be at least 2
mh.models.revisions(folder, spacing="linear")                | spacing must be 'even' or 'log'
mh.phenomena.induction(hf)                                   | load_model\(model\)
mh.phenomena.hydra(folder)                                   | load_model
mh.phenomena.hydra(model, tokens="the cat sat")              | model.to_tokens
mh.phenomena.hydra(model, tokens=tokens.float())             | floats are no ids
mh.phenomena.hydra(model, tokens=tokens > 3)                 | a mask holds no ids
mh.phenomena.hydra(model, tokens=tokens[0])                  | \[None\]
mh.phenomena.hydra(model, tokens=[[1, 2, 3], [1, 2]])        | rows of 2 to 3 tokens
mh.phenomena.hydra(model, tokens=tokens + 10**6)             | token ids must lie in
mh.phenomena.hydra(model, tokens=tokens.repeat(1, 99))       | longer than the model's context
mh.phenomena.hydra(model, level="heads")                     | level must be
mh.phenomena.hydra(model, ablation="meen")                   | did you mean 'mean'
mh.phenomena.hydra(model, n_sequences=0)                     | n_sequences must be
mh.phenomena.hydra(model, min_probability=2)                 | min_probability must be
mh.phenomena.hydra(model, seed=-1)                           | seed must be
mh.phenomena.induction(model, n_sequences=2.5)               | n_sequences must be a whole number
mh.phenomena.function_vectors(model, tasks="antonym")        | tasks
mh.phenomena.heads(xr.Dataset())                             | induction
mh.phenomena.check_options("hydra", {"n_patch": 3})          | n_patch: no such option; did you mean n_patches
ablate(model, tokens, [Head(0, 0)])                          | order|exchanged|components
ablate(model, [Head(9, 0)], tokens)                          | layer
ablate(model, [Head(0, 99)], tokens)                         | head
ablate(model, [Head(0, 0)], tokens, ablation="mean", reference="text") | reference.*model.to_tokens
ablate(model, [Head(0, 0)], tokens, ablation="delete")       | ablation must be one of
ablate(model, [Head(0, 0)], tokens, metric="loss")           | metric
ablate(model, [Head(0, 0)], tokens, metric=lambda logits, rows: "a") | metric
ablate(model, [], tokens)                                    | .
ablate(model, ["L0H0"], tokens)                              | Head
knock_out(model, tokens, [Edge(keys=0)])                     | edges
knock_out(model, [Head(0, 0)], tokens)                       | Edge
force_pattern(model, [Head(0, 0)], tokens, "diagonal")       | pattern
patch(model, tokens, tokens[:1], metric=loss(tokens))        | .
patch(model, tokens, tokens, metric=loss(tokens), sites="resid_prr") | did you mean 'resid_pre'
patch(model, tokens, tokens, metric=loss(tokens), direction="noising") | direction
patch(model, tokens, tokens, metric=loss(tokens), position=99) | position
attribution_patch(model, tokens, tokens, metric="loss")      | metric
path_patch(model, [Head(0, 0)], tokens, tokens, "nowhere", metric=loss(tokens)) | receivers
logit_difference(answers="a", wrong="b")                     | answers
mh.sweep(model, ["induction"])                               | A model is measured by itself
mh.sweep({}, ["induction"])                                  | there is no run to sweep
mh.sweep(folder, ["induction"])                              | is not a run
mh.plot(None)                                                | cannot plot
mh.plot("results.nc")                                        | cannot plot
mh.plot(xr.Dataset({"a": 1}))                                | cannot plot a dataset whose attribute 'phenomenon'
mh.plot(xr.DataTree())                                       | cannot plot an empty tree
mh.plot(xr.DataArray([1.0]))                                 | cannot plot a DataArray
mh.plot(pd.DataFrame({"x": [1]}))                            | .
mh.plot({})                                                  | no arm
mh.results.load(folder / "x.nc")                             | no result at
mh.results.load(file)                                        | is not a netCDF file
mh.results.save({"a": 1}, folder / "x.nc")                   | results are saved as an xarray Dataset or DataTree
mh.results.save(xr.Dataset(attrs={"a": object()}), folder / "x.nc") | attribute 'a' is an object
mh.Experiment.read("demos")                                  | no packaged experiment of that name \(demo\)
mh.Experiment.read(file)                                     | must hold the fields|is not
mh.Experiment.read(3)                                        | a spec is read from a file
mh.Experiment.read("demo").train(folder, only="pol")         | choose from pool
mh.Experiment(title="x")                                     | arms: is missing
"""
CALLS = [[part.strip() for part in line.split(" | ", 1)] for line in WRONG_CALLS.strip().splitlines()]
LONGEST = 600
TWO_MEANINGS = (AttributeError, KeyError, RuntimeError, AssertionError, RecursionError, OverflowError)
"""Errors that say nothing of the call: another library's, or a fault of ours."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("years of work")
    (folder / "file.yaml").write_text("- 1\n")
    model = random_hooked("llama", "bridge")
    grammar = DocumentGrammar(n_words=5, n_connectors=2, lexicon=3, context=24)
    spec = mh.ModelSpec("llama", n_layers=1, d_model=8, n_heads=2)
    vocab = model.cfg.d_vocab
    here = {
        "folder": folder,
        "other_folder": folder / "other",
        "file": folder / "file.yaml",
        "model": model,
        "grammar": grammar,
        "corpus": grammar.corpus(2400),
        "pcfg": PCFG.from_string("S -> 'a' S 'b' [0.4] | 'a' 'b' [0.6]"),
        "rng": np.random.default_rng(0),
        "spec": spec,
        "hf": spec.build(vocab_size=10, eos_token_id=0, n_ctx=8),
        "tokens": torch.randint(0, vocab, (4, 6), generator=torch.Generator().manual_seed(0)),
    }
    return {"mh": mh, "np": np, "pd": pd, "xr": xr} | vars(mh.grammars) | vars(mh.probes) | here


def test_the_table_has_as_many_calls_as_were_tried_on_the_version_before():
    assert len(CALLS) >= 128
    assert len({call for call, _ in CALLS}) == len(CALLS)


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[call for call, _ in CALLS])
def test_a_wrong_call_says_what_is_wrong_in_words_of_ours(scene, call, words):
    with pytest.raises(Exception, match=re.compile(words, re.DOTALL)) as caught:
        eval(call, scene)
    error, message = caught.value, str(caught.value)
    assert not isinstance(error, TWO_MEANINGS) or type(error).__module__.startswith("mechhier"), repr(error)
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert "mechhier" in raised.parts, f"{raised}: {error}"
    assert 10 < len(message) <= LONGEST, message
    assert "http" not in message
    assert "pydantic" not in message
    assert all(character.isprintable() or character == "\n" for character in message)


def test_a_wrong_block_is_refused_before_the_model_is_edited(scene):
    model, tokens = scene["model"], scene["tokens"]
    before = model(tokens)
    with pytest.raises(TypeError), ablated(model, ["L0H0"], ablation="zero"):
        pass
    assert torch.equal(model(tokens), before)


def test_parts_are_named(scene):
    for part in (MLP(9), Attention(9)):
        with pytest.raises(ValueError, match="layer"):
            ablate(scene["model"], [part], scene["tokens"])
