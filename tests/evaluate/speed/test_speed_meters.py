"""Peak memory against an array of known size; energy against counters in files."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from xinslm.evaluate.speed.meters import EnergyMeter, peak_memory_bytes

MEGABYTE = 1 << 20
PEAKS = """
from pathlib import Path
from xinslm.evaluate.speed.meters import peak_memory_bytes
before = peak_memory_bytes()
block = bytearray({size})
block[::4096] = b"x" * len(block[::4096])  # touch every page
del block
print(before, peak_memory_bytes(), peak_memory_bytes(Path("/nonexistent")))
"""


def peaks(size: int) -> list[int]:
    """Before and after the use of `size` bytes, and after it without Linux's file."""
    code = PEAKS.format(size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(value) for value in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss may be the parent's")
def test_the_peak_grows_by_an_array_and_stays_when_it_is_freed() -> None:
    before, after, _ = peaks(192 * MEGABYTE)
    assert 191 * MEGABYTE <= after - before < 200 * MEGABYTE


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_without_proc_the_unit_is_the_platforms() -> None:
    _, _, after = peaks(900 * MEGABYTE)
    # a process begins with the peak of the one that started it
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 900 * MEGABYTE <= after < max(950 * MEGABYTE, own + MEGABYTE)


def test_the_kernels_line_is_in_kibibytes(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmPeak:\t 999 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n")
    assert peak_memory_bytes(tmp_path / "status") == 1234 * 1024


def write_zone(root: Path, zone: str, name: str, energy: int) -> None:
    (root / zone).mkdir(exist_ok=True)
    (root / zone / "name").write_text(f"{name}\n")
    (root / zone / "energy_uj").write_text(f"{energy}\n")
    (root / zone / "max_energy_range_uj").write_text("10000000\n")


def test_packages_are_added_and_parts_and_platform_are_not(tmp_path: Path) -> None:
    def write(first: int, second: int, part: int) -> None:
        write_zone(tmp_path, "intel-rapl:0", "package-0", first)
        write_zone(tmp_path, "intel-rapl:0:0", "core", part)
        write_zone(tmp_path, "intel-rapl:1", "package-1", second)
        write_zone(tmp_path, "intel-rapl:2", "psys", 5 * part)

    write(1_000_000, 9_000_000, 0)
    meter = EnergyMeter(tmp_path)
    assert meter.joules() is None  # nothing counted is not zero joules
    write(3_500_000, 1_000_000, 777_777)  # the second wraps at 10 J
    assert meter.joules() == pytest.approx(2.5 + 2.0)


def test_counters_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "absent").joules() is None
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules() is None
    hidden = EnergyMeter(tmp_path)  # unreadable at first, readable later
    write_zone(tmp_path, "intel-rapl:0", "package-0", 9)
    assert hidden.joules() is None
