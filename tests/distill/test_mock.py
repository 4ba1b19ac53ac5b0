"""`distill --use-mock`: the mission's one command, from a text file to a distilled student."""

import dataclasses
import json

import pytest

from xinslm.cli.main import main
from xinslm.distill import run as distill
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "max_seq_length": 64,
    "batch_size": 4,
    "num_epochs": 1,
    "learning_rate": 3e-3,
    "seed": 1,
}


@pytest.fixture
def text(world, tmp_path):
    lines = world.text.read_text().splitlines()[:60]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(json.loads(line)["text"] for line in lines))
    return path


def test_the_missions_command_runs_as_written(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xinslm.distill.mock.STEPS", 4)
    flags = [x for name, value in SIZES.items() for x in (f"--{name}", str(value))]
    out = tmp_path / "student"
    words = ["distill", "--data_path", str(text), "--output_dir", str(out), *flags, "--use_mock"]
    assert main([*words, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "the teacher is a stand-in" in shown.out + shown.err
    run = json.loads((out / "run.json").read_text())
    assert "teacher" in run["inputs"] and any("stand-in" in note for note in run["warnings"])
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"]) == (32, 400)
    kd = [
        line["kd"]
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "kd" in line
    ]
    assert kd and all(value > 0 for value in kd)


def test_an_interrupted_run_keeps_its_teacher(text, tmp_path, monkeypatch):
    monkeypatch.setattr("xinslm.distill.mock.STEPS", 3)
    config = DistillConfig(
        data_path=text, output_dir=tmp_path / "r", use_mock=True, max_steps=3, device="cpu", **SIZES
    )

    def stop(progress):
        if progress.stage == "distill" and "loss" in progress.values:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill.run(config, stop)
    weights = tmp_path / "r" / "teacher" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert distill.run(config).state.step == 3
    assert weights.stat().st_mtime_ns == before


def test_a_named_teacher_and_a_stand_in_exclude_each_other(text, tmp_path):
    config = DistillConfig(data_path=text, output_dir=tmp_path / "r", use_mock=True, teacher="x")
    with pytest.raises(UsageError, match="use_mock trains a teacher of its own"):
        distill.run(config)
    with pytest.raises(UsageError, match="or --use-mock"):
        distill.run(dataclasses.replace(config, use_mock=False, teacher=None))
