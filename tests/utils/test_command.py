"""Stop signals during a run, errors, progress bars and durations of commands."""

import os
import signal
import threading

import pytest

from dinov2.utils.command import StopSignals, duration_text, progress_bar


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_noted_and_the_handler_before_comes_back(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append("before"))
    try:
        with StopSignals() as signals:
            assert signals.received is None
            os.kill(os.getpid(), number)
            assert signals.received == number
        assert seen == []
        os.kill(os.getpid(), number)
        assert seen == ["before"]
    finally:
        signal.signal(number, before)


def test_a_second_interrupt_ends_at_once():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_it_does_nothing():
    entered = []

    def enter():
        with StopSignals() as signals:
            entered.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0m00s"), (61, "1m01s"), (3599.6, "1h00m"), (3 * 3600 + 300, "3h05m"), (93_600, "1d02h")],
)
def test_durations_have_two_units(seconds, text):
    assert duration_text(seconds) == text


def test_a_bar_counts_images(capsys):
    with progress_bar(total=3, desc="reading") as bar:
        bar.update(3)
    line = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert line.startswith("reading: 100%")
    assert "3/3" in line
    assert "images/s" in line
