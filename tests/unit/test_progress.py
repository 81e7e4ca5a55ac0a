"""Progress: what is counted, what is shown where, and that it can be silenced."""

from __future__ import annotations

import io
import threading

import pytest

from isthmus import progress as module
from isthmus.progress import Tracker, duration, progress


@pytest.fixture(autouse=True)
def _not_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test session silences progress; here it is what is tested."""
    monkeypatch.delenv("ISTHMUS_PROGRESS", raising=False)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rate_and_time_left_follow_the_clock() -> None:
    clock = Clock()
    tracker = Tracker("index", total=100, clock=clock)
    assert tracker.rate is None
    assert tracker.remaining_s is None
    clock.now += 4
    tracker.advance(20)
    assert tracker.rate == pytest.approx(5.0)
    assert tracker.remaining_s == pytest.approx(16.0)
    tracker.update(total=60, loss=2.34567, epoch=1)
    assert tracker.facts() == "20/60 samples, 5/s, 8 s left, loss 2.346, epoch 1"


def test_an_unknown_total_is_not_made_up() -> None:
    clock = Clock()
    tracker = Tracker("fetch", unit="files", clock=clock)
    clock.now += 2
    tracker.advance(4)
    assert tracker.remaining_s is None
    assert tracker.facts() == "4 files, 2/s"


def test_lines_come_at_most_every_ten_seconds_and_at_the_end() -> None:
    clock, lines = Clock(), []
    tracker = Tracker("cache", total=50, clock=clock, paint=module._Lines(lines.append))
    for _ in range(50):
        clock.now += 0.5
        tracker.advance()
    assert [line.split(",")[0] for line in lines] == ["cache: 20/50 samples", "cache: 40/50 samples"]
    tracker.finish()
    assert lines[-1] == "cache: 50/50 samples, 2/s, done in 25 s"


def test_a_log_gets_plain_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("caption", total=3, unit="images") as tracker:
        tracker.advance(3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("caption: 3/3 images")
    assert "\x1b" not in shown.err


def test_silence_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_PROGRESS", "0")
    with progress("caption", total=3) as tracker:
        tracker.advance(3)
    assert tracker.done == 3
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_bars_that_nest_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress("outer", total=2) as outer, progress("inner", total=5, unit="images") as inner:
        inner.advance(5)
        outer.advance(2)
    assert module._Bar._display is None
    assert "outer" in terminal.getvalue()
    assert "5/5 images" in terminal.getvalue()


def test_a_failing_block_closes_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyError), progress("broken"):
        raise KeyError("x")
    assert module._Bar._display is None


def test_threads_lose_no_count() -> None:
    tracker = Tracker("threads")

    def work() -> None:
        for _ in range(2000):
            tracker.advance()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracker.done == 8000


@pytest.mark.parametrize(("seconds", "text"), [(7.6, "8 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
