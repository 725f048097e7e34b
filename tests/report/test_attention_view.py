import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from browser import evaluate, needs_browser
from transformers import GPT2Config, GPT2LMHeadModel

from mechhier.models import load_model
from mechhier.report import attention_heads, show_attention
from mechhier.report.attention import circuitsvis_script

HOSTILE = "</script><script>document.title='broken'</script>"


def causal(heads, length):
    weights = np.tril(np.random.default_rng(0).random((heads, length, length)))
    return weights / weights.sum(-1, keepdims=True)


def props(fragment):
    """The properties of the view, read back as a JavaScript engine reads them."""
    return json.loads(re.search(r"AttentionHeads, (.*)\);</script>", fragment).group(1))


def test_the_view_holds_tokens_names_and_rounded_patterns():
    patterns = causal(2, 3)
    read = props(attention_heads(["a", "b", "c"], patterns, ["L0H0", "L1H3"]).fragment("x"))
    assert read["tokens"] == ["a", "b", "c"]
    assert read["attentionHeadNames"] == ["L0H0", "L1H3"]
    np.testing.assert_allclose(read["attention"], patterns, atol=5.1e-4)
    assert all(value == round(value, 3) for value in np.ravel(read["attention"]))


def test_a_hostile_token_stays_inside_its_string():
    view = attention_heads(["</script>", "<!--", "\u2028 \"'&"], causal(1, 3), ["<b>"])
    fragment = view.fragment("x")
    assert fragment.count("</script") == 1
    assert "<!--" not in fragment
    assert "\u2028" not in fragment
    assert props(fragment)["tokens"] == ["</script>", "<!--", "\u2028 \"'&"]


def test_long_sequences_many_heads_and_long_tokens_are_cut_and_said():
    patterns = causal(14, 150)
    view = attention_heads(["t" * 100] * 150, patterns, [f"L0H{i}" for i in range(14)])
    assert view.patterns.shape == (12, 128, 128)
    np.testing.assert_allclose(view.patterns, patterns[:12, :128, :128], atol=5.1e-4)
    np.testing.assert_allclose(view.patterns.sum(-1), 1, atol=0.07)
    assert view.cut == ("Shown are the first 128 of 150 positions.", "Shown are the first 12 of 14 heads.")
    assert all(len(token) == 24 and token.endswith("…") for token in view.tokens)
    assert "first 128 of 150" in view.to_html()


def test_what_fits_is_not_cut():
    assert attention_heads(["t"] * 128, causal(12, 128), ["h"] * 12).cut == ()


def test_weights_that_are_no_numbers_are_counted():
    patterns = causal(1, 2)
    patterns[0, 0, 1] = np.nan
    view = attention_heads(["a", "b"], patterns, ["h"])
    assert view.patterns[0, 0, 1] == 0
    assert view.cut == ("1 weights are not finite numbers and are shown as 0.",)


@pytest.mark.parametrize(("tokens", "names", "shape"), [(3, 1, (1, 2, 2)), (2, 2, (1, 2, 2)), (0, 0, (0, 0, 0))])
def test_shapes_that_do_not_fit_are_an_error(tokens, names, shape):
    with pytest.raises(ValueError, match="patterns have the shape"):
        attention_heads(["t"] * tokens, np.zeros(shape), ["h"] * names)


def test_the_script_is_whole_and_cannot_end_its_element():
    script = circuitsvis_script()
    assert "</script" not in script
    assert "var CircuitsVis=" in script
    assert "unpkg.com" not in script


def test_the_notebook_output_is_a_frame_that_holds_the_page():
    view = attention_heads(["a", HOSTILE], causal(1, 2), ["h"])
    source = re.fullmatch(
        r'<iframe srcdoc="([^"]*)" sandbox="allow-scripts" style="[^"]*" title="[^"]*"></iframe>', view._repr_html_()
    )
    assert source is not None
    assert html.unescape(source.group(1)) == view.to_html()


def test_importing_the_report_does_not_import_torch():
    code = (
        "import sys, mechhier.report; mechhier.report.attention.circuitsvis_script(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=20, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval()


def test_a_models_patterns_are_those_of_hugging_face(gpt2):
    tokens = np.arange(10)
    view = show_attention(load_model(gpt2), tokens, heads=[(1, 3), (0, 0)])
    with torch.no_grad():
        attentions = gpt2(torch.as_tensor(tokens)[None], output_attentions=True).attentions
    expected = torch.stack([attentions[1][0, 3], attentions[0][0, 0]]).numpy()
    np.testing.assert_allclose(view.patterns, expected, atol=6e-4)
    assert view.head_names == ("L1H3", "L0H0")
    assert view.tokens == tuple("0123456789")


def test_a_score_shows_its_highest_heads_first(gpt2):
    scores = xr.DataArray([[0.1, 0.9, np.nan, 0.3], [0.2, 0.4, 0.5, 0.0]], dims=("layer", "head"))
    scores = scores.assign_coords(layer=[0, 1], head=range(4))
    view = show_attention(load_model(gpt2), range(5), heads=scores)
    assert view.head_names == ("L0H1", "L1H2", "L1H1", "L0H3", "L1H0", "L0H0")


def test_more_than_one_sequence_or_a_score_over_training_is_an_error(gpt2):
    with pytest.raises(ValueError, match="one sequence"):
        show_attention(load_model(gpt2), np.zeros((2, 3), dtype=int), heads=[(0, 0)])
    with pytest.raises(ValueError, match="layer and head"):
        show_attention(
            load_model(gpt2), [1, 2], heads=xr.DataArray(np.zeros((3, 2, 4)), dims=("step", "layer", "head"))
        )


@needs_browser
@pytest.mark.slow
def test_the_view_is_drawn_in_a_browser_without_a_network(tmp_path):
    page = tmp_path / "view.html"
    tokens = ["a", HOSTILE[:20], *"cdefgh"]
    page.write_text(attention_heads(tokens, causal(3, 8), ["L0H0", "L0H1", "L1H0"]).to_html())
    drawn = evaluate(page, "[[...document.querySelectorAll('canvas')].map(inked), document.title]", tmp_path)
    # A canvas for every head, and the enlarged one.
    assert drawn == [[[True, "small"]] * 3 + [[True, "large"]], "Attention heads"]
