"""PNG copies of plotly figures, where a Chrome or Chromium is installed."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechhier.files import make_folder, write_whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, DEFAULT_HEIGHT, SCALE = 960, 450, 2  # CSS pixels, and image pixels for each of them
SECONDS_TO_START, SECONDS_A_FIGURE = 60, 30


class ImageError(RuntimeError):
    """No PNG could be made; the message says why and what to do."""


def find_browser() -> str | None:
    """Return the path of a Chrome or Chromium: the variable BROWSER_PATH first, then the usual names on PATH."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if Path(named).is_file() else None
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def write_images(figures: Mapping[Path, go.Figure]) -> None:
    """Write figures as PNG, 960 CSS pixels wide at twice the resolution, all in one headless browser.

    kaleido starts the browser without sandbox, which it needs where it runs as root; it loads nothing but the figures.

    Args:
        figures: file -> figure; every file is put in place only when its image is complete.

    Raises:
        ImageError: if there is no browser, it does not start, or a figure cannot be drawn in time.
    """
    browser = find_browser()
    if browser is None:
        raise ImageError("no Chrome or Chromium was found: install one, or name it in the variable BROWSER_PATH")
    for path in figures:
        make_folder(path.parent)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(asyncio.wait_for(_draw(figures, browser), SECONDS_TO_START + SECONDS_A_FIGURE * len(figures)))
        except Exception as error:  # noqa: BLE001 - kaleido and the browser raise many kinds; all are handed on below
            failure.append(error)

    # A thread of its own, because a notebook's main thread runs an event loop already.
    thread = threading.Thread(target=work, name="mechhier-images", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise ImageError(f"{browser} drew no image: {type(failure[0]).__name__}: {failure[0]}") from failure[0]


async def _draw(figures: Mapping[Path, go.Figure], browser: str) -> None:
    import kaleido

    page = kaleido.PageGenerator(mathjax=False)  # otherwise fetched from the network
    async with kaleido.Kaleido(page_generator=page, path=browser) as renderer:
        for path, figure in figures.items():
            height = figure.to_dict()["layout"].get("height", DEFAULT_HEIGHT)
            opts: Any = {"format": "png", "width": WIDTH, "height": height, "scale": SCALE}
            image = await renderer.calc_fig(figure, opts=opts)
            write_whole(path, image)
