"""Stop signals during a run, errors, progress bars and durations of commands."""

import argparse
import errno
import os
import re
import signal
import threading

import pytest
import torch

from dinov2.utils.command import (
    StopReceived,
    StopSignals,
    duration_text,
    error_text,
    exit_code,
    find_cause,
    number_between,
    progress_bar,
)


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


def test_a_signal_ends_a_wait_and_nothing_else():
    with StopSignals() as signals:
        with signals.wait(is_interruptible=False):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        with pytest.raises(StopReceived), signals.wait():
            pytest.fail("the signal came before the wait")
        signals.received = None
        with pytest.raises(StopReceived), signals.wait():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_outside_the_main_thread_it_does_nothing():
    entered = []

    def enter():
        with StopSignals() as signals:
            entered.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]


def test_numbers_outside_their_range_are_named_in_few_words():
    assert [number_between(1, 3)(text) for text in ("1", "3")] == [1, 3]
    assert number_between(0.5, 2.0)("2") == 2.0
    for text in ("0", "4", "1.5", "inf", "nan", "x", "9" * 100_000):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a whole number from 1 to 3$") as caught:
            number_between(1, 3)(text)
        assert len(str(caught.value)) < 100


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


def run(error: BaseException) -> int:
    def command():
        raise error

    return exit_code(command)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("unknown key a.b"), "unknown key a.b"),
        (ValueError("bad"), "bad"),
        (OSError(errno.ENOSPC, "No space left on device", "run/model.pth"), "run/model.pth: No space .*make room"),
        (OSError(errno.ENOLCK, "No locks available", "f.h5"), "f.h5: No locks available; .*has no locks"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", b"a\xff"), r"a\\udcff: Disk quota exceeded; your quota"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; .*copy the file to another disk"),
        (OSError(errno.ESTALE, "Stale file handle", "x"), "x: Stale file handle; .*mounted anew"),
        (OSError("no number"), "no number"),
        (MemoryError("7 GiB"), r"not enough memory 7 GiB; use smaller batches"),
        (RecursionError("depth"), "nested too deeply"),
    ],
)
def test_what_a_user_a_file_or_the_machine_caused_is_one_message_and_exit_code_2(error, expected, caplog):
    assert run(error) == 2
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert re.search(expected, record.message)
    assert record.exc_info is None


def test_a_fault_of_the_program_keeps_its_traceback_and_says_so(caplog):
    with pytest.raises(TypeError, match="ours"):
        run(TypeError("ours"))
    assert "fault of the program" in caplog.text


def test_a_message_has_at_most_ten_lines(caplog):
    assert run(ValueError("\n".join(map(str, range(500))))) == 2
    lines = caplog.records[-1].message.splitlines()
    assert (len(lines), lines[0], lines[-1]) == (10, "0", "[...]")
    assert len(error_text(ValueError("a" * 100_000))) < 2_100


def test_a_short_message_is_not_cut():
    assert error_text(ValueError("\n".join("0123456789"))) == "\n".join("0123456789")


def full_disk_error() -> RuntimeError:
    """Return the error of torch.save when a write fails: its own, with the system's as context."""
    error = RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 704 vs 598")
    error.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.pth")
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (full_disk_error(), "a.pth: No space left on device; make room"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "not enough memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. See documentation"), "2.00 GiB.)"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "use fewer workers"),
    ],
)
def test_errors_of_the_machine_in_torchs_words_are_no_fault_of_the_program(error, text, caplog):
    def command():
        raise error

    assert exit_code(command) == 2
    assert text in caplog.text


def test_other_errors_of_torch_are_its_own():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert find_cause(error) is error


def test_the_error_of_a_worker_is_its_last_line():
    text = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\nOSError: a.png is gone\n"
    assert error_text(OSError(text)) == "OSError: a.png is gone"
