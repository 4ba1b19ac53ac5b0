"""A quantized model is not evaluated on the text that calibrated it, in whatever file it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from xinslm.commands import run
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.errors import UsageError
from xinslm.evaluate.benchmark.overlap import training_folders
from xinslm.evaluate.config import EvaluateConfig
from xinslm.export.config import GgufConfig, HfConfig, ImportConfig, MlxConfig
from xinslm.model.files import open_model
from xinslm.quantize.config import QuantizeConfig

ROWS, LENGTH, SEED = 3, 64, 5


def quantize(world, out, data=None, **changes):
    settings = {"num_calibration_samples": ROWS, "max_seq_length": LENGTH, "seed": SEED, **changes}
    run(QuantizeConfig(world.teacher, out, data_path=data or world.data, **settings))
    return out


def evaluate(model, data, **changes):
    settings = {"device": "cpu", "max_seq_length": 64, **changes}
    return run(EvaluateConfig(model, (str(data),), **settings))


@pytest.fixture(scope="module")
def quantized(world, tmp_path_factory):
    return quantize(world, tmp_path_factory.mktemp("calibrated") / "q")


def drawn_documents(data):
    """Number of texts of the train split that lie in the rows that were drawn, by tokens alone."""
    split = open_dataset(data).split("train")
    rows = PackedDataset(split, LENGTH)
    chosen = np.sort(np.random.default_rng(SEED).choice(len(rows), ROWS, replace=False))
    batch = rows.batch(chosen)
    pieces = []
    for row, segments in zip(batch.input_ids, batch.segments, strict=True):
        pieces += [row[segments == number].tolist() for number in range(segments.max() + 1)]
    documents = [
        split.tokens[a:b].tolist()
        for a, b in zip(split.documents, split.documents[1:], strict=False)
    ]
    return sum(any(is_within(piece, document) for piece in pieces) for document in documents)


def is_within(piece, document):
    return any(document[i : i + len(piece)] == piece for i in range(len(document) - len(piece) + 1))


def test_the_train_split_is_refused_and_the_validation_split_is_not(world, quantized):
    count = drawn_documents(world.data)
    assert 0 < count == len(open_model(quantized).calibration)
    with pytest.raises(UsageError, match=rf"{count} of [\d,]+ documents calibrated .*train docum"):
        evaluate(quantized, world.data, split="train")
    assert evaluate(quantized, world.data).documents > 0
    assert evaluate(world.teacher, world.data, split="train").documents > 0


def test_raw_files_with_the_same_text_are_refused(world, quantized, tmp_path):
    count = drawn_documents(world.data)
    with pytest.raises(UsageError, match=rf"{count} of [\d,]+ documents calibrated .*text.jsonl"):
        evaluate(quantized, world.text)
    again = tmp_path / "again"
    run(PrepareConfig((str(world.text),), world.tokenizer, again, seed=8))
    with pytest.raises(UsageError, match="documents calibrated"):
        evaluate(quantized, again, split="train")


@pytest.mark.parametrize("kind", ["gguf", "hf", "mlx", "import", "keep"])
def test_exports_pass_it_on(world, quantized, tmp_path, kind):
    out = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    make = {"gguf": GgufConfig, "hf": HfConfig, "mlx": MlxConfig, "import": ImportConfig}
    if kind == "keep":
        run(GgufConfig(quantized, tmp_path / "other.gguf"))
        run(QuantizeConfig(tmp_path / "other.gguf", out, method="keep"))
    else:
        run(make[kind](quantized, out))
    assert open_model(out).calibration == open_model(quantized).calibration
    with pytest.raises(UsageError, match="documents calibrated"):
        evaluate(out, world.data, split="train")


def test_llama_cpp_reads_a_file_with_the_ids(quantized, tmp_path):
    from llama_cpp import LlamaCpp

    run(GgufConfig(quantized, tmp_path / "m.gguf"))
    with LlamaCpp(tmp_path / "m.gguf", context=64) as llama:
        assert llama.tokenize("One morning")


def test_rounding_alone_uses_no_text(world, tmp_path):
    quantize(world, tmp_path / "q", method="rtn")
    assert open_model(tmp_path / "q").calibration == []
    assert evaluate(tmp_path / "q", world.data, split="train").documents > 0
    assert world.data in training_folders(tmp_path / "q"), "the run that was quantized"


def test_a_long_text_is_known_though_its_end_is_held_out(world, tmp_path):
    lines = [json.loads(line)["text"] for line in world.text.read_text().splitlines()]
    book = tmp_path / "book.txt"
    book.write_text("\n".join(lines))
    run(PrepareConfig((str(book),), world.tokenizer, tmp_path / "data"))
    quantize(world, tmp_path / "q", tmp_path / "data")
    with pytest.raises(UsageError, match=r"1 of 1 documents calibrated .*book.txt"):
        evaluate(tmp_path / "q", book)
    assert evaluate(tmp_path / "q", tmp_path / "data").documents > 0


def test_chats_are_recognized(world, tmp_path):
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Tell me of number {i}."},
                {"role": "assistant", "content": f"It is {i * i} squared, and so on. " * 3},
            ]
        }
        for i in range(60)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run(PrepareConfig((str(file),), world.tokenizer, tmp_path / "data"))
    quantize(world, tmp_path / "q", tmp_path / "data")
    with pytest.raises(UsageError, match=r"documents calibrated"):
        evaluate(tmp_path / "q", file)
    assert evaluate(tmp_path / "q", tmp_path / "data").documents > 0


def test_benchmarks_look_for_items_in_calibration_text(world, quantized, tmp_path):
    run(HfConfig(quantized, tmp_path / "hf"))
    for model in (quantized, tmp_path / "hf"):
        assert training_folders(model) == [world.data]
    run(PrepareConfig((str(world.text),), world.tokenizer, tmp_path / "other", seed=3))
    quantize(world, tmp_path / "q", tmp_path / "other")
    assert training_folders(tmp_path / "q") == [tmp_path / "other", world.data]
    assert training_folders(Path("absent")) == []
