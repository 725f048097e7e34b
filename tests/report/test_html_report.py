import html.parser
import os
import re
import struct

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import synthetic_results as synthetic
from browser import evaluate, needs_browser

from mechhier.report import Section, attention_heads, plot, plot_loss, write_report
from mechhier.report.images import WIDTH

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def view():
    patterns = np.tril(np.ones((2, 8, 8))) / np.arange(1, 9)[:, None]
    return attention_heads(["s1", "</script>", "<img src=x>", *"abcd", "<eos>"], patterns, ["L0H0", "L1H1"])


def written(path, sections, **changes):
    arguments = {"title": "Title", "intro": "Intro", "provenance": {"seed": 0}, "images": False} | changes
    return write_report(path, sections=sections, **arguments)


class Outline(html.parser.HTMLParser):
    """Everything in a page that a browser would fetch, and its visible text outside scripts."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.words, self.scripts, self._inside = [], [], 0, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.scripts += tag == "script"
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.words.append(data)


def test_the_page_is_self_contained_and_its_libraries_are_inlined_once(tmp_path, view):
    figures = [plot(synthetic.induction()), plot(synthetic.hydra())]
    report = written(
        tmp_path / "report.html", [Section("One", "a", figures=figures), Section("Two", "b", figures=[view, view])]
    )
    page = report.path.read_text()
    outline = Outline(page)
    assert outline.fetched == []
    assert outline.scripts == 2 + 2 + 2  # two libraries, two plotly figures, two views
    assert page.count("plotly.js v") == 1
    assert page.count("var CircuitsVis=") == 1
    assert "default-src 'none'" in page
    assert 6e6 < report.path.stat().st_size < 8e6


def test_a_report_without_figures_inlines_no_library(tmp_path):
    assert written(tmp_path / "report.html", [Section("One", "a")]).path.stat().st_size < 20_000


def test_every_text_is_escaped(tmp_path, view):
    table = pd.DataFrame({HOSTILE: [HOSTILE]})
    arms = {HOSTILE: synthetic.over_training(synthetic.induction)}
    report = written(
        tmp_path / "report.html",
        [Section(HOSTILE, HOSTILE, HOSTILE, [plot(arms), view], table)],
        title=HOSTILE,
        intro=HOSTILE,
        provenance={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
    )
    page = report.path.read_text()
    assert HOSTILE not in page
    assert not re.search(r"<img[\s>]", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert "".join(Outline(page).words).count(HOSTILE) >= 9


def test_the_page_holds_its_words_numbers_and_provenance(tmp_path):
    table = pd.DataFrame({"arm": ["pool"], "loss": [1.23456], "tokens": [3_000_000], "none": [np.nan]})
    report = written(
        tmp_path / "report.html",
        [Section("First", "It shows this.\n\nAnd this.", "Not that.", [plot_loss({"pool": synthetic.log()})], table)],
        provenance={"seed": 7, "spec": {"arms": [{"name": "pool"}]}},
    )
    words = " ".join(" ".join(Outline(report.path.read_text()).words).split())
    for part in (
        "1. First",
        "What it shows It shows this. And this.",
        "What it does not show Not that.",
        "Figure 1. Loss.",
        "pool 1.23 3,000,000 –",
        "seed 7",
        "arms: - name: pool",
    ):
        assert part in words


def test_the_same_report_is_the_same_file(tmp_path, view):
    sections = [Section("One", "a", figures=[plot(synthetic.published()), view])]
    first, second = (written(tmp_path / name, sections).path.read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_failed_report_leaves_the_old_one_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        written(path, [Section("One", "a")])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "old")]


def test_without_a_browser_the_report_is_written_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "missing"))
    report = written(
        tmp_path / "report.html", [Section("One", "a", figures=[plot(synthetic.induction())])], images=True
    )
    assert report.images == ()
    assert "BROWSER_PATH" in report.note
    assert "no Chrome or Chromium was found" in report.path.read_text()
    assert not (tmp_path / "figures").exists()


def test_a_browser_that_does_not_work_does_not_fail_the_report(tmp_path, monkeypatch):
    broken = tmp_path / "chrome"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    report = written(
        tmp_path / "report.html", [Section("One", "a", figures=[plot(synthetic.induction())])], images=True
    )
    assert report.images == ()
    assert "drew no image" in report.note
    assert "PNG copies of the figures were not written" in report.path.read_text()


def test_two_sections_of_one_name_or_a_strange_figure_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="different headings; given more than once: A b, a B"):
        written(tmp_path / "report.html", [Section("A b", "x"), Section("a B", "x")])
    with pytest.raises(TypeError, match="'One' has a dict for a figure"):
        written(tmp_path / "report.html", [Section("One", "x", figures=[{}])])
    assert not list(tmp_path.iterdir())


@needs_browser
@pytest.mark.slow
def test_png_copies_are_written_for_every_plotly_figure(tmp_path, view):
    sections = [
        Section("Loss & floor", "a", figures=[plot_loss({"a": synthetic.log()})]),
        Section("Heads", "a", figures=[plot(synthetic.induction()), view, go.Figure()]),
    ]
    report = written(tmp_path / "report.html", sections, images=True)
    assert [image.name for image in report.images] == ["loss-floor.png", "heads-1.png", "heads-3.png"]
    for image in report.images:
        content = image.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20])[0] == 2 * WIDTH
    assert report.note == ""
    assert "PNG copies of the figures are in the folder figures/" in report.path.read_text()


@needs_browser
@pytest.mark.slow
def test_a_browser_draws_the_whole_page_without_a_network(tmp_path, view):
    sections = [
        Section("Curves", "a", figures=[plot(synthetic.sweep(phenomena=["induction"]))]),
        Section("Attention", "a", figures=[view], table=pd.DataFrame({"x": ["</script>"]})),
        Section("Heads", "after the view", figures=[plot(synthetic.induction())]),
    ]
    report = written(tmp_path / "report.html", sections)
    drawn = evaluate(
        report.path,
        """({
            title: document.title,
            lines: document.querySelectorAll('#figure-1 .scatterlayer path.js-line').length,
            heatmaps: document.querySelectorAll('#figure-3 .heatmaplayer image').length,
            canvases: [...document.querySelectorAll('#figure-2 canvas')].map(inked),
            headings: [...document.querySelectorAll('section > h2')].map((h) => h.textContent),
            cell: document.querySelector('td').textContent,
            strangers: document.querySelectorAll('section img').length,
            wide: document.documentElement.scrollWidth > window.innerWidth,
            requests: performance.getEntriesByType('resource').map((r) => r.name).filter((n) => !n.startsWith('data:')),
        })""",
        tmp_path,
    )
    assert drawn["lines"] >= 6 * 4 * 2
    del drawn["lines"]
    assert drawn == {
        "title": "Title",
        "heatmaps": 6,
        "canvases": [[True, "small"], [True, "small"], [True, "large"]],
        "headings": ["1. Curves", "2. Attention", "3. Heads"],
        "cell": "</script>",
        "strangers": 0,
        "wide": False,
        "requests": [],
    }
