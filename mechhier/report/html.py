"""The report: one HTML file that holds its figures and scripts, opens offline and asks for nothing outside itself."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mechhier.files import absolute, make_folder, write_whole
from mechhier.report import attention, style
from mechhier.report.attention import AttentionView
from mechhier.report.images import ImageError, write_images

TEMPLATE = "report.html.j2"
IMAGE_FOLDER = "figures"
MODE_BAR = ("toImage", "zoom2d", "pan2d", "resetScale2d")  # plotly's default bar is as wide as a title is long


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report.

    Attributes:
        heading: its title; also names the section's PNG files.
        shows: what the figures show, in plain words; a blank line begins a new paragraph.
        does_not_show: what must not be read into them.
        figures: plotly figures and attention views, in the order of the page.
        table: numbers beside the figures; its columns are shown, its index is not.
    """

    heading: str
    shows: str
    does_not_show: str = ""
    figures: Sequence[go.Figure | AttentionView] = ()
    table: pd.DataFrame | None = None


@dataclass(frozen=True)
class Report:
    """What `write_report` has written.

    Attributes:
        path: the HTML file.
        images: PNG copies of its plotly figures; empty if none could be made.
        note: why there are no images; empty if there are.
    """

    path: Path
    images: tuple[Path, ...]
    note: str


@dataclass
class _Page:
    """The sections as the template takes them, and the figures to copy as PNG."""

    sections: list[dict[str, Any]] = field(default_factory=list)
    images: dict[Path, go.Figure] = field(default_factory=dict)
    has_plotly: bool = False
    has_attention: bool = False


def write_report(
    path: str | Path,
    *,
    title: str,
    intro: str,
    sections: Sequence[Section],
    provenance: Mapping[str, object],
    images: bool = True,
) -> Report:
    """Write a report as one self-contained HTML file, and PNG copies of its plotly figures beside it.

    plotly.js and CircuitsVis are inlined once each, only where a figure needs them (4.8 and 1.3 MB). The page forbids
    its browser every request to a network. The file is replaced atomically. A failure to make PNG copies never fails
    the report: it is written in its footer and in the returned note.

    Args:
        path: the HTML file; its folder is made if it is missing. PNG files go to `figures/` beside it.
        title: of the report.
        intro: plain text under the title; a blank line begins a new paragraph.
        sections: in the order of the page; their headings differ.
        provenance: what the report rests on, for the footer: a number or text as it is, a mapping or list as YAML.
        images: whether to make PNG copies (a few seconds; needs a Chrome or Chromium).

    Returns:
        The file, the images, and why there are none.

    Raises:
        ValueError: if two sections have one heading.
        TypeError: if a section's figure is neither a plotly figure nor an `AttentionView`.
    """
    target = absolute(path)
    page = _laid_out(sections, target.parent / IMAGE_FOLDER)
    context = {
        "title": title,
        "intro": _paragraphs(intro),
        "page": page,
        "provenance": [_provenance_row(name, value) for name, value in provenance.items()],
        "font": Markup(style.FONT),
        "attention_style": Markup(attention.STYLE),
        "plotly_script": Markup(get_plotlyjs().replace("</script", "<\\/script")) if page.has_plotly else "",
        "circuitsvis_script": Markup(attention.circuitsvis_script()) if page.has_attention else "",
    }
    make_folder(target.parent)
    _render(target, context, "")
    if not images or not page.images:
        return Report(
            target, (), "PNG copies were not asked for" if page.images else "there is no plotly figure to copy"
        )
    try:
        write_images(page.images)
    except (ImageError, OSError) as error:
        note = f"PNG copies of the figures were not written: {error}"
        _render(target, context, note)
        return Report(target, (), note)
    _render(target, context, f"PNG copies of the figures are in the folder {IMAGE_FOLDER}/ beside this page.")
    return Report(target, tuple(page.images), "")


def _render(target: Path, context: Mapping[str, object], image_note: str) -> None:
    environment = Environment(
        loader=PackageLoader("mechhier", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(**context, image_note=image_note)
    write_whole(target, text)


def _laid_out(sections: Sequence[Section], image_folder: Path) -> _Page:
    page, number = _Page(), 0
    slugs = [slug(section.heading) for section in sections]
    twice = sorted({section.heading for section, name in zip(sections, slugs, strict=True) if slugs.count(name) > 1})
    if twice:
        raise ValueError(f"sections need different headings; given more than once: {', '.join(twice)}")
    for section, name in zip(sections, slugs, strict=True):
        figures = []
        for index, figure in enumerate(section.figures, start=1):
            number += 1
            element = f"figure-{number}"
            if isinstance(figure, go.Figure):
                page.has_plotly = True
                file_name = f"{name}.png" if len(section.figures) == 1 else f"{name}-{index}.png"
                page.images[image_folder / file_name] = figure
                figures.append({"number": number, "html": _plotly_fragment(figure, element), "notes": _title(figure)})
            elif isinstance(figure, AttentionView):
                page.has_attention = True
                notes = ("Attention from every token (row) to every earlier token (column).", *figure.cut)
                figures.append({"number": number, "html": Markup(figure.fragment(element)), "notes": notes})
            else:
                raise TypeError(
                    f"section {section.heading!r} has a {type(figure).__name__} for a figure; accepted are plotly "
                    "figures (mechhier.plot) and AttentionView (attention_heads)"
                )
        page.sections.append(
            {
                "slug": name,
                "heading": section.heading,
                "shows": _paragraphs(section.shows),
                "does_not_show": _paragraphs(section.does_not_show),
                "figures": figures,
                "table": None if section.table is None else _table(section.table),
            }
        )
    return page


def slug(heading: str) -> str:
    """Return a heading as a name for files and links: lower case letters and digits, joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", heading.lower())) or "section"


def _plotly_fragment(figure: go.Figure, element: str) -> Markup:
    config = {"responsive": True, "displaylogo": False, "modeBarButtons": [list(MODE_BAR)]}
    return Markup(
        pio.to_html(figure, full_html=False, include_plotlyjs=False, div_id=element, config=config, validate=False)
    )


def _title(figure: go.Figure) -> tuple[str, ...]:
    """Return the figure's title as plain text, for its caption."""
    title = figure.to_dict()["layout"].get("title", {}).get("text") or ""
    plain = html.unescape(re.sub(r"<[^>]*>", " ", title))
    return (f"{plain.rstrip('.')}.",) if plain else ()


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    """Return a data frame as the template takes it: header, rows of text, and which columns hold numbers."""
    numeric = [pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype) for dtype in frame.dtypes]
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return {"columns": [str(name) for name in frame.columns], "rows": rows, "numeric": numeric}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return style.number(value) if math.isnan(value) or abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _provenance_row(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, Mapping | list | tuple):
        plain = yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=100)
        return {"name": name, "text": plain.rstrip(), "is_block": True}
    return {"name": name, "text": str(value), "is_block": "\n" in str(value)}


def _plain(value: object) -> object:
    """Return nested mappings and lists of things that YAML knows; anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
