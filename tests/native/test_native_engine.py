"""The native engine against transformers, the PyTorch engine with int8 activations, and itself with
other chunks, threads and neighbours.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from small_models import FAMILIES, save_quantized, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.inference.config import EngineConfig
from xinslm.inference.engine import Engine
from xinslm.inference.load import load_engine
from xinslm.inference.native_engine import NativeEngine, build, frequencies
from xinslm.inference.raw_weights import open_raw
from xinslm.inference.speculative import Speculative
from xinslm.inference.torch_engine import TorchEngine
from xinslm.model.config import ModelConfig
from xinslm.model.files import save_model
from xinslm.model.transformer import rotary_frequencies
from xinslm.native.model import NativeContext
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "plain": {},
    "llama3 rotation": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "window": {"sliding_window": 9},
    "untied": {"tie_word_embeddings": False},
    "heads of 20": {"head_dim": 20},
    "one key head": {"num_key_value_heads": 1, "head_dim": 48},
    "heads of 80": {"head_dim": 80},
    "three key heads of 96": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 96,
    },
    "heads of 128": {"head_dim": 128},
    **FAMILIES,
    "odd sizes": {"vocab_size": 333, "intermediate_size": 81, "hidden_size": 72},
}
IDS = np.random.default_rng(0).integers(0, 320, 100).tolist()


def away(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest relative distance over the rows."""
    norms = np.linalg.norm(wanted, axis=-1)
    return float((np.linalg.norm(got - wanted, axis=-1) / norms).max())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str, dtype: str) -> None:
    model = save_random_model(tmp_path, **SHAPES[kind])
    if dtype != "float32":
        save_model(model.to(getattr(torch, dtype)), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0].numpy()
    engine = NativeEngine.load(tmp_path, threads=2)
    engine.start(IDS[:1])
    got = engine.verify(IDS[1:])
    assert away(got, wanted[1:, :320]) < 2e-3  # keys and values are float16


def test_frequencies_are_those_of_the_transformer() -> None:
    for changes in ({}, {"rope_scaling": LLAMA3_ROPE}):
        config = ModelConfig(320, 64, 96, 2, 4, 2, 32, 128, **changes)
        wanted = rotary_frequencies(config).numpy()
        assert np.abs(frequencies(config) / wanted - 1).max() < 3e-7


@pytest.mark.parametrize("kind", ["tied", "untied", "8-bit", "odd width"])
def test_logits_of_codes_equal_the_pytorch_engines_with_int8_activations(
    tmp_path: Path, kind: str
) -> None:
    save_quantized(tmp_path, kind)
    twin = TorchEngine.load(tmp_path / "q", "cpu", "float32", activations="int8")
    engine = NativeEngine.load(tmp_path / "q", threads=2)
    wanted = np.stack([twin.start(IDS[: i + 1]) for i in range(12)])
    got = np.stack([engine.start(IDS[: i + 1]) for i in range(12)])
    # a float16 key may round an input the other way: a code of 127 more or less
    assert away(got, wanted) < 0.03
    floating = TorchEngine.load(tmp_path / "q", "cpu", "float32")
    exact = np.stack([floating.start(IDS[: i + 1]) for i in range(12)])
    assert away(got, exact) < 1.5 * away(wanted, exact) + 1e-3


@pytest.mark.parametrize("kind", ["tied", "untied", "8-bit"])
def test_a_gguf_file_gives_the_logits_of_its_folder(tmp_path: Path, kind: str) -> None:
    save_quantized(tmp_path, kind)
    export_gguf(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    folder, file = NativeEngine.load(tmp_path / "q"), NativeEngine.load(tmp_path / "m.gguf")
    assert folder.start(IDS[:1]) == pytest.approx(file.start(IDS[:1]), abs=1e-3)
    # the heads' numbers stand in another order, which float sums feel
    assert away(folder.verify(IDS[1:30]), file.verify(IDS[1:30])) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_families_run_from_folder_and_gguf_file(tmp_path: Path, family: str) -> None:
    model = save_random_model(tmp_path / "full", **FAMILIES[family])
    quantize(QuantizeConfig(tmp_path / "full", tmp_path / "q", method="rtn"))
    export_gguf(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    export_gguf(GgufConfig(tmp_path / "full", tmp_path / "f.gguf", outtype="f32"))
    with torch.no_grad():
        wanted = model.logits(model.hidden(torch.tensor([IDS])))[0].numpy()
    whole_file = NativeEngine.load(tmp_path / "f.gguf")
    whole_file.start(IDS[:1])
    assert away(whole_file.verify(IDS[1:]), wanted[1:]) < 2e-3
    rows = []
    for name in ("q", "m.gguf"):
        engine = NativeEngine.load(tmp_path / name)
        engine.start(IDS[:1])
        rows.append(engine.verify(IDS[1:40]))
    assert away(rows[0], rows[1]) < 0.05
    twin = TorchEngine.load(tmp_path / "q", "cpu", "float32", activations="int8")
    assert away(rows[0][-1:], twin.start(IDS[:40])[None]) < 0.1


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    save_quantized(folder, "tied")
    return folder / "q"


def context_of(folder: Path, threads: int = 1, **options: object) -> NativeContext:
    raw = open_raw(folder)
    assert raw is not None
    return NativeContext(build(raw), threads, **options)


def whole(context: NativeContext, ids: list[int]) -> np.ndarray:
    sequence = context.add()
    logits = context.extend(ids, [sequence] * len(ids), range(len(ids)))
    context.remove(sequence)
    return logits


@pytest.mark.parametrize("int8_cache", [False, True])
def test_bits_do_not_depend_on_threads_or_chunks(quantized: Path, int8_cache: bool) -> None:
    wanted = whole(context_of(quantized, 1, int8_cache=int8_cache), IDS)
    rng = np.random.default_rng(1)
    for threads in (1, 2, 3, 5):
        context = context_of(quantized, threads, int8_cache=int8_cache)
        assert np.array_equal(whole(context, IDS), wanted)
        for most in (1, 7, 16):
            sequence, rows, at = context.add(), [], 0
            while at < len(IDS):
                part = IDS[at : at + int(rng.integers(1, most + 1))]
                rows.append(context.extend(part, [sequence] * len(part), range(len(part))))
                at += len(part)
            assert np.array_equal(np.concatenate(rows), wanted), (threads, most)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_texts_have_the_same_bits_in_spans_and_together(tmp_path: Path, threads: int) -> None:
    save_random_model(tmp_path, max_position_embeddings=2048, num_hidden_layers=1)
    ids = np.random.default_rng(2).integers(0, 320, 1300).tolist()
    wanted = whole(context_of(tmp_path, 1), ids)
    context = context_of(tmp_path, threads)
    sequence = context.add()
    context.extend(ids[:1200], [sequence] * 1200, [])
    rows = [context.extend([token], [sequence], [0])[0] for token in ids[1200:1210]]
    rows += list(context.extend(ids[1210:], [sequence] * 90, range(90)))
    assert np.array_equal(np.array(rows), wanted[1200:])


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_window_equals_dense_attention_after_any_chunks_and_rewinds(
    tmp_path: Path, window: int
) -> None:
    model = save_random_model(tmp_path, sliding_window=window, max_position_embeddings=1024)
    ids = np.random.default_rng(3).integers(0, 320, 700).tolist()
    with torch.no_grad():
        wanted = model.logits(model.hidden(torch.tensor([ids])))[0].numpy()
    engine, rng = NativeEngine.load(tmp_path, threads=2), np.random.default_rng(4)
    engine.start(ids[:1])
    page = engine.context.cache_bytes()  # 64 tokens; the text takes eleven
    while engine.position < len(ids):
        at = engine.position
        rows = engine.verify(ids[at : at + int(rng.integers(1, 60))])
        assert away(rows, wanted[at : engine.position]) < 5e-3
        # the window, where it begins within a page, and a page for tokens that are taken back
        assert engine.context.cache_bytes() <= (window // 64 + 3) * page
        if rng.random() < 0.3:
            engine.rewind(int(rng.integers(max(1, engine.position - 150), engine.position)))
    # before a chunk is computed, there is room for it, too
    assert engine.context.cache_bytes(allocated=True) <= (window // 64 + 8) * page


def test_sequences_do_not_feel_each_other(quantized: Path) -> None:
    context, rng = context_of(quantized, 2), np.random.default_rng(5)
    texts = [rng.integers(0, 320, length).tolist() for length in (90, 40, 70)]
    wanted = [whole(context, text) for text in texts]
    numbers, done, rows = [context.add() for _ in texts], [0, 0, 0], [[], [], []]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        tokens, owners = [], []
        for i in rng.permutation(3):
            part = texts[i][done[i] : done[i] + int(rng.integers(0, 4))]
            tokens, owners = tokens + part, owners + [i] * len(part)
            done[i] += len(part)
        if tokens:
            logits = context.extend(tokens, [numbers[i] for i in owners], range(len(tokens)))
            for row, i in zip(logits, owners, strict=True):
                rows[i].append(row)
    for i in range(3):
        assert np.array_equal(np.array(rows[i]), wanted[i])


def test_a_branch_shares_its_beginning_and_changes_nothing_of_its_parent(quantized: Path) -> None:
    context = context_of(quantized, 2)
    parent = context.add()
    context.extend(IDS[:80], [parent] * 80, [])
    before = context.cache_bytes()
    child = context.add(parent, 70)
    assert context.cache_bytes() == before and context.length(child) == 70
    other = [5, 6, 7, 8]
    got = context.extend(other, [child] * 4, range(4))
    assert np.array_equal(got, whole(context, IDS[:70] + other)[70:])
    rest = context.extend(IDS[80:], [parent] * 20, range(20))
    assert np.array_equal(rest, whole(context, IDS)[80:])
    context.remove(parent)
    context.remove(child)
    assert context.cache_bytes() == 0


def test_an_int8_cache_takes_half_the_memory_and_changes_little(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    half, codes = (context_of(tmp_path, int8_cache=int8) for int8 in (False, True))
    wanted, got = whole(half, IDS), whole(codes, IDS)
    assert 0 < away(got, wanted) < 0.05
    for context in (half, codes):
        context.extend(IDS, [context.add()] * len(IDS), [])
    assert codes.cache_bytes() < 0.57 * half.cache_bytes()


def test_errors_change_nothing(quantized: Path) -> None:
    context = context_of(quantized, 2, max_tokens=64)
    sequence = context.add()
    first = context.extend(IDS[:30], [sequence] * 30, [29])
    for ids, owners, text in (
        ([1, 320], [sequence] * 2, "token 320 is not in the vocabulary"),
        ([1, -1], [sequence] * 2, "token -1"),
        ([1], [7], "no sequence 7"),
        (IDS[:40], [sequence] * 40, "the cache holds 64 tokens"),
        (IDS + IDS, [sequence] * 200, "the context holds 128 tokens"),
    ):
        with pytest.raises(XinslmError, match=text):
            context.extend(ids, owners, [])
        assert context.length(sequence) == 30
    context.rewind(sequence, 29)
    assert np.array_equal(context.extend(IDS[29:30], [sequence], [0]), first)


def test_a_failed_call_takes_its_tokens_back_also_of_a_sequence_that_the_window_emptied(
    tmp_path: Path,
) -> None:
    save_random_model(tmp_path, sliding_window=5, max_position_embeddings=1024)
    context = context_of(tmp_path, 2, max_tokens=512)
    first, second, third = (context.add() for _ in range(3))
    context.extend(IDS * 2, [first] * 200, [])
    # `first` comes twice, and grows by more than the window before the cache is full
    owners = [first] * 150 + [second] + [first] * 150 + [third] * 700
    with pytest.raises(XinslmError, match="the cache holds 512 tokens"):
        context.extend((IDS * 11)[: len(owners)], owners, [])
    assert [context.length(sequence) for sequence in (first, second, third)] == [0, 0, 0]
    wanted = whole(context_of(tmp_path, 1), IDS)
    assert np.array_equal(context.extend(IDS, [third] * 100, range(100)), wanted)


def test_nan_in_a_key_stays_visible_in_both_caches(tmp_path: Path) -> None:
    model = save_random_model(tmp_path)
    with torch.no_grad():
        next(model.parameters())[7] = float("nan")
    save_model(model, tmp_path)
    for int8 in (False, True):
        logits = whole(context_of(tmp_path, int8_cache=int8), [5, 7, 9])
        assert np.isnan(logits[1:]).all(), int8


@pytest.mark.parametrize("window", [None, 5])
def test_nan_in_a_token_does_not_reach_the_tokens_before_it(
    tmp_path: Path, window: int | None
) -> None:
    model = save_random_model(tmp_path, sliding_window=window)
    ids = [token for token in IDS if token != 7]
    with torch.no_grad():
        next(model.parameters())[7] = float("nan")
    save_model(model, tmp_path)
    for int8 in (False, True):
        context = context_of(tmp_path, 2, int8_cache=int8)
        wanted = whole(context, ids)  # column 7 is NaN: the head is the embedding
        for at in (1, 18, 63, 64, 66):
            logits = whole(context, [*ids[:at], 7, *ids[at:]])
            assert np.array_equal(logits[:at], wanted[:at], equal_nan=True), (int8, at)
            assert np.isnan(logits[at : at + (window or 99)]).all(), (int8, at)


def test_an_interrupted_call_leaves_an_engine_that_goes_on(quantized: Path, monkeypatch) -> None:
    """Python raises KeyboardInterrupt when a call of the library has returned."""
    engine, fresh = NativeEngine.load(quantized), NativeEngine.load(quantized)

    def interrupt(name: str, call: Callable[[], object]) -> None:
        own = getattr(engine.context, name)

        def once(*arguments: object) -> object:
            monkeypatch.undo()
            own(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(engine.context, name, once)
        with pytest.raises(KeyboardInterrupt):
            call()

    engine.start(IDS[:20])
    interrupt("extend", lambda: engine.step(IDS[20]))
    assert engine.position == 20
    assert np.array_equal(engine.step(IDS[20]), fresh.start(IDS[:21]))
    interrupt("rewind", lambda: engine.rewind(10))
    assert np.array_equal(engine.start(IDS[:40]), fresh.start(IDS[:40]))


def test_engine_counts_reuses_and_refuses_as_the_pytorch_engine_does(quantized: Path) -> None:
    engine = NativeEngine.load(quantized, context_length=40, threads=1)
    first = engine.start(IDS[:30])
    assert (engine.position, engine.reused) == (30, 0)
    assert np.array_equal(engine.start(IDS[:30]), first) and engine.reused == 29
    engine.start([*IDS[:12], 3, 4])
    assert (engine.position, engine.reused) == (14, 12)
    with pytest.raises(UsageError, match="the text has 41 tokens"):
        engine.start(IDS[:41])
    with pytest.raises(ValueError, match="at least one token"):
        engine.start([])
    engine.start(IDS[:40])
    with pytest.raises(UsageError, match="41 tokens"):
        engine.step(1)
    engine.reset()
    assert engine.position == 0
    with pytest.raises(UsageError, match="--max-seq-length 129"):
        NativeEngine.load(quantized, context_length=129)


def test_which_engine_auto_takes(quantized: Path, tmp_path: Path, monkeypatch) -> None:
    save_random_model(tmp_path / "full")
    kinds = {"native": Speculative, "pytorch": TorchEngine}

    def loaded(model: Path, **options: object) -> Engine:
        return load_engine(EngineConfig(model=model, **options))

    assert isinstance(loaded(quantized, device="cpu"), kinds["native"])
    assert isinstance(loaded(quantized, activations="float"), kinds["pytorch"])
    assert isinstance(loaded(quantized, dtype="float32"), kinds["pytorch"])
    assert isinstance(loaded(quantized, engine="pytorch"), kinds["pytorch"])
    assert isinstance(loaded(tmp_path / "full", activations="float"), kinds["native"])
    with pytest.raises(UsageError, match="--engine native: it rounds the inputs"):
        loaded(quantized, engine="native", activations="float")
    with pytest.raises(UsageError, match="--kv-cache int8 needs the native engine"):
        loaded(quantized, engine="pytorch", kv_cache="int8")
    monkeypatch.setenv("XINSLM_NATIVE", "off")
    assert isinstance(loaded(quantized), kinds["pytorch"])
    with pytest.raises(UsageError, match="--engine native: XINSLM_NATIVE=off"):
        loaded(quantized, engine="native")


def test_a_missing_or_misshapen_weight_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    raw = open_raw(tmp_path)
    assert raw is not None
    less = dataclasses.replace(raw, names=[n for n in raw.names if "layers.1.mlp.up" not in n])
    with pytest.raises(XinslmError, match="a matrix of layer 1 is missing"):
        build(less)
    swapped = {"model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.down_proj.weight"}
    wrong = dataclasses.replace(raw, read=lambda name: raw.read(swapped.get(name, name)))
    with pytest.raises(XinslmError, match="up_proj is 64 x 96, but must be 96 x 64"):
        build(wrong)
