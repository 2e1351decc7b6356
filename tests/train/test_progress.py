"""What a person sees: plain lines off a terminal, a bar on one, messages on both."""

import io

from train.progress import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int, **more: float) -> dict:
    return {"step": step, "loss": 2.5, "skipped": 0, **more}


def show(stream: io.StringIO, monkeypatch) -> str:
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr("train.progress.time.monotonic", lambda: float(next(now)))
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay(10, 1000, 2, stream)
    display.start(0)
    for step in range(1, 6):
        display.update(row(step))
    display.message("a message")
    display.update(row(6, heldout_loss=3.25) | {"skipped": 1})
    display.close()
    return stream.getvalue()


def test_plain_lines(monkeypatch) -> None:
    assert show(io.StringIO(), monkeypatch).splitlines() == [
        "step 2/10  loss 2.5000  500 tok/s  0:16 left",
        "step 4/10  loss 2.5000  500 tok/s  0:12 left",
        "a message",
        "step 6/10  loss 2.5000  skipped  held-out 3.2500  500 tok/s  0:08 left",
    ]


def test_bar(monkeypatch) -> None:
    text = show(Terminal(), monkeypatch)
    assert "6/10" in text and "loss 2.5000" in text and "a message" in text and "left" in text


def test_hours(monkeypatch) -> None:
    display = ProgressDisplay(100_000, 1, 1, stream := io.StringIO())
    monkeypatch.setattr("train.progress.time.monotonic", iter([0.0, 1.0]).__next__)
    display.update(row(1))
    display.update(row(2))
    assert stream.getvalue().endswith("1 tok/s  27:46:38 left\n")
