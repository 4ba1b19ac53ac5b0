"""The share of other processes, from readings of the machine's and the process' own CPU time; the
cores that affinity and control groups leave.
"""

import os
from pathlib import Path

import pytest

from xinslm import machine
from xinslm.machine import (
    OtherLoad,
    _Reading,
    cpu_limit,
    environment,
    is_shared,
    usable_cores,
)


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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_affinity_bounds_the_cores():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("limit", "cores"), [(None, 4), (9.0, 4), (3.0, 3), (2.9, 2), (1.0, 1), (0.2, 1)]
)
def test_whole_cores_of_a_control_groups_limit(monkeypatch, limit, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setattr(machine, "cpu_limit", lambda: limit)
    assert usable_cores() == cores


NESTED = "0::/app.slice/job.service\n"
CONTAINER = "12:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/docker/1f\n"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container's root is its own group
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        (NESTED, {"app.slice/job.service/cpu.max": "200000 100000\n"}, 2),
        (
            NESTED,
            {
                "app.slice/job.service/cpu.max": "max 100000\n",
                "app.slice/cpu.max": "300000 100000\n",
                "cpu.max": "800000 100000\n",
            },
            3,
        ),
        (CONTAINER, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (CONTAINER, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (NESTED, {"other.slice/cpu.max": "100000 100000\n", "cpu.max": "strange\n"}, None),
        ("", {"cpu.max": "100000 100000\n"}, 1),
        (None, {"cpu.max": "100000 100000\n"}, 1),  # a masked /proc
        ("strange\n", {"cpu.max": "100000 100000\n"}, 1),
        (
            CONTAINER,
            {
                "cpu,cpuacct/docker/1f/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/docker/1f/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
    ],
)
def test_limit_is_the_least_of_the_own_groups_and_those_above(tmp_path, own, files, limit):
    """In both versions of control groups, as the kernel writes their files."""
    groups: Path = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert cpu_limit(tmp_path / "own", groups) == limit
