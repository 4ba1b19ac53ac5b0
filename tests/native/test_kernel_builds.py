"""Kernels outside this processor: emulated instructions, other architectures, older processors.

`native/tests/kernels_test.cpp` prints hashes of what a set of kernels computes, with memory that
ends where the arrays do. All sets must print the same text.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xinslm.native import library_path
from xinslm.native.bindings import kernels

ROOT = Path(__file__).parents[2]
SETS = ["scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "neon_dot"]
ON_X86 = platform.machine() == "x86_64" and sys.platform == "linux"
CROSS = "aarch64-linux-gnu-g++"
TO_ARM = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={CROSS}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
]
pytestmark = pytest.mark.slow


def needs(*tools: str, x86: bool = False) -> pytest.MarkDecorator:
    """Skips a test where one of the programs is missing, by its name."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if x86 and not ON_X86:
        missing.insert(0, "Linux on x86-64")
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def built(factory: pytest.TempPathFactory, name: str, options: list[str]) -> Path:
    """The folder with CMake's programs of kernels; the test processes of a run build it once."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / f"kernels-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            output("cmake", "-S", ROOT / "native", "-B", folder, "-DXINSLM_TESTS=ON", *options)
            output("cmake", "--build", folder, "--target", "kernel_programs")
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "here", [])


@pytest.fixture(scope="session")
def definition(here: Path) -> str:
    """What the scalar kernels print."""
    text = output(here / "kernels_test", "scalar")
    lines = [line.rsplit(maxsplit=1) for line in text.splitlines()]
    assert len(lines) > 150 and len(dict(lines)) == len(lines)
    assert len({value for _, value in lines}) > 100  # inputs that make all NaN agree
    return text


@needs("cmake", "c++")
def test_sets_of_this_processor_compute_the_same_bits(here: Path, definition: str) -> None:
    for name in kernels():
        assert output(here / "kernels_test", name) == definition, name


@pytest.mark.without_library
@needs("cmake", "c++", x86=True)
def test_vnni_kernels_compute_the_same_bits_with_emulated_instructions(
    here: Path, definition: str
) -> None:
    program = here / "kernels_emulated"
    assert output(program).split() == ["scalar", "avx2", "avxvnni", "avx512vnni", "amx"]
    for name in ("avxvnni", "avx512vnni", "amx"):
        assert output(program, name) == definition, name


@pytest.mark.without_library
@needs("cmake", "c++", CROSS, "qemu-aarch64")
def test_neon_kernels_compute_the_same_bits_on_an_emulated_processor(
    tmp_path_factory: pytest.TempPathFactory, definition: str
) -> None:
    program = built(tmp_path_factory, "arm", TO_ARM) / "kernels_test"
    assert output("qemu-aarch64", program).split() == ["scalar", "neon", "neon_dot"]
    for name in ("scalar", "neon", "neon_dot"):
        assert output("qemu-aarch64", program, name) == definition, name


@pytest.mark.without_library
@needs("cmake", "c++")
def test_pieces_by_windows_are_those_one_by_one(here: Path) -> None:
    lines = output(here / "scanner_test").splitlines()
    assert [line.split()[0] for line in lines] == ["llama3", "gpt2", "qwen2", "smollm"]
    assert all(int(line.split()[1]) > 2_000_000 for line in lines)


@pytest.mark.without_library
@needs("cmake", "c++", CROSS, "qemu-aarch64")
def test_pieces_by_windows_are_the_same_on_an_emulated_processor(
    tmp_path_factory: pytest.TempPathFactory, here: Path
) -> None:
    program = built(tmp_path_factory, "arm", TO_ARM) / "scanner_test"
    assert output("qemu-aarch64", program) == output(here / "scanner_test")


@pytest.mark.without_library
@needs("cmake", "c++", "nm", x86=True)
def test_kernel_objects_share_no_function(here: Path) -> None:
    # Of a weak function, such as an inline one of a header, the linker keeps one copy for all: it
    # may be one that was compiled for a newer processor.
    listed = output("nm", "-C", "--defined-only", "--extern-only", here / "libkernels.a")
    assert sorted(re.findall("^[0-9a-f]+ (.*)", listed, re.MULTILINE)) == sorted(
        f"T xl::{name}_kernels()" for name in SETS
    )


@pytest.mark.without_library
@needs("cmake", "c++", "objdump", x86=True)
def test_instructions_of_newer_processors_stay_in_their_objects(here: Path) -> None:
    listed = output("objdump", "-d", here / "libkernels.a")
    found = {name: dict.fromkeys(("vex", "evex", "zmm", "dots", "tiles"), 0) for name in SETS}
    for line in listed.splitlines():
        if member := re.match(r"(\w+)\.cpp\.\w+: +file format", line):
            counts = found[member[1]]
        # in 64-bit mode these first bytes belong to no other instruction
        elif code := re.match(r" +[0-9a-f]+:\t(c4|c5|62) ", line):
            counts["evex" if code[1] == "62" else "vex"] += 1
            counts["zmm"] += "%zmm" in line
            counts["dots"] += "vpdpbusd" in line
            counts["tiles"] += "tdpbssd" in line
    has = {
        name: {kind for kind, count in counts.items() if count} for name, counts in found.items()
    }
    assert has["scalar"] == has["neon"] == has["neon_dot"] == set()
    assert has["avx2"] == {"vex"}
    assert has["avxvnni"] == {"vex", "dots"}
    assert has["avx512vnni"] == {"vex", "evex", "zmm", "dots"}
    assert has["amx"] == {"vex", "evex", "zmm", "dots", "tiles"}


@pytest.mark.without_library
@needs("cmake", "c++", "objdump", x86=True)
def test_dot_products_stand_without_moves_of_their_sums(here: Path) -> None:
    # gcc 12 copies a sum before and after each intrinsic, which more than halves the speed
    listed = output("objdump", "-d", "--no-show-raw-insn", here / "libkernels.a")
    (kernels,) = re.findall(r"(?s)avx512vnni\.cpp\.\w+: +file format.*?(?=\n\S+: +file|\Z)", listed)
    counts = [
        (block.count("vpdpbusd"), len(re.findall(r"vmov\S+ +%zmm\d+,%zmm\d+\n", block)))
        for block in re.split(r"\t(?:j|ret)", kernels)
    ]
    counts = [(dots, moves) for dots, moves in counts if dots]
    assert sum(dots for dots, _ in counts) > 100
    assert all(2 * moves < dots for dots, moves in counts), counts


@needs("cc", "qemu-x86_64", x86=True)
def test_an_older_processor_gets_the_kernels_that_it_runs(tmp_path: Path) -> None:
    program, sources = tmp_path / "loads", ROOT / "native"
    output("cc", f"-I{sources / 'include'}", sources / "tests" / "loads.c", "-o", program, "-ldl")
    library = library_path()
    assert library is not None
    names, *bits = output(program, library).splitlines()
    assert names.split() == kernels()
    for processor, wanted in (("Nehalem", "scalar"), ("Haswell", "avx2 scalar")):
        got = output("qemu-x86_64", "-cpu", processor, program, library).splitlines()
        assert got == [wanted, *bits], processor
