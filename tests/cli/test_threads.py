"""The number of threads follows the cores that other processes leave free."""

import subprocess
import sys
import time

import psutil
import pytest
import torch

from xinslm.cli import threads
from xinslm.cli.threads import FreeCores, seconds_of_others
from xinslm.progress import Progress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
REPORT = Progress("train", 1, 10, "steps")


class Machine:
    """Four cores and a clock; other processes use as many cores as the test says."""

    def __init__(self, monkeypatch):
        self.now, self.used, self.threads, self.reports = 0.0, 0.0, 4, []
        threads.threads_at_first.cache_clear()
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: range(4))
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))

    def listener(self, environ=None):
        return FreeCores(self.reports.append, environ or {}, lambda: self.used)

    def pass_time(self, seconds, others):
        self.now, self.used = self.now + seconds, self.used + seconds * others


@pytest.fixture
def machine(monkeypatch):
    yield Machine(monkeypatch)
    threads.threads_at_first.cache_clear()


def test_threads_follow_the_free_cores_down_and_up(machine):
    listen = machine.listener()
    for others, expected in ((0.1, 4), (1.0, 3), (2.8, 1), (9.0, 1), (0.0, 4)):
        machine.pass_time(2, others)
        listen(REPORT)
        assert machine.threads == expected


def test_a_command_that_ended_beside_a_neighbour_does_not_bind_the_next(machine):
    """The commands of `demo` run in one process."""
    listen = machine.listener()
    machine.pass_time(2, 3.0)
    listen(REPORT)
    assert machine.threads == 1
    listen = machine.listener()
    machine.pass_time(2, 0.0)
    listen(REPORT)
    assert machine.threads == 4


def test_fewer_threads_than_cores_are_kept_while_enough_cores_are_free(machine):
    machine.threads = 2
    listen = machine.listener()
    machine.pass_time(2, 1.0)
    listen(REPORT)
    assert machine.threads == 2


def test_every_report_is_passed_on_and_one_note_tells_of_the_change(machine):
    listen = machine.listener()
    for others in (1.0, 2.0, 0.0):
        machine.pass_time(2, others)
        listen(REPORT)
    notes = [report.note for report in machine.reports if report.note]
    assert notes == ["other processes use 1.0 of 4 cores; threads follow: 3 now"]
    assert machine.reports.count(REPORT) == 3


@pytest.mark.parametrize("name", threads.FIXED_BY)
def test_a_number_that_the_user_fixed_is_kept(machine, name):
    listen = machine.listener({name: "4"})
    machine.pass_time(2, 3.0)
    listen(REPORT)
    assert machine.threads == 4


def test_a_system_without_figures_keeps_the_number(machine):
    machine.used = None
    listen = FreeCores(machine.reports.append, {}, lambda: None)
    machine.now = 2
    listen(REPORT)
    assert machine.threads == 4 and machine.reports == [REPORT]


def test_seconds_of_others_is_all_use_of_the_processor_but_our_own():
    def all_use():
        times = psutil.cpu_times()
        return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice

    before, total, own = seconds_of_others(), all_use(), time.process_time()
    while time.process_time() - own < 0.5:
        pass
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    expected = all_use() - total - (time.process_time() - own)
    assert seconds_of_others() - before == pytest.approx(expected, abs=0.15)
    assert expected > 0.4
