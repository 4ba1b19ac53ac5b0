"""Whole measurements in processes of their own, watched from outside with psutil."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from small_models import save_random_model
from xinslm.evaluate.speed.config import SpeedConfig
from xinslm.evaluate.speed.run import measure
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.files import write_json

psutil = pytest.importorskip("psutil", reason="psutil is not installed")
MEGABYTE = 1 << 20
SHORT = {"prompt_tokens": 16, "decode_tokens": 8, "threads": 1, "dtype": "float32"}


class Watch:
    """Looks at the workers of this process: their largest resident memory, in order of start."""

    def __init__(self, kill: str | None = None) -> None:
        self.peaks: dict[tuple[int, str], int] = {}
        self.kill, self.stop = kill, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def _look(self) -> None:
        known: dict[int, tuple[psutil.Process, str]] = {}
        while not self.stop.wait(0.02):
            for child in psutil.Process().children():
                try:
                    if child.pid not in known:
                        line = " ".join(child.cmdline())
                        if "xinslm.evaluate.speed.worker" not in line:
                            continue
                        known[child.pid] = child, line
                    line = known[child.pid][1]
                    rss = child.memory_info().rss
                    if self.kill and self.kill in line:
                        child.kill()
                except psutil.Error:  # it ended just now
                    continue
                key = child.pid, line
                self.peaks[key] = max(self.peaks.get(key, 0), rss)

    def peak(self, text: str) -> int:
        return max(peak for (_, line), peak in self.peaks.items() if text in line)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and one with 80 MB more of weights, as folders and GGUF files of float32."""
    root = tmp_path_factory.mktemp("speed")
    save_random_model(root / "small", max_position_embeddings=160)
    save_random_model(root / "large", hidden_size=512, intermediate_size=4096, num_hidden_layers=3)
    for name in ("small", "large"):
        export_gguf(GgufConfig(root / name, root / f"{name}.gguf", outtype="f32"))
    return root


def added_bytes(models: Path) -> int:
    sizes = [(models / name / "model.safetensors").stat().st_size for name in ("large", "small")]
    return sizes[0] - sizes[1]


def test_xinslm_reports_the_memory_that_is_seen_from_outside(models: Path) -> None:
    config = SpeedConfig(
        models=(models / "small", models / "large"), depths=(0, 100, 512), repetitions=1, **SHORT
    )
    started = time.time()
    with Watch() as watch:
        small, large = measure(config)
    elapsed = time.time() - started
    for name, result in (("small", small), ("large", large)):
        assert result.error is None
        seen = watch.peak(f'{models}/{name}"')
        assert 0.9 * seen <= result.peak_memory_bytes.median <= 1.1 * seen
        assert result.base_memory_bytes.median < result.peak_memory_bytes.median
        assert result.file_bytes == (models / name / "model.safetensors").stat().st_size
        assert 0.1 < result.load_seconds.median < elapsed
    growth = large.peak_memory_bytes.median - small.peak_memory_bytes.median
    # the weights once, and once more while they are packed for the processor
    assert 0.9 * added_bytes(models) < growth < 2.5 * added_bytes(models)
    assert [speed.depth for speed in small.speeds] == [0, 100]
    assert small.notes[0] == (
        "depth 512 is left out: it takes a context of 529 tokens, the model has 160"
    )
    assert all(s.prefill.median > s.decode.median > 0 for s in large.speeds)
    assert small.threads == 1 and small.dtype == "float32" and small.device == "cpu"


def test_llama_cpp_takes_turns_in_both_orders(models: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    files = (models / "small.gguf", models / "large.gguf")
    config = SpeedConfig(
        models=files, engines=("llama.cpp",), depths=(0, 100, 512), repetitions=2, **SHORT
    )
    events: list = []
    with Watch() as watch:
        small, large = measure(config, events.append)
    order = ["small" if "small.gguf" in line else "large" for _, line in watch.peaks]
    assert order == ["small", "large", "large", "small"]
    assert (events[0].done, events[-1].done, events[-1].total) == (0, 4, 4)
    for name, result in (("small", small), ("large", large)):
        assert result.error is None and result.repetitions == 2
        seen = watch.peak(f"{name}.gguf")
        assert 0.85 * seen <= result.peak_memory_bytes.high <= 1.15 * seen
        assert result.file_bytes == (models / f"{name}.gguf").stat().st_size
        assert result.version.startswith("xllamacpp ")
    growth = large.peak_memory_bytes.median - small.peak_memory_bytes.median
    assert 0.9 * added_bytes(models) < growth < 1.5 * added_bytes(models)
    assert [speed.depth for speed in small.speeds] == [0, 100]
    assert all(s.prefill is not None for s in (*small.speeds, *large.speeds))
    assert small.notes and "depth 512 is left out" in small.notes[0]


def test_llama_cpp_is_asked_for_exactly_the_depth(models: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    from xinslm.evaluate.speed.llama_cpp import LlamaCpp

    model = LlamaCpp(models / "small.gguf", 1, 160)
    assert (model.context_length, model.vocab_size) == (160, 320)
    assert model.prefill([9, 8, 7, 6, 5], 3) is None  # nothing is cached yet
    assert model.prefill([9, 8, 7, 10, 11], 3) > 0
    assert model.prefill([9, 8, 7, 10, 12], 3) is None  # four are cached
    start = time.perf_counter()
    seconds = model.decode([9, 8], 100)
    assert 0 < seconds < time.perf_counter() - start
    assert model.first_token([9, 8, 7]) > 0


def test_llama_cpp_times_from_the_first_token_to_the_last(models: Path) -> None:
    """`decode` divides the time of n + 1 tokens by n; with one token no time has passed."""
    from llama_cpp import LlamaCpp

    with LlamaCpp(models / "small.gguf") as llama:
        body = {"prompt": [9, 8, 7], "ignore_eos": True}
        one, many = (
            llama._post("/completion", {**body, "n_predict": count})["timings"] for count in (1, 60)
        )
    assert one["predicted_n"] == 1 and many["predicted_n"] == 60
    assert one["predicted_ms"] < many["predicted_ms"] / 60 / 2


def test_a_missing_package_is_said_in_the_row(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('not here')\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    config = SpeedConfig(models=(models / "small.gguf",), engines=("llama.cpp",), **SHORT)
    (row,) = measure(config)
    assert row.error == "llama.cpp is not available: the Python package xllamacpp is not installed"
    assert row.speeds == () and row.peak_memory_bytes is None


def test_models_that_cannot_run_are_rows(tmp_path: Path) -> None:
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9, "n_positions": 16}
    (tmp_path / "gpt").mkdir()
    write_json(tmp_path / "gpt" / "config.json", {"model_type": "gpt2", **shape})
    save_file({"wte.weight": np.zeros((9, 8), np.float32)}, tmp_path / "gpt" / "model.safetensors")
    config = SpeedConfig(models=(tmp_path / "gpt", tmp_path / "absent"), **SHORT)
    other, absent = measure(config)
    assert "gpt2" in other.error
    assert absent.error.startswith(f"there is no model at {tmp_path}/absent")


def test_a_damaged_file_is_a_row_and_does_not_disturb_the_others(
    models: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    whole = (models / "small.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    files = (tmp_path / "half.gguf", models / "small.gguf", tmp_path / "absent.gguf")
    config = SpeedConfig(models=files, engines=("llama.cpp",), repetitions=2, depths=(0,), **SHORT)
    half, good, absent = measure(config)
    assert half.error.startswith(f"llama.cpp cannot load {tmp_path}/half.gguf")
    assert absent.error == f"there is no file {tmp_path}/absent.gguf"
    assert good.error is None and good.speeds[0].decode.median > 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_worker_is_a_row(models: Path) -> None:
    config = SpeedConfig(models=(models / "small",), repetitions=3, **SHORT)
    with Watch(kill="small") as watch:
        (row,) = measure(config)
    assert "killed by SIGKILL" in row.error and "memory" in row.error
    assert len(watch.peaks) == 1, "a model that failed is not started again"


def test_a_worker_that_takes_too_long_is_ended(models: Path) -> None:
    config = SpeedConfig(models=(models / "small",), timeout_seconds=0.05, **SHORT)
    (row,) = measure(config)
    assert row.error == "no result within 0.05 seconds; the process was ended"
    assert not psutil.Process().children()
