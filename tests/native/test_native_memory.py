"""Weights that the engine packs are in memory once: the map of their file is given back.

llama.cpp keeps both if it maps a file, which doubles the memory (ggml-org/llama.cpp#16761).
"""

import sys
from pathlib import Path

import pytest

from small_models import save_random_model
from xinslm.commands import run
from xinslm.export.config import GgufConfig
from xinslm.inference.native_engine import build
from xinslm.inference.raw_weights import open_raw
from xinslm.quantize.config import QuantizeConfig

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A model of 15 million weights: plain, in 8 bits, and both as GGUF."""
    root = tmp_path_factory.mktemp("memory")
    save_random_model(root / "full", **SHAPE)
    run(QuantizeConfig(root / "full", root / "q8", bits=8))
    run(GgufConfig(root / "full", root / "full.gguf"))
    run(GgufConfig(root / "q8", root / "q8.gguf"))
    return root


def resident_bytes() -> dict[str, int]:
    """Memory of this process: its own, and pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = [line.split() for line in lines if line.startswith(("RssAnon:", "RssFile:"))]
    return {kind: 1024 * int(count) for kind, count, _ in words}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("name", ["full", "q8", "full.gguf", "q8.gguf"])
def test_weights_are_in_memory_once(models: Path, name: str) -> None:
    build(open_raw(models / name))  # loads what is loaded once
    before = resident_bytes()
    raw = open_raw(models / name)
    model = build(raw)
    grown = {kind: count - before[kind] for kind, count in resident_bytes().items()}
    assert model.num_bytes > 12e6
    assert grown["RssFile:"] < 0.2 * model.num_bytes and grown["RssAnon:"] < 1.2 * model.num_bytes
