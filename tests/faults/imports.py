"""What the fork server imports: everything, by doing every work once; so that those forked from it import nothing."""

import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import plotly.offline
from faults import work

os.environ["BROWSER_PATH"] = sys.executable


class _Painter:
    """kaleido's renderer without a browser, which takes longer than all the rest."""

    def __init__(self, **_):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def calc_fig(self, figure, **_):
        return b"an image"


# Of a report's six megabytes five are this script.
plotly.offline.get_plotlyjs = lambda: "plotly"
sys.modules["kaleido"] = SimpleNamespace(Kaleido=_Painter, PageGenerator=_Painter)


def _every_work_once():
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        for each in (work.whole_run, work.saved_corpus):
            os.makedirs(os.path.join(folder, each.__name__))
            os.chdir(os.path.join(folder, each.__name__))
            work.write_spec(Path())
            with suppress(SystemExit), redirect_stdout(null), redirect_stderr(null):
                each()
        os.chdir(here)


_every_work_once()
