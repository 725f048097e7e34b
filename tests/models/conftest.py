import pytest

from mechhier.grammars import DocumentGrammar
from mechhier.models.spec import ModelSpec, TrainSpec
from mechhier.models.training import train

SPEC = ModelSpec("llama", n_layers=1, d_model=16, n_heads=2, d_mlp=16)
TRAIN = TrainSpec(steps=12, batch_size=4, warmup_steps=2, n_checkpoints=5, eval_rows=6)


def make_corpus(**changes):
    """40 rows of 12 tokens: shorter than the training, so that it is read again from its start."""
    grammar = DocumentGrammar(n_words=3, n_connectors=2)
    return grammar.corpus(**{"tokens": 40 * 12, "context": 12, "seed": 0, **changes})


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A run that was never interrupted."""
    return train(SPEC, make_corpus(), tmp_path_factory.mktemp("reference") / "run", train=TRAIN)
