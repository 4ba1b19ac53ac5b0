"""What a command imports: modules that take long and that it does not need stay out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from small_models import save_quantized, save_random_model
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.native import library

NOT_TO_PARSE = {"argparse", "tyro", "typeguard", "yaml", "rich"}
NOT_TO_RUN = {
    *("torch", "transformers", "tokenizers", "datasets", "gguf", "jinja2", "regex"),
    *("asyncio", "concurrent.futures", "logging", "subprocess", "unittest", "numpy.random"),
    *("xinslm.tokenizer.chat", "xinslm.tokenizer.learn", "xinslm.folders"),
}


def modules_after(code: str, *words: str) -> set[str]:
    """Names of the modules that a process has when `code` is done."""
    code = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code, *words]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(json.loads(out.splitlines()[-1]))


@pytest.mark.skipif(library() is None, reason="needs the native library")
def test_running_a_gguf_file_imports_little(tmp_path: Path) -> None:
    save_quantized(tmp_path, "tied")
    export_gguf(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    code = "from xinslm.cli.main import main\nassert main(sys.argv[1:]) == 0"
    words = ["generate", str(tmp_path / "m.gguf"), "--prompt", "The", "--max-new-tokens", "4"]
    found = modules_after(code, *words, "--temperature", "0")
    assert "xinslm.inference.native_engine" in found
    assert sorted(found & (NOT_TO_PARSE | NOT_TO_RUN)) == []


def test_a_model_of_the_harness_is_loaded_without_transformers_and_datasets(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    save_random_model(tmp_path)
    code = "from xinslm.evaluate.harness.model import XinslmLM\nXinslmLM(sys.argv[1], 'cpu')"
    found = modules_after(code, str(tmp_path))
    assert "tokenizers" in found
    others = {"transformers", "pyarrow", "pandas", "tyro", "evaluate", "sklearn", "peft"}
    assert sorted(found & others) == []
