"""The speed that `plan` measures on a part of the model."""

from dataclasses import astuple, replace

import pytest

from xinslm.model.config import PRESETS, ModelConfig
from xinslm.model.operations import forward_operations
from xinslm.plan import measured
from xinslm.plan.measured import measure_speed
from xinslm.train.config import PretrainConfig

SHAPE = ModelConfig(512, 64, 160, 6, 4, 2, 16)


def config(**changes) -> PretrainConfig:
    settings = {"batch_size": 2, "max_seq_length": 32, "compute_dtype": "float32"}
    return PretrainConfig(**{"data_path": "data", "output_dir": "out", **settings, **changes})


def test_the_time_of_all_blocks_follows_from_one_and_two(monkeypatch) -> None:
    def seconds(shape, *_):
        layers = shape.num_hidden_layers
        return 0.5 + 0.25 * layers, 0.125 * layers, 0.25 + 0.0625 * layers

    monkeypatch.setattr(measured, "_times", seconds)
    monkeypatch.setattr(measured, "product_rate", lambda *_: 7e12)
    for layers in (1, 2, 6):
        shape = replace(SHAPE, num_hidden_layers=layers)
        speed = measure_speed(shape, config())
        operations = sum(forward_operations(shape, 32)) * 64 / 1e12  # AdamW needs no products
        learning, updating, scoring = seconds(shape)
        assert speed.peak == 7
        assert speed.training == pytest.approx(3 * operations / (learning + updating))
        assert speed.scoring == pytest.approx(operations / scoring)


def test_an_optimizer_step_is_counted_once_a_batch_however_few_positions_are_timed(
    monkeypatch,
) -> None:
    monkeypatch.setattr(measured, "_times", lambda *_: (1.0, 4.0, 1.0))
    whole = config(batch_size=64, max_seq_length=128)  # 8,192 positions a step, 2,048 are timed
    operations = sum(forward_operations(SHAPE, 128)) * 2048 / 1e12
    assert measure_speed(SHAPE, whole).training == pytest.approx(3 * operations / (1 + 4 / 4))


@pytest.mark.parametrize("preset", PRESETS)
def test_wide_models_are_timed_on_fewer_positions(preset: str) -> None:
    shape = ModelConfig(32_000, *astuple(PRESETS[preset]))
    rows, length = measured._rows(shape, config(batch_size=8, max_seq_length=2048))
    assert measured.FEWEST_POSITIONS <= rows * length <= measured.MOST_POSITIONS
    two = sum(forward_operations(replace(shape, num_hidden_layers=2), length))
    allowed = max(measured.MOST_OPERATIONS, 3 * two * measured.FEWEST_POSITIONS)
    assert 3 * two * rows * length <= 1.01 * allowed


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_real_measurement_is_of_the_order_of_the_peak(optimizer, checkpointing) -> None:
    settings = config(optimizer=optimizer, gradient_checkpointing=checkpointing)
    speed = measure_speed(SHAPE, settings)
    assert 0 < speed.training < 2 * speed.peak and 0 < speed.scoring < 2 * speed.peak


def test_training_is_not_timed_on_probabilities_that_are_denormal() -> None:
    """With PyTorch's initial weights it takes 4 to 10 times as long as with the student's."""
    shape = ModelConfig(8192, *astuple(PRESETS["1m"]))
    speed = measure_speed(shape, config(batch_size=8, max_seq_length=256))
    assert speed.training > speed.scoring / 3
