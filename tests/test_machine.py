"""The share of other processes, from readings of the machine's and the process' own CPU time."""

import pytest

from xinslm import machine
from xinslm.machine import OtherLoad, _Reading, environment, is_shared


def readings(monkeypatch, *values):
    left = iter(values)
    monkeypatch.setattr(machine, "_read", lambda: next(left))


@pytest.mark.parametrize(
    ("own", "busy", "share"),
    [
        (9.0, 9.2, 0.01),  # one of two cores busy with our work
        (20.0, 20.0, 0.0),  # both
        (10.0, 16.0, 0.3),  # others took 6 of 20 core seconds
        (9.0, 8.9, 0.0),  # ticks are coarse
    ],
)
def test_other_load_is_what_is_busy_but_not_ours(monkeypatch, own, busy, share):
    readings(monkeypatch, _Reading(5, 1, 100, 300), _Reading(15, 1 + own, 100 + busy, 320))
    found = OtherLoad().share()
    assert found == pytest.approx(share)
    assert is_shared(found) == (share > 0.1)


def test_each_answer_is_for_the_time_since_the_last(monkeypatch):
    start, idle = _Reading(0, 0, 0, 0), _Reading(1, 0, 0, 2)
    soon, busy = _Reading(1.01, 0, 0.02, 2.02), _Reading(2, 0, 1, 4)
    readings(monkeypatch, start, idle, soon, busy)
    load = OtherLoad()
    assert [load.share() for _ in range(3)] == [0.0, 0.0, 0.5]


def test_an_unknown_load_is_not_called_shared(monkeypatch):
    readings(monkeypatch, _Reading(0, 0), _Reading(0.01, 0))
    assert OtherLoad().share() is None
    assert not is_shared(None)


def test_without_the_machines_cpu_time_the_load_average_counts(monkeypatch):
    readings(monkeypatch, _Reading(0, 0), _Reading(10, 10))
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (2.0, 0, 0))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    assert OtherLoad().share() == pytest.approx(0.25), "2 run, one of them is this process"


def test_the_environment_names_the_machine():
    found = environment()
    assert set(found) == {"date", "machine"}
    assert "cores, torch " in found["machine"] and not found["machine"].startswith(",")
