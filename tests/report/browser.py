"""A headless Chromium as an oracle: what a page looks like after its scripts have run, without a network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,2000",
    # Every name resolves to nothing: a page that needs a network shows that it does.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=20000",
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chrome or Chromium is installed")

# A JavaScript function: whether anything is drawn on a canvas, and whether it is laid out small, large or not at all.
INKED = """const inked = (canvas) => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const {clientWidth: width, clientHeight: height} = canvas.parentElement;
    const size = width > 500 && height > 500 ? 'large' : width > 60 && width < 120 && height > 60 ? 'small' : 'lost';
    return [data.some((value, i) => i % 4 === 3 && value > 0), size];
};"""


def evaluate(page: Path, expression: str, folder: Path):
    """The value of a JavaScript expression, which may call `inked`, in the page after it has drawn itself."""
    script = (
        "<script>addEventListener('load', () => setTimeout(() => {"
        f"{INKED} const value = {expression};"
        "const mark = document.createElement('pre'); mark.id = 'answer';"
        "mark.textContent = JSON.stringify(value); document.body.append(mark);"
        "}, 3000));</script></body>"
    )
    content = page.read_text(encoding="utf-8")
    assert content.count("</body>") == 1
    probe = folder / "probe.html"
    probe.write_text(content.replace("</body>", script), encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    answer = re.search(r'<pre id="answer">(.*?)</pre>', dom, flags=re.DOTALL)
    assert answer is not None, "the page's own script did not run to its end"
    return json.loads(html.unescape(answer.group(1)))
