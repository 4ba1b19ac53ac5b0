"""The wheel: built from the sources, installed into an environment that has nothing else."""

import importlib.util
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.without_library, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
NEEDS = "a C++ compiler, CMake and scikit-build-core"


def build(folder: Path, **variables: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the sources; its path and what the build said."""
    for name in ("native", "src"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(folder / "wheels"), str(folder / "source")],
        env={"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel, done.stdout + done.stderr


def ask(folder: Path, wheel: Path, code: str) -> str:
    """What Python prints in an environment with this wheel alone."""
    venv.create(folder / "bare", with_pip=False, symlinks=True)
    (packages,) = (folder / "bare").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    python = folder / "bare" / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env={}, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    not all(map(shutil.which, ("c++", "cmake")))
    or importlib.util.find_spec("scikit_build_core") is None,
    reason=f"building needs {NEEDS}",
)
def test_a_wheel_with_the_library(tmp_path: Path) -> None:
    wheel, _ = build(tmp_path)
    assert wheel.name.startswith("xinslm-") and "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    code = (
        "from xinslm.native import library, library_path, reason\n"
        "lib = library()\n"
        "print(library_path().name, lib.xl_abi(), reason())"
    )
    assert ask(tmp_path, wheel, code).split() == [f"libxinslm.{_suffix()}", str(_abi())]


@pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason=f"building needs {NEEDS}"
)
def test_a_wheel_without_a_compiler_says_so(tmp_path: Path) -> None:
    wheel, said = build(tmp_path, CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "installed without its native library" in said
    code = "from xinslm.native import library, reason; print(library(), reason())"
    assert ask(tmp_path, wheel, code) == (
        "None the library was not built when xinslm was installed\n"
    )


def _suffix() -> str:
    return "dylib" if sys.platform == "darwin" else "so"


def _abi() -> int:
    from xinslm.native.load import ABI

    return ABI
