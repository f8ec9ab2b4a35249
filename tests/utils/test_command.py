"""Signals are noted while a run is active, and go to whoever had them before afterwards."""

import os
import signal
import threading

import pytest

from dinov2.utils.command import StopSignals


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
