from types import SimpleNamespace

import pytest

from mechhier.grammars import DocumentGrammar
from mechhier.models.spec import ModelSpec, TrainSpec
from mechhier.models.training import train


def tiny_plan():
    """What to train: the corpus's 40 rows are fewer than the training reads, so it is read again from its start."""
    return SimpleNamespace(
        spec=ModelSpec("llama", n_layers=1, d_model=16, n_heads=2, d_mlp=16),
        corpus=DocumentGrammar(n_words=3, n_connectors=2).corpus(tokens=40 * 12, context=12),
        train=TrainSpec(steps=12, batch_size=4, warmup_steps=2, n_checkpoints=5, eval_rows=6),
    )


@pytest.fixture
def plan():
    return tiny_plan()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A run that was never interrupted."""
    plan = tiny_plan()
    return train(plan.spec, plan.corpus, tmp_path_factory.mktemp("reference") / "run", train=plan.train)
