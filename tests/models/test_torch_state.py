from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch_states import STATES, state_of_torch

from mechhier.models import ModelSpec
from mechhier.models.torch_state import default_torch_state, entered_in_default_torch_state, in_default_torch_state

FRESH = state_of_torch()


@pytest.mark.parametrize("name", STATES)
def test_inside_torch_is_as_in_a_fresh_process_and_afterwards_as_it_was_also_after_an_exception(name):
    with STATES[name]():
        before = state_of_torch()
        assert before != FRESH
        with default_torch_state():
            assert state_of_torch() == FRESH
        with pytest.raises(KeyError), default_torch_state():
            raise KeyError
        assert state_of_torch() == before
    assert state_of_torch() == FRESH


@pytest.mark.parametrize("name", STATES)
def test_a_context_is_entered_in_the_fresh_state_and_its_block_is_in_the_callers(name):
    seen = []

    @entered_in_default_torch_state
    @contextmanager
    def context(value):
        seen.append(state_of_torch())
        try:
            yield value
        finally:
            seen.append("left")

    with STATES[name]():
        before = state_of_torch()
        with context(3) as value:
            assert (value, state_of_torch(), seen) == (3, before, [FRESH])
        with pytest.raises(KeyError), context(3):
            raise KeyError
        assert state_of_torch() == before
    assert seen == [FRESH, "left"] * 2


def test_a_wrapped_function_keeps_its_signature_and_name():
    @in_default_torch_state
    def double(x: int) -> int:
        """Twice x."""
        return 2 * x

    assert (double(2), double.__name__, double.__doc__) == (4, "double", "Twice x.")


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_same_weights_are_drawn_in_every_state(architecture, name):
    def build():
        spec = ModelSpec(architecture, n_layers=1, d_model=8, n_heads=2)
        return spec.build(vocab_size=8, n_ctx=8, eos_token_id=0).state_dict()

    expected = build()
    with STATES[name]():
        found = build()
    assert all(
        found[name].dtype == weight.dtype and torch.equal(found[name], weight) for name, weight in expected.items()
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one interface")
def test_products_are_float32_with_torchs_newer_interface_and_after_what_transformers_sets():
    """In processes of their own: torch mixes its two interfaces up for good."""
    program = """
import torch
from transformers.utils.import_utils import enable_tf32
from mechhier.models.torch_state import default_torch_state, full_matmul_precision
def state():
    return [torch.backends.fp32_precision] + [
        part.fp32_precision for part in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    ]
{setting}
before = state()
with default_torch_state():
    {inside}
    with full_matmul_precision():
        assert set(state()[1:]) <= {{"ieee", "none"}}, state()
assert state() == before, (before, state())
"""
    for setting, inside in [
        ("torch.backends.fp32_precision = 'tf32'", "pass"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "pass"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "pass"),
        ("", "enable_tf32(True)"),
        ("torch.set_float32_matmul_precision('medium')", "enable_tf32(True)"),
    ]:
        command = [sys.executable, "-c", program.format(setting=setting, inside=inside)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (setting, inside, done.stderr)
