"""The PyTorch engine: cached steps equal whole passes, prefixes are reused, padding is never
sampled.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from small_models import make_config, save_random_model, save_tokenizer
from xinslm.errors import UsageError, XinslmError
from xinslm.inference.config import GenerateConfig
from xinslm.inference.engine import common_prefix
from xinslm.inference.generate import run
from xinslm.inference.torch_engine import TorchEngine
from xinslm.model.files import load_model, save_model
from xinslm.model.transformer import Transformer
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is longer than the engine's first cache."""
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, max_position_embeddings=600)
    return folder


def whole(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits after `ids` from one pass without a cache."""
    model = load_model(folder)
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([ids]))[0, -1]).numpy()


def test_stories260k_writes_what_llama2_c_expects(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    expected = json.loads((folder / "expected_greedy.json").read_text())
    result = run(
        GenerateConfig(model=folder, prompt="", temperature=0, max_new_tokens=200, device="cpu")
    )
    assert result.text == expected["expected"]
    assert result.new_tokens == 200 and result.stop == "length"


def test_steps_equal_whole_passes_also_when_the_cache_grows(folder: Path) -> None:
    engine = TorchEngine.load(folder, "cpu")
    ids = [i * 7 % 320 for i in range(250)]
    logits = engine.start(ids)
    for token in range(20):  # across 256 tokens, where the first cache ends
        np.testing.assert_allclose(logits, whole(folder, ids), atol=2e-4)
        ids.append(token)
        logits = engine.step(token)
    assert engine.position == 270


def test_start_computes_only_what_is_new(folder: Path) -> None:
    engine = TorchEngine.load(folder, "cpu")
    first = [5, 6, 7, 8, 9, 10]
    engine.start(first)
    engine.step(11)
    for ids, reused in (
        ([5, 6, 7, 8, 40, 41], 4),
        ([5, 6, 7, 8, 40, 41], 5),
        ([5, 6], 1),
        ([9], 0),
    ):
        logits = engine.start(ids)
        assert engine.reused == reused
        np.testing.assert_allclose(logits, whole(folder, ids), atol=2e-4)
    engine.reset()
    engine.start([9])
    assert engine.reused == 0


def test_rows_that_pad_the_vocabulary_are_cut_off(tmp_path: Path) -> None:
    model = Transformer(make_config(vocab_size=384))
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():  # the padding would win every time
        model.model.embed_tokens.weight[320:] *= 1000
    save_model(model, tmp_path)
    save_tokenizer(tmp_path, 320)
    engine = TorchEngine.load(tmp_path, "cpu")
    assert engine.start([3, 4]).shape == (engine.tokenizer.vocab_size,) == (320,)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, vocabulary=300, vocab_size=290)
    with pytest.raises(XinslmError, match="has 300 ids, but the model's embedding only 290 rows"):
        TorchEngine.load(tmp_path, "cpu")


def test_the_context_is_a_limit_with_both_numbers(folder: Path) -> None:
    engine = TorchEngine.load(folder, "cpu", context_length=8)
    with pytest.raises(UsageError, match=r"has 9 tokens, the context of .* holds 8"):
        engine.start(range(9))
    engine.start(range(8))
    with pytest.raises(UsageError, match="has 9 tokens"):
        engine.step(1)
    with pytest.raises(UsageError, match=r"--max-seq-length 601: .* holds 1 to 600"):
        TorchEngine.load(folder, "cpu", context_length=601)
    with pytest.raises(ValueError, match="at least one token"):
        engine.start([])


def test_a_quantized_folder_runs_with_its_own_weights(tmp_path: Path) -> None:
    from xinslm.model.files import read_tensors
    from xinslm.quantize.config import QuantizeConfig
    from xinslm.quantize.run import run as quantize

    save_random_model(tmp_path / "model")
    quantize(QuantizeConfig(model=tmp_path / "model", output_dir=tmp_path / "q", method="rtn"))
    model = load_model(tmp_path / "model")
    model.load_state_dict(dict(read_tensors(tmp_path / "q")))
    save_model(model, tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")
    four_bit, plain = (TorchEngine.load(tmp_path / name, "cpu") for name in ("q", "plain"))
    assert np.array_equal(four_bit.start([3, 50, 60]), plain.start([3, 50, 60]))
    assert not np.allclose(
        four_bit.start([3, 50]), TorchEngine.load(tmp_path / "model", "cpu").start([3, 50])
    )


def test_half_precision_and_windows_run(tmp_path: Path) -> None:
    save_random_model(tmp_path, sliding_window=5)
    engine = TorchEngine.load(tmp_path, "cpu", dtype="bfloat16")
    logits = engine.start([9, 8, 7, 6, 5, 4, 3, 9])
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    exact = whole(tmp_path, [9, 8, 7, 6, 5, 4, 3, 9])
    assert np.corrcoef(logits, exact)[0, 1] > 0.99


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0


def test_generation_with_int8_activations(folder: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(folder, tmp_path / "q4", method="rtn"))
    settings = {"temperature": 0.0, "max_new_tokens": 12, "device": "cpu", "prompt": "The quick"}
    result = run(GenerateConfig(model=tmp_path / "q4", activations="int8", **settings))
    model = load_model(tmp_path / "q4", activations="int8")
    engine = TorchEngine(model, load_tokenizer(folder))
    ids = list(engine.tokenizer.encode("The quick"))
    start = len(ids)
    for _ in range(result.new_tokens):
        with torch.no_grad():
            ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[0, -1]).argmax()))
    assert result.text == engine.tokenizer.decode(ids)[len(engine.tokenizer.decode(ids[:start])) :]
    with pytest.raises(UsageError, match="xinslm quantize"):
        run(GenerateConfig(model=folder, activations="int8", **settings))
