"""Where the time of a step goes, by a clock of the host that the test turns."""

import pytest

from dinov2.logging import step_clock
from dinov2.logging.step_clock import StepClock


@pytest.fixture
def now(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: time[0])
    return time


def test_stages_of_several_steps_are_averaged_and_then_forgotten(now):
    clock = StepClock("cpu")
    for seconds in (1.0, 3.0):
        with clock.stage("data"):
            now[0] += seconds
        for _ in range(2):  # two micro-batches of a step
            with clock.stage("student"):
                now[0] += 2 * seconds
    assert clock.means() == {"data": 2.0, "student": 8.0}
    assert clock.means() == {}


def test_what_lies_between_a_stage_and_a_restart_belongs_to_no_stage(now):
    clock = StepClock("cpu")
    with clock.stage("data"):
        pass
    now[0] += 100  # an evaluation
    clock.restart()
    now[0] += 1
    with clock.stage("student"):
        pass
    assert clock.means() == {"data": 0.0, "student": 1.0}


def test_a_stage_that_fails_counts_no_time(now):
    clock = StepClock("cpu")
    with pytest.raises(ValueError, match="wrong"), clock.stage("data"):
        raise ValueError("wrong")
    assert clock.means() == {}


def test_a_clock_that_nobody_reads_stays_small(now, monkeypatch):
    monkeypatch.setattr(step_clock, "MAX_MARKS", 9)
    clock = StepClock("cpu")
    for _ in range(100):
        for name in ("data", "student"):
            with clock.stage(name):
                now[0] += 1
    assert clock.means() == {"student": 1.0, "data": 1.0}
