"""The AVX-512 kernels' dot product in assembly is the intrinsic's instruction.

Tests with emulated instructions run the intrinsic, because assembly needs the processor; so the
compiled instructions are compared: the same one, with the sum, the unsigned codes and the signed
inputs at the same places.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "native" / "src"
SETS = ("fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
FLAGS = ["-O2", "-std=c++17", *(f"-m{name}" for name in SETS)]
MISSING = [tool for tool in ("g++", "objdump") if shutil.which(tool) is None]
if platform.machine() != "x86_64" or sys.platform != "linux":
    MISSING.insert(0, "Linux on x86-64")
PROGRAM = """
#include "kernels/simd_avx512.h"
extern "C" __m512i assembly(__m512i sum, __m512i codes, const signed char *inputs) {
    return xl::Avx512Vnni::dot(sum, codes, inputs);
}
extern "C" __m512i intrinsic(__m512i sum, __m512i codes, const signed char *inputs) {
    int four;
    std::memcpy(&four, inputs, 4);
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
}
"""


def compiled(tmp_path: Path) -> str:
    source, made = tmp_path / "dot.cpp", tmp_path / "dot.o"
    source.write_text(PROGRAM)
    command = ["g++", *FLAGS, f"-I{SOURCES}", "-c", source, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", made], capture_output=True, text=True, check=True
    )
    return listing.stdout


@pytest.mark.without_library
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_dot_product_in_assembly_is_the_intrinsics_instruction(tmp_path: Path) -> None:
    functions = dict(re.findall(r"<(\w+)>:\n(.*?)(?:\n\n|\Z)", compiled(tmp_path), re.DOTALL))
    dots = {
        name: re.findall(r"vpdpbusd +([^,]+),%(zmm\d+),%(zmm\d+)", text)
        for name, text in functions.items()
    }
    assert len(dots["assembly"]) == len(dots["intrinsic"]) == 1
    # arguments arrive in registers: the sum in zmm0, where the result also goes, the codes in zmm1
    for _, codes, total in (dots["assembly"][0], dots["intrinsic"][0]):
        assert (total, codes) == ("zmm0", "zmm1")
    assert dots["assembly"][0][0] == "(%rdi){1to16}"
    loaded = re.findall(r"vpbroadcastd +\(%rdi\),%(zmm\d+)", functions["intrinsic"])
    assert dots["intrinsic"][0][0] in ("(%rdi){1to16}", *(f"%{name}" for name in loaded))
