"""Finding the library, and what happens where it is not, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_models import save_quantized
from xinslm.native import library, reason

pytestmark = pytest.mark.without_library


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_off_and_require(tmp_path: Path) -> None:
    asks = "from xinslm.native import library, reason; print(library(), reason())"
    assert run(asks, XINSLM_NATIVE="off").stdout == "None XINSLM_NATIVE=off\n"
    wrong = run(asks, XINSLM_NATIVE="maybe")
    assert "must be one of auto, off, require" in wrong.stderr
    junk = tmp_path / "junk.so"
    junk.write_bytes(b"no library")
    lost = run(asks, XINSLM_NATIVE="require", XINSLM_NATIVE_LIBRARY=str(junk))
    assert "XINSLM_NATIVE=require, but" in lost.stderr and "cannot be loaded" in lost.stderr
    auto = run(asks, XINSLM_NATIVE="auto", XINSLM_NATIVE_LIBRARY=str(junk))
    assert auto.stdout.startswith("None ") and "cannot be loaded" in auto.stdout


def test_a_quantized_folder_runs_without_the_library(tmp_path: Path) -> None:
    save_quantized(tmp_path, "tied")
    code = (
        "from pathlib import Path\nfrom xinslm.inference.config import GenerateConfig\n"
        "from xinslm.inference.generate import run\n"
        f"print(run(GenerateConfig(model=Path({str(tmp_path / 'q')!r}), prompt='The',"
        " max_new_tokens=5, temperature=0)).new_tokens)"
    )
    assert run(code, XINSLM_NATIVE="off").stdout == "5\n"


def test_a_library_that_is_lost_is_told(tmp_path: Path) -> None:
    save_quantized(tmp_path, "tied")
    junk = tmp_path / "junk.so"
    junk.write_bytes(b"no library")
    code = (
        "from xinslm.cli.main import main\n"
        f"main(['generate', {str(tmp_path / 'q')!r}, '--prompt', 'The', '--max-new-tokens', '3'])\n"
        f"main(['chat', {str(tmp_path / 'q')!r}])"
    )
    said = run(code, XINSLM_NATIVE="auto", XINSLM_NATIVE_LIBRARY=str(junk))
    everything = said.stdout + said.stderr
    assert everything.count("PyTorch runs the model") == 2 and "cannot be loaded" in everything
    asked = run(code, XINSLM_NATIVE="off")
    assert "PyTorch runs the model" not in asked.stdout + asked.stderr


def test_running_a_model_imports_no_pytorch(tmp_path: Path) -> None:
    if library() is None:
        pytest.skip(f"the native library is not there: {reason()}")
    save_quantized(tmp_path, "tied")
    from xinslm.export.config import GgufConfig
    from xinslm.export.gguf import run as export_gguf

    export_gguf(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    for name in ("q", "full", "m.gguf"):
        code = (
            "import sys\nfrom xinslm.cli.main import main\n"
            f"assert not main(['generate', {str(tmp_path / name)!r}, '--chat', '--prompt', 'The',"
            " '--max-new-tokens', '5'])\n"
            "heavy = {'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules)\n"
            "print(sorted(heavy), file=sys.stderr)"
        )
        done = run(code)
        assert done.returncode == 0 and done.stderr.endswith("[]\n"), done.stderr
