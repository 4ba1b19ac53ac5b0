"""Medians, ranges, the noise flag; what goes into JSON."""

import json
from pathlib import Path

import pytest

from xinslm.errors import UsageError
from xinslm.evaluate.speed.config import SpeedConfig
from xinslm.evaluate.speed.result import Figure, SpeedResult, combine


def sample(decode: float = 10.0, **changes) -> dict:
    values = {
        "first_token_seconds": 1.0,
        "speeds": [
            {"depth": 0, "prefill": 100.0, "decode": decode},
            {"depth": 64, "prefill": None, "decode": 5.0},
        ],
        "prompt_tokens": 128,
        "decode_tokens": 32,
        "load_seconds": 2.0,
        "peak_memory_bytes": 5000,
        "base_memory_bytes": 1000,
        "energy_joules": None,
        "other_load": 0.2,
        "file_bytes": 400,
        "notes": ["a note"],
        "threads": 2,
        "device": "cpu",
        "dtype": "float32",
        "version": "library 1",
    }
    return values | changes


def test_median_and_range_of_the_repetitions() -> None:
    samples = [sample(10.0), sample(12.0, other_load=None), sample(11.0), sample(9.0)]
    result = combine("m", "xinslm", samples)
    assert result.speeds[0].decode == Figure(10.5, 9.0, 12.0)
    assert result.speeds[1].prefill is None and result.energy_joules is None
    assert result.repetitions == 4 and result.notes == ("a note",)
    assert result.other_load == pytest.approx(0.2)


def test_energy_that_one_repetition_lacks_is_none() -> None:
    assert combine("m", "e", [sample(energy_joules=3.0), sample()]).energy_joules is None
    both = combine("m", "e", [sample(energy_joules=3.0), sample(energy_joules=5.0)])
    assert both.energy_joules == Figure(4.0, 3.0, 5.0)


@pytest.mark.parametrize(("slow", "noisy"), [(8.0, False), (7.0, True)])
def test_noisy_above_a_quarter_of_the_median(slow: float, noisy: bool) -> None:
    samples = [sample(10.0), sample(10.0), sample(slow)]
    assert combine("m", "e", samples).noisy is noisy


def test_a_cold_first_load_is_no_noise_but_the_first_token_is() -> None:
    assert not combine("m", "e", [sample(), sample(load_seconds=9.0)]).noisy
    assert combine("m", "e", [sample(), sample(first_token_seconds=2.0)]).noisy


def test_one_repetition_is_noted() -> None:
    assert combine("m", "e", [sample()]).notes[1].startswith("one repetition")


def test_the_dictionary_is_json() -> None:
    content = combine("m", "e", [sample(8.0), sample(12.0)]).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["speeds"][0]["decode"] == {
        "median": 10.0,
        "low": 8.0,
        "high": 12.0,
        "spread": pytest.approx(0.4),
    }
    failed = SpeedResult("m", "e", 4, "why").to_dict()
    assert json.loads(json.dumps(failed)) == failed and failed["error"] == "why"


def test_wrong_settings_are_named_together(tmp_path: Path) -> None:
    config = SpeedConfig(
        models=(tmp_path,), engines=("llama.cpp",), depths=(-1,), threads=0, repetitions=0
    )
    with pytest.raises(UsageError) as error:
        config.check()
    for text in ("GGUF files only", "depths has -1", "threads is 0", "repetitions is 0"):
        assert text in str(error.value)
    with pytest.raises(UsageError, match="models is empty"):
        SpeedConfig(models=()).check()


def test_llama_cpp_gets_gguf_files_only(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert SpeedConfig(models=(tmp_path, file, tmp_path)).pairs() == [
        ("xinslm", tmp_path),
        ("xinslm", file),
        ("llama.cpp", file),
    ]
