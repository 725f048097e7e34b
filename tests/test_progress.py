"""Progress and announcements: seldom in a log, none where quiet, and nothing that a terminal obeys."""

from __future__ import annotations

import io
import sys
import unicodedata

import pytest
from rich.console import Console

from mechhier import progress
from mechhier.progress import announce, quiet, track
from mechhier.text import printable


class Clock:
    """Seconds that pass only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr(progress._Lines, "last_line", -float("inf"))
    monkeypatch.setattr(progress._Lines, "last_end", -float("inf"))
    return clock


def work(clock: Clock, seconds: float, *, step: float = 1.0, name: str = "training") -> None:
    n = int(seconds / step)
    with track(name, total=n) as advance:
        for _ in range(n):
            clock.now += step
            advance(note="loss 2.31, 12,345 tokens/s")


def test_nine_minutes_without_a_terminal_are_eighteen_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 540)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert not shown.out
    assert len(lines) == 18
    assert lines[0] == "training 30/540, 0:00:30 elapsed, 0:08:30 left, loss 2.31, 12,345 tokens/s"
    assert lines[-1] == "training 540/540, 0:09:00 elapsed, loss 2.31, 12,345 tokens/s"


def test_the_end_is_said_where_anything_was(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 40)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["training 30/40", "training 40/40"]


def test_two_seconds_are_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 2, step=0.1)
    clock.now += 1000
    work(clock, 2, step=0.1)
    assert capsys.readouterr() == ("", "")


def test_many_short_blocks_are_one_job(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(20):
        work(clock, 5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3


def test_a_line_has_all_rows_of_nested_blocks(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with track("checkpoints", total=4, completed=1) as advance:
        for _ in range(3):
            work(clock, 20, step=10, name="layers")
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "checkpoints 2/4, 0:00:30 elapsed, 0:01:00 left > layers 1/2, 0:00:10 elapsed, 0:00:10 left, "
        "loss 2.31, 12,345 tokens/s",
        "checkpoints 3/4, 0:01:00 elapsed, 0:00:30 left > layers 2/2, 0:00:20 elapsed, loss 2.31, 12,345 tokens/s",
        "checkpoints 4/4, 0:01:00 elapsed",
    ]


def test_other_processes_of_a_launcher_say_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    work(clock, 540)
    announce("here")
    assert capsys.readouterr() == ("", "")


def test_quiet_hides_progress_and_announcements_until_it_ends(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        with quiet():
            work(clock, 540)
        announce("here")
    assert capsys.readouterr() == ("", "")
    announce("there")
    assert capsys.readouterr() == ("", "there\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_is_sent_that_a_terminal_obeys(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, is_terminal: bool
) -> None:
    """Every control and direction character in a description, a note and an announcement; the rows' own are rich's."""
    evil = "[red]x[/red] :boom: " + "".join(chr(code) for code in HARMFUL if code < 0xD800 or code % 100 == 0)
    written = io.StringIO()
    if is_terminal:
        console = Console(file=written, force_terminal=True, color_system=None, width=5000, _environ={})
        monkeypatch.setattr(progress, "_display", lambda: progress._Bars(console))
    with track(evil, total=2) as advance:
        for _ in range(2):
            clock.now += 40
            advance(note=evil)
        announce(evil)
    shown = written.getvalue() if is_terminal else capsys.readouterr().err
    for sequence in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r"):
        shown = shown.replace(sequence, "")
    assert "[red]x[/red] :boom: " in shown
    assert not [character for character in shown if ord(character) in HARMFUL]
    assert shown.count(r"\x1b") >= 3


HARMFUL = [
    code
    for code in range(sys.maxunicode + 1)
    if chr(code) not in "\n\t"
    and (
        unicodedata.category(chr(code)) in ("Cc", "Cs")
        or unicodedata.bidirectional(chr(code)) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    )
]


def test_every_harmful_character_is_shown_and_no_other() -> None:
    for code in HARMFUL:
        assert printable(chr(code)) == (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
    harmful = set(HARMFUL)
    harmless = "".join(chr(code) for code in range(sys.maxunicode + 1) if code not in harmful)
    assert printable(harmless) == harmless
