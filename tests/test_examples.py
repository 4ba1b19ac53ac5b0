"""The examples run, and do what they say."""

import importlib.util
import re
from pathlib import Path

import gguf
import pytest

from xinslm.demo.stories import stories

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"fused_loss", "read_cache", "pipeline"}


def test_fused_loss_trains_the_student():
    losses = load("fused_loss").main(steps=30)
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    text = folder / "book.txt"
    text.write_text("\n".join(stories(120_000, seed=3)))
    load("pipeline").main(str(text), str(folder / "out"), steps=4)
    return folder / "out"


def test_pipeline_ends_in_a_gguf_file_of_the_student(made):
    tensors = gguf.GGUFReader(made / "student.gguf").tensors
    embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    assert embedding.shape.tolist() == [64, 512]


def test_read_cache_prints_a_distribution_at_each_position(made, capsys):
    load("read_cache").main(str(made / "cache"), str(made / "data"), count=5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line in lines:
        shares = [float(share) for share in re.findall(r"['t\"] (\d\.\d\d)(?=, |$)", line)]
        assert len(shares) == 5 and sum(shares) == pytest.approx(1, abs=0.03)
