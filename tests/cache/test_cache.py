"""The entry format: round trips against the dense distribution, statistics of the tail samples,
wide vocabularies.
"""

import math

import numpy as np
import pytest
import torch

from xinslm.cache.config import CacheConfig, default_top_k
from xinslm.cache.entries import CacheFormat, decode, encode, position_uniforms
from xinslm.cache.entry_files import (
    GROUP,
    SparseLayout,
    file_of,
    layouts,
    pack_bits,
    unpack_bits,
)
from xinslm.errors import XinslmError


def distributions(rows=200, vocab=300, seed=0, sharpness=2.5):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=g) * sharpness
    return logits.softmax(1), torch.randint(0, vocab, (rows,), generator=g), torch.arange(rows)


def test_entry_sizes_are_the_documented_ones():
    mass = CacheConfig.tail_sample_mass
    default = default_top_k(None, mass), mass
    sizes = {
        vocab: SparseLayout(CacheFormat(vocab, *default, 2.0)) for vocab in (32768, 65536, 128256)
    }
    assert [layout.stored.itemsize for layout in sizes.values()] == [20, 20, 21]
    assert sizes[65536].mean_bytes(0.17) == 20 + 2 * 9
    assert sizes[128256].mean_bytes(0.17) == 21 + 9 * (2 + 1 / 8)
    assert SparseLayout(CacheFormat(32768, default_top_k(None, 0), 0, 2.0)).mean_bytes(0.1) == 41


def test_top_k_tail_and_normaliser_survive_within_the_codes_precision():
    probs, labels, positions = distributions()
    fmt = CacheFormat(300, 8, 0.05, 2.0)
    targets = decode(encode(probs, labels, positions, fmt, seed=1), fmt)
    top = probs.topk(8)
    assert torch.equal(targets.top_k_ids.sort(1).values, top.indices.sort(1).values)
    rest = 1 - top.values.sum(1)
    total = targets.top_k_log_probs.exp().sum(1) + targets.log_tail.exp()
    torch.testing.assert_close(total, torch.ones(200), atol=1e-6, rtol=0)
    kl = (top.values * (top.values.log() - targets.top_k_log_probs)).sum(1) + rest * (
        rest.log() - targets.log_tail
    )
    assert kl.max() < 1e-3 and kl.mean() < 1e-4
    torch.testing.assert_close(targets.log_z, probs.sqrt().sum(1).log(), atol=2e-3, rtol=1e-3)
    assert bool(targets.valid_mask.all()) and torch.equal(
        targets.num_samples, (rest / 0.05).ceil().long()
    )


def test_tail_samples_are_distributed_as_the_tail():
    probs = distributions(rows=1)[0].expand(20000, -1)
    fmt = CacheFormat(300, 8, 0.05, 1.0)
    labels, positions = torch.zeros(20000, dtype=torch.long), torch.arange(20000)
    targets = decode(encode(probs, labels, positions, fmt, seed=3), fmt)
    tail = probs[0].scatter(0, targets.top_k_ids[0], 0.0)
    assert targets.num_samples.unique().tolist() == [math.ceil(float(tail.sum()) / 0.05)]
    assert bool((tail[targets.tail_ids] > 0).all())
    counts = torch.bincount(targets.tail_ids.flatten(), minlength=300) / targets.tail_ids.numel()
    torch.testing.assert_close(counts, tail / tail.sum(), atol=4e-3, rtol=0)


def test_a_record_depends_on_position_and_seed_alone():
    probs, labels, positions = distributions()
    fmt = CacheFormat(300, 8, 0.05, 2.0)
    whole = encode(probs, labels, positions, fmt, seed=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    mixed = encode(probs[order], labels[order], positions[order], fmt, seed=1)
    assert np.array_equal(whole[order.numpy()], mixed)
    other = encode(probs, labels, positions, fmt, seed=2)
    assert (whole["tail_ids"] != other["tail_ids"]).any()
    uniforms = position_uniforms(torch.arange(100000), 0)
    histogram = torch.histc(uniforms.float(), 20, 0, 1) / 100000
    torch.testing.assert_close(histogram, torch.full((20,), 0.05), atol=0.004, rtol=0)


@pytest.mark.parametrize("vocab", [65537, 128256, 262144])
def test_ids_beyond_16_bits(vocab):
    fmt = CacheFormat(vocab, 3, 0.05, 1.0)
    probs = torch.zeros(2, vocab)
    probs[0, [1, 40000, vocab - 1, vocab - 2]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    probs[1, [5, 6, 7]] = torch.tensor([0.5, 0.3, 0.2])
    targets = decode(encode(probs, torch.tensor([1, 5]), torch.arange(2), fmt, seed=0), fmt)
    assert set(targets.top_k_ids[0].tolist()) == {1, 40000, vocab - 1}
    assert targets.tail_ids[0].tolist() == [vocab - 2] * 2
    assert targets.num_samples.tolist() == [2, 0], "nothing is left of the second row to draw from"


def test_bits_round_trip():
    values = np.random.default_rng(0).integers(0, 8, (50, 13))
    assert np.array_equal(unpack_bits(pack_bits(values, 3), 13, 3), values)


def test_mass_of_unknown_tokens_goes_to_the_tail_without_samples():
    probs, labels, positions = distributions()
    fmt = CacheFormat(300, 8, 0.05, 1.0)
    targets = decode(encode(0.7 * probs, labels, positions, fmt, seed=0), fmt)
    assert not bool(targets.num_samples.any())
    expected = 1 - 0.7 * probs.topk(8).values.sum(1)
    torch.testing.assert_close(targets.log_tail.exp(), expected, atol=8e-3, rtol=0)


def test_a_distribution_that_is_not_finite_is_named_by_its_position():
    probs, labels, positions = distributions()
    probs[17, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="position 117"):
        encode(probs, labels, positions + 100, CacheFormat(300, 8, 0.05, 1.0), seed=0)


@pytest.mark.parametrize("vocab", [300, 65536, 65537, 128256, 600_000])
def test_files_give_back_every_entry_in_any_order(tmp_path, vocab):
    """Uncovered positions, tails without samples and full ones, at the borders of groups."""
    rng = np.random.default_rng(vocab)
    layout, count = SparseLayout(CacheFormat(vocab, 3, 0.04, 1.0)), 3 * GROUP + 5
    entries = np.zeros(count, layout.dtype)
    entries["num_samples"] = rng.integers(0, 26, count)
    entries["num_samples"][[0, GROUP - 1, GROUP, count - 1]] = 25, 0, 25, 25
    entries["flags"], entries["codes"] = 1, rng.integers(0, 256, (count, 3))
    entries["ids"] = rng.integers(0, vocab, (count, 3))
    drawn = np.arange(25) < entries["num_samples"][:, None]
    entries["tail_ids"] = np.where(drawn, rng.integers(0, vocab, (count, 25)), 0)
    entries["tail_ids"][0, 0] = vocab - 1
    stem = tmp_path / "00000"
    contents = layout.pack(entries)
    for ending, content in zip(layout.suffixes, contents, strict=True):
        file_of(stem, ending).write_bytes(content.tobytes())
    assert layout.is_complete(stem, count) and not layout.is_complete(stem, count - 1)
    samples, bits = int(entries["num_samples"].sum()), max(0, (vocab - 1).bit_length() - 16)
    room = {0: 0, 1: 1, 2: 2, 4: 4}[bits]
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written == count * layout.stored.itemsize + 2 * samples + -(-samples * room // 8)
    opened = layout.open(stem)
    for places in (np.arange(count), rng.permutation(count), np.array([7, 7, count - 1])):
        assert np.array_equal(opened[places], entries[places])
    last = file_of(stem, layout.suffixes[-1])
    last.write_bytes(last.read_bytes()[:-1])
    assert not layout.is_complete(stem, count), "the samples' file is short of a byte"
    with pytest.raises(XinslmError, match="the file of samples does not fit"):
        layout.open(stem)[np.arange(3)]


def test_more_samples_than_the_format_allows_are_refused(tmp_path):
    layout, stem = SparseLayout(CacheFormat(300, 3, 0.04, 1.0)), tmp_path / "00000"
    fixed = np.zeros(2, layout.stored)
    fixed["num_samples"] = 3, 200
    file_of(stem, ".bin").write_bytes(fixed.tobytes())
    file_of(stem, ".tail.bin").write_bytes(bytes(2 * 203))
    with pytest.raises(XinslmError, match="203 tail samples, at most 200 of 25"):
        layout.open(stem)[np.array([0])]


def test_a_shard_without_samples_or_entries(tmp_path):
    fmt = CacheFormat(300, 3, 0.04, 1.0)
    (layout,) = layouts({"entries": fmt.dtype}, fmt)
    for count in (0, 2):
        stem, entries = tmp_path / f"{count}", np.zeros(count, fmt.dtype)
        for ending, content in zip(layout.suffixes, layout.pack(entries), strict=True):
            file_of(stem, ending).write_bytes(content.tobytes())
        assert layout.is_complete(stem, count) and not layout.is_complete(stem, count + 1)
    assert np.array_equal(layout.open(tmp_path / "2")[np.arange(2)], np.zeros(2, fmt.dtype))
