"""Whatever a folder holds, it is loaded right or refused by name: soon, in little memory, without code and network."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hostile_folders import BASES, FOLDERS, LOADS, TEXT
from transformers.integrations import hub_kernels

from mechhier.models import load_model
from mechhier.models.errors import ModelLoadError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="Windows has neither pipes nor this clock")

CPU_SECONDS = 2
"""A folder is refused within this time."""
HARD_SECONDS = 10
MEGABYTES = 400
TOKENS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The folders before they are spoilt, with what their models say."""
    root, said = tmp_path_factory.mktemp("wholes"), {}
    for base, save in BASES.items():
        (root / base).mkdir()
        save(root / base)
        said[base] = what_it_says(load_model(root / base))
    return root, said


def what_it_says(model):
    with torch.no_grad():
        logits = model(TOKENS)
    return logits, None if model.tokenizer is None else model.to_tokens(TEXT)[0].tolist()


@pytest.fixture
def guarded(monkeypatch):
    """No network, no other program, no kernel of a hub; and a hang ends."""

    def never(*_, **__):
        pytest.fail("reached out of the folder")

    for owner, name in (
        (socket.socket, "connect"),
        (socket, "getaddrinfo"),
        (socket, "create_connection"),
        (subprocess, "Popen"),
        (hub_kernels, "get_kernel"),
    ):
        monkeypatch.setattr(owner, name, never)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", never)

    def hung(*_):
        raise TimeoutError(f"over {HARD_SECONDS} s of CPU")

    before = signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, HARD_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def peak_megabytes() -> int:
    """The most that this process has held since `forget_peak`; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not count peaks anew")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("guarded")
def test_a_folder_is_loaded_right_or_refused(name, wholes, tmp_path, capfd):
    root, said = wholes
    base, spoil, error, message = FOLDERS[name]
    folder = tmp_path / "model"
    shutil.copytree(root / base, folder)
    spoil(folder)
    forget_peak()
    memory, started = peak_megabytes(), time.process_time()
    if error == LOADS:
        logits, tokens = what_it_says(load_model(folder))
        torch.testing.assert_close(logits, said[base][0], atol=1e-4, rtol=0)
        assert tokens == said[base][1]
    else:
        with pytest.raises(ModelLoadError) as raised:
            load_model(folder)
        text = str(raised.value)
        assert isinstance(raised.value, error), f"{type(raised.value).__name__}: {text}"
        assert str(folder) in text or type(raised.value).__name__ == "UnsupportedModelError"
        assert "What to do" in text or "no config.json" in text
        assert re.search(message, text, re.DOTALL)
        assert text.replace("\n", "").isprintable()
        assert len(text) < 3000
        # A traceback shows what an error was raised from, in its own words.
        assert raised.value.__cause__ is None
        assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert time.process_time() - started < CPU_SECONDS
    assert peak_megabytes() - memory < MEGABYTES
    assert "\x1b[2J" not in "".join(capfd.readouterr())
