"""Everything passes in a healthy world, and each planted defect is found by the check that is there
for it.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from xinslm.cache import merge
from xinslm.cache.entry_files import SparseLayout
from xinslm.cache.folder import Cache
from xinslm.cache.merge_config import MergeConfig
from xinslm.cli.main import main
from xinslm.data.packing import Batch
from xinslm.doctor import losses, rows
from xinslm.doctor import run as doctor
from xinslm.doctor.config import DoctorConfig
from xinslm.errors import UsageError
from xinslm.files import sha256_file
from xinslm.losses import fused
from xinslm.model.files import load_model, save_model
from xinslm.model.transformer import Transformer
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.load import load_tokenizer


def examine(healthy, **changes):
    settings = {
        "data_path": healthy.data,
        "cache": healthy.cache,
        "teacher": str(healthy.teacher),
        "student": healthy.student,
        "device": "cpu",
        **changes,
    }
    return doctor.run(DoctorConfig(**settings))


def status(result):
    return {check.name: check.status for check in result.checks}


def only(result, *names):
    assert set(result.failed) == set(names), result.describe()


def rewrite(folder, change):
    """Apply `change` to every shard's entries and make the manifest agree."""
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = SparseLayout(Cache(folder).format).stored
    for file in folder.glob("*/?????.bin"):
        change(np.fromfile(file, dtype)).tofile(file)
        manifest["files"][file.relative_to(folder).as_posix()]["sha256"] = sha256_file(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def cache(healthy, tmp_path):
    return shutil.copytree(healthy.cache, tmp_path / "cache")


def test_a_healthy_world_passes_every_check(healthy, capsys):
    result = examine(healthy)
    only(result)
    assert set(status(result).values()) == {"ok"} and len(result.checks) >= 20, result.describe()
    words = [
        "doctor",
        "--data-path",
        str(healthy.data),
        "--cache",
        str(healthy.cache),
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    assert "skipped  teacher agreement" in capsys.readouterr().out


def test_what_is_not_given_is_skipped_with_a_reason(healthy):
    result = examine(healthy, cache=None, student=None, teacher=None)
    only(result)
    found = {check.name: check for check in result.checks}
    assert (
        found["alignment"].detail == "no --cache"
        and found["teacher agreement"].detail == "no --teacher"
    )
    assert (
        found["fused distillation"].status == "ok"
        and "a random teacher" in found["fused distillation"].detail
    )
    alone = status(examine(healthy, cache=None, student=None))
    assert alone["teacher on this data"] == "ok" and alone["teacher agreement"] == "skipped"
    assert list(alone).count("teacher on this data") == 1


def test_one_flipped_bit(healthy, cache, capsys):
    file = cache / "train" / "00001.bin"
    data = bytearray(file.read_bytes())
    data[20] ^= 4
    file.write_bytes(data)
    result = examine(healthy, cache=cache, teacher=None, student=None)
    only(result, "cache files")
    words = ["doctor", "--data-path", str(healthy.data), "--cache", str(cache), "--device", "cpu"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "FAIL     cache files" in shown.out and "00001.bin: damaged" in shown.out
    assert "checks failed: cache files" in shown.err


def test_a_missing_shard_and_a_damaged_dataset(healthy, cache, tmp_path):
    (cache / "train" / "00000.bin").unlink()
    result = examine(healthy, cache=cache, student=None)
    only(result, "cache files")
    assert (
        status(result)["alignment"] == "skipped"
        and status(result)["teacher agreement"] == "skipped"
    )
    data = shutil.copytree(healthy.data, tmp_path / "data")
    mask = bytearray((data / "train" / "mask.bin").read_bytes())
    mask[100] ^= 1
    (data / "train" / "mask.bin").write_bytes(mask)
    only(examine(healthy, data_path=data, student=None, teacher=None), "dataset files")


@pytest.mark.parametrize("shift", [1, -1])
def test_entries_shifted_by_one(healthy, cache, shift):
    rewrite(cache, lambda entries: np.roll(entries, shift))
    result = examine(healthy, cache=cache, student=None)
    assert {"alignment", "teacher agreement"} <= set(result.failed), result.describe()
    assert f"shifted by {shift:+d}" in result.describe()


def test_another_teacher(healthy):
    """The student has the teacher's shape and tokenizer, and other weights."""
    result = examine(healthy, teacher=str(healthy.student), student=None)
    only(result, "teacher of this cache", "teacher agreement")


def test_a_cache_of_another_teacher_that_claims_to_be_of_this_one(healthy, cache):
    """What the manifest says is not enough: log-probabilities that are a little off are noticed."""

    def blur(entries):
        entries = entries.copy()
        entries["codes"] = np.clip(
            entries["codes"].astype(int) + np.resize([25, -25], entries["codes"].shape), 0, 255
        )
        entries["log_label"] *= 1.2
        return entries

    rewrite(cache, blur)
    assert "teacher agreement" in examine(healthy, cache=cache, student=None).failed


def test_entries_that_are_not_finite_or_missing(healthy, cache):
    def spoil(entries):
        entries = entries.copy()
        entries["log_tail"][::9] = np.nan
        return entries

    rewrite(cache, spoil)
    assert "entries" in examine(healthy, cache=cache, teacher=None, student=None).failed
    shutil.rmtree(cache)
    shutil.copytree(healthy.cache, cache)

    def empty(entries):
        entries = entries.copy()
        entries["flags"][: len(entries) * 2 // 3] = 0
        return entries

    rewrite(cache, empty)
    assert examine(healthy, cache=cache, teacher=None, student=None).failed == ["entries"]


def test_tail_samples_of_other_entries(healthy, cache):
    """Every sample is a token of some tail, and all hashes fit."""
    manifest = json.loads((cache / "manifest.json").read_text())
    for file in cache.glob("*/*.tail.bin"):
        np.roll(np.fromfile(file, "<u2"), 7).tofile(file)
        manifest["files"][file.relative_to(cache).as_posix()]["sha256"] = sha256_file(file)
    (cache / "manifest.json").write_text(json.dumps(manifest))
    only(examine(healthy, cache=cache, student=None), "teacher agreement")


def test_a_damaged_count_of_samples_ends_no_examination(healthy, cache):
    file = cache / "train" / "00000.bin"
    layout = SparseLayout(Cache(cache).format)
    entries = np.fromfile(file, layout.stored)
    entries["num_samples"][3] ^= 16
    entries.tofile(file)
    only(examine(healthy, cache=cache, student=None), "cache files")


def test_a_top_k_too_small_without_tail_samples(healthy, tmp_path):
    from xinslm.cache import score
    from xinslm.cache.config import CacheConfig

    score.run(
        CacheConfig(
            str(healthy.teacher),
            healthy.data,
            tmp_path / "c",
            top_k=1,
            tail_sample_mass=0.0,
            max_seq_length=64,
            device="cpu",
        )
    )
    only(examine(healthy, cache=tmp_path / "c", teacher=None, student=None), "tail")


def test_a_teacher_no_better_than_token_frequencies(healthy, tmp_path):
    model = load_model(healthy.teacher)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    save_model(model, tmp_path / "t")
    load_tokenizer(healthy.teacher).save(tmp_path / "t")
    only(
        examine(healthy, cache=None, teacher=str(tmp_path / "t"), student=None),
        "teacher on this data",
    )


def test_a_cache_of_another_dataset(healthy, tmp_path):
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig

    text = tmp_path / "other.txt"
    text.write_text("some other text. " * 300)
    prepare.run(
        PrepareConfig(
            data_path=(str(text),), tokenizer_path=healthy.tokenizer, output_dir=tmp_path / "d"
        )
    )
    only(
        examine(healthy, data_path=tmp_path / "d", teacher=None, student=None),
        "cache of this dataset",
    )


def test_ids_that_mean_other_bytes(healthy, tmp_path):
    """Two tokenizers of one size: sizes alone say nothing."""
    other = BPETokenizer(vocab_size=400)
    other.train(["wholly other words make wholly other merges, over and over and over again " * 20])
    for name in ("student", "teacher"):
        shutil.copytree(getattr(healthy, name), tmp_path / name)
        other.save(tmp_path / name)
    result = examine(healthy, student=tmp_path / "student")
    only(result, "student vocabulary")
    assert "ids mean other bytes, the first is" in result.describe()
    only(examine(healthy, teacher=str(tmp_path / "teacher"), student=None), "teacher vocabulary")


def test_weights_that_are_not_finite(healthy, tmp_path):
    model = load_model(healthy.student)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    save_model(model, tmp_path / "s")
    load_tokenizer(healthy.student).save(tmp_path / "s")
    result = examine(healthy, student=tmp_path / "s", teacher=None)
    only(result, "student weights")
    assert "model.layers.1.mlp.up_proj.weight" in result.describe()


@pytest.fixture
def wrong_gradient(monkeypatch):
    """Plant a defect in the gradient that the fused head makes: a function of the gradient and the
    settings.
    """

    def plant(change):
        real = losses._fused

        def spoilt(at, targets, config):
            value, hidden, weight = real(at, targets, config)
            return value, *change(hidden, weight, config)

        monkeypatch.setattr(losses, "_fused", spoilt)

    return plant


def test_temperature_squared_in_the_value_and_not_in_the_gradient(healthy, wrong_gradient):
    wrong_gradient(
        lambda hidden, weight, config: (
            hidden / config.temperature**2,
            weight / config.temperature**2,
        )
    )
    only(examine(healthy, teacher=None), "fused distillation, T=2", "temperature")


def test_a_gradient_that_misses_the_head(healthy, wrong_gradient):
    wrong_gradient(lambda hidden, weight, config: (hidden, 0.99 * weight))
    only(
        examine(healthy, teacher=None),
        "fused cross-entropy",
        "fused distillation",
        "fused distillation, T=2",
        "other divergences",
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_one_divergence_that_is_wrong(healthy, wrong_gradient, divergence):
    def change(hidden, weight, config):
        return hidden * (1.01 if config.divergence == divergence else 1.0), weight

    wrong_gradient(change)
    only(examine(healthy, teacher=None), "other divergences")


def test_a_kl_term_that_is_not_zero_for_equal_distributions(healthy, wrong_gradient):
    wrong_gradient(lambda hidden, weight, config: (hidden + 1e-3 * (config.alpha == 0), weight))
    assert "student as teacher" in examine(healthy, teacher=None).failed


def test_attention_across_documents_and_onto_pads(healthy, monkeypatch):
    def leaky(self, ids, segments, past=0):
        return None

    monkeypatch.setattr(Transformer, "attended", leaky)
    assert "packing" in examine(healthy, teacher=None).failed
    monkeypatch.undo()
    real = Transformer.hidden

    def pads_count(self, ids, positions=None, segments=None, **rest):
        out = real(self, ids, positions, segments, **rest)
        return out if segments is None else out * (1 + (segments < 0).sum())

    monkeypatch.setattr(Transformer, "hidden", pads_count)
    assert "pads" in examine(healthy, teacher=None).failed


def test_each_micro_batch_divided_by_its_own_tokens(healthy, monkeypatch):
    def own(model, hidden, batch: Batch, normaliser):
        labels = torch.from_numpy(batch.labels).reshape(-1)
        states = hidden.reshape(-1, hidden.shape[-1])[labels >= 0]
        config = fused.LossConfig(alpha=1.0, beta=0.0)
        return fused.fused_loss(states, model.head_weight, labels[labels >= 0], None, config)[0]

    monkeypatch.setattr(rows, "_loss", own)
    assert examine(healthy, teacher=None).failed == ["accumulation"]


def test_a_merged_cache_is_examined_too(healthy, tmp_path):
    merge.run(MergeConfig((healthy.cache, healthy.cache), tmp_path / "m", shard_positions=3000))
    result = examine(healthy, cache=tmp_path / "m", student=None)
    only(result)
    assert status(result)["alignment"] == "ok" and status(result)["teacher agreement"] == "skipped"


def test_wrong_requests(healthy):
    with pytest.raises(UsageError, match="adapter is for a teacher"):
        examine(healthy, teacher=None, adapter=healthy.folder)
    with pytest.raises(UsageError, match="batch_size is 1, but must be at least 4"):
        examine(healthy, batch_size=1)
    with pytest.raises(UsageError, match="is an endpoint"):
        examine(healthy, teacher="http://localhost:1/v1")
    result = examine(healthy, teacher="nowhere", student=healthy.folder)
    only(result, "teacher", "student weights")
