"""Merging caches: the mixture in expectation, through entries and the loss, whatever the weights;
what is refused.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import training as train
from xinslm.cache import merge, score
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import CacheFormat, decode, encode, pack_entries
from xinslm.cache.entry_files import SparseLayout
from xinslm.cache.folder import PLAN, Cache
from xinslm.cache.merge import MergeScorer
from xinslm.cache.merge_config import MergeConfig
from xinslm.cache.mixture import Masses, mix
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError
from xinslm.files import sha256_file
from xinslm.losses.chunk import chunk_loss
from xinslm.losses.config import LossConfig
from xinslm.model.files import load_model, save_model
from xinslm.tokenizer.load import load_tokenizer

VOCAB = 40


def random_parts(seed, rows, sizes, without_samples=()):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(sizes)), rows)
    parts = []
    for k, (top_k, tail_samples) in enumerate(sizes):
        masses = rng.dirichlet(np.ones(top_k + 1), rows) * weights[:, [k]]
        counts = rng.integers(1, tail_samples + 1, rows) * (k not in without_samples)
        ids = np.stack([rng.permutation(VOCAB)[:top_k] for _ in range(rows)])
        parts.append(
            Masses(
                ids,
                masses[:, :top_k],
                masses[:, top_k],
                rng.integers(0, VOCAB, (rows, tail_samples)),
                counts,
            )
        )
    return parts


def dense(part):
    """The full distribution of a part or a mixture, (N, VOCAB)."""
    out = np.zeros((len(part.tail), VOCAB))
    rows = np.arange(len(part.tail))[:, None]
    np.add.at(out, (rows, part.top_k_ids), part.top_k_mass)
    for row, count in enumerate(part.num_samples.tolist()):
        for token in part.tail_ids[row, :count]:
            out[row, token] += part.tail[row] / count
    return out


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(3, 8), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_the_expectation_over_the_uniform_numbers_is_the_weighted_sum(seed, sizes):
    parts = random_parts(seed, 5, sizes)
    expected, found = sum(dense(part) for part in parts), np.zeros((5, VOCAB))
    grid = (np.arange(2000) + 0.5) / 2000
    for low in range(0, 2000, 250):
        us = grid[low : low + 250]
        many = [
            Masses(
                *(
                    np.tile(getattr(p, f.name), (250, *[1] * (getattr(p, f.name).ndim - 1)))
                    for f in dataclasses.fields(p)
                )
            )
            for p in parts
        ]
        mixture = mix(many, np.repeat(us, 5), 3, 0.2)
        assert all(len(set(row)) == 3 for row in mixture.top_k_ids.tolist())
        assert np.array_equal(mixture.num_samples, np.ceil(mixture.tail / 0.2))
        found += dense(mixture).reshape(250, 5, VOCAB).sum(axis=0)
    np.testing.assert_allclose(found / 2000, expected, atol=1e-3)
    np.testing.assert_allclose(mixture.top_k_mass.sum(1) + mixture.tail, 1.0, atol=1e-12)


def test_the_new_top_k_is_chosen_without_the_samples_and_takes_what_they_add():
    ids = np.array([[1, 2], [1, 2]])
    both = Masses(
        ids,
        np.array([[0.3, 0.1]] * 2),
        np.array([0.1, 0.1]),
        np.array([[5, 5], [6, 2]]),
        np.full(2, 2),
    )
    other = Masses(
        np.array([[3, 4]] * 2),
        np.array([[0.2, 0.15]] * 2),
        np.array([0.15, 0.15]),
        np.array([[7, 7], [1, 9]]),
        np.full(2, 2),
    )
    mixture = mix([both, other], np.array([0.3, 0.3]), 2, 0.1)
    assert mixture.top_k_ids.tolist() == [[1, 3], [1, 3]], "2 and 4 are behind, whatever was drawn"
    np.testing.assert_allclose(mixture.top_k_mass, [[0.3, 0.2], [0.3 + 0.15 / 2, 0.2]])
    np.testing.assert_allclose(mixture.tail, [0.5, 0.5 - 0.15 / 2])


def test_a_tail_that_one_teacher_has_no_samples_of_has_no_samples():
    parts = random_parts(0, 6, [(4, 3), (4, 3)], without_samples=(1,))
    mixture = mix(parts, np.full(6, 0.5), 4, 0.1)
    assert not mixture.num_samples.any()
    np.testing.assert_allclose(mixture.top_k_mass.sum(1) + mixture.tail, 1.0)
    parts[1] = dataclasses.replace(parts[1], tail=np.full(6, 1e-7))
    assert mix(parts, np.full(6, 0.5), 4, 0.1).num_samples.all(), "a mass of nothing hides nothing"


def gradient(z, labels, targets, config):
    z = z.clone()
    chunk_loss(z, labels, targets, config)
    return z


def test_the_average_gradient_from_merged_entries_is_the_dense_one_of_the_mixture():
    """Through codes, tail samples, merging and the loss, where tail samples fall on top-k tokens
    too.
    """
    g = torch.Generator().manual_seed(0)
    rows, weights = 30000, np.array([0.5, 0.3, 0.2])
    p = (1.7 * torch.randn(3, VOCAB, generator=g)).softmax(1)
    fmt, out_fmt = CacheFormat(VOCAB, 4, 3, 2.0), CacheFormat(VOCAB, 4, 3, 1.0)
    positions, labels = torch.arange(rows), torch.full((rows,), 7)
    stored = [
        (encode(p[k].expand(rows, -1), labels, positions, fmt, seed=k), fmt) for k in range(3)
    ]
    out = np.zeros(rows, dtype=out_fmt.dtype)
    scorer = MergeScorer([], {}, None, out_fmt, merge._stream(0, 1))
    scorer._mix(stored, np.tile(weights, (rows, 1)), positions.numpy(), out)
    targets = decode(out, out_fmt)
    mixture = torch.from_numpy(weights).float() @ p
    z = torch.randn(1, VOCAB, generator=g)
    config = LossConfig(alpha=0.0, beta=1.0, tail_weight=1.0)
    found = gradient(z.expand(rows, -1), labels, targets, config).mean(0)
    exact = z[0].softmax(0) - mixture
    rounding = 0.02 * mixture + 1e-4  # of the 8-bit codes, on reading and on writing
    assert bool(((found - exact).abs() < rounding + 4 * (mixture / rows).sqrt()).all())
    missed = (
        (mixture - torch.zeros(VOCAB).scatter(0, targets.top_k_ids[0], 1.0) * mixture).abs().sum()
    )
    assert missed > 0.2, "there is a tail to get wrong"
    label = out["log_label"].astype(np.float64)
    np.testing.assert_allclose(label, float(mixture[7].log()), atol=2e-3)


def test_uniform_numbers_of_a_merge_are_neither_those_of_a_cache_nor_of_another_merge():
    """Tail samples came from such numbers; sampled again with the same ones, they are biased."""
    seeds = {merge._stream(seed, depth) for seed in range(50) for depth in range(1, 5)}
    assert len(seeds) == 200 and min(seeds) >= 2**31


@pytest.fixture(scope="module")
def second(world, tmp_path_factory):
    """Another teacher, its cache, and a cache of the first teacher with other sizes."""
    folder = tmp_path_factory.mktemp("second")
    model = load_model(world.teacher)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(
                0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
            ) if weight.dim() > 1 else None
    save_model(model, folder / "teacher")
    load_tokenizer(world.teacher).save(folder / "teacher")
    cache_of(world, folder / "cache", str(folder / "teacher"), seed=1)
    cache_of(world, folder / "wide", str(world.teacher), top_k=12, tail_sample_mass=0.1)
    return folder


def cache_of(world, folder, teacher, data=None, **changes):
    options = {
        "max_seq_length": 64,
        "shard_positions": 3000,
        "batch_tokens": 2048,
        "device": "cpu",
        **changes,
    }
    score.run(CacheConfig(teacher, data or world.data, folder, **options))


def config(world, second, output_dir, *more, **changes):
    caches = changes.pop("caches", (world.cache, second / "cache", *more))
    return MergeConfig(caches, output_dir, **{"shard_positions": 3000, **changes})


def shards(folder):
    return {
        p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.glob("*/*.bin"))
    }


def everything(folder):
    split = Cache(folder).split("train")
    return split.entries(np.arange(len(split))), Cache(folder).format


def test_merging_copies_of_a_cache_gives_that_cache(world, tmp_path):
    merge.run(
        MergeConfig((world.cache,) * 3, tmp_path / "m", weights=(3, 1, 1), shard_positions=3000)
    )
    (entries, fmt), (expected, source) = everything(tmp_path / "m"), everything(world.cache)
    a, b = decode(entries, fmt), decode(expected, source)
    assert torch.equal(a.valid_mask, b.valid_mask)
    same = a.num_samples == b.num_samples  # the tail's mass was rounded to float16 between
    assert same.float().mean() > 0.9 and (a.num_samples - b.num_samples).abs().max() <= 1
    assert torch.equal(a.top_k_ids.sort(1).values, b.top_k_ids.sort(1).values)
    for row in same.nonzero()[:, 0].tolist():
        count = int(a.num_samples[row])
        drawn = [sorted(x.tail_ids[row, :count].tolist()) for x in (a, b)]
        assert drawn[0] == drawn[1]

    def by_id(targets):
        return targets.top_k_log_probs.gather(1, targets.top_k_ids.argsort(1))

    torch.testing.assert_close(by_id(a), by_id(b), atol=0.06, rtol=0)
    torch.testing.assert_close(a.log_tail, b.log_tail, atol=0.01, rtol=0)
    np.testing.assert_allclose(entries["log_label"], expected["log_label"], atol=4e-3, rtol=1e-3)


def test_order_of_caches_and_size_of_weights_do_not_matter(world, second, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    merge.run(config(world, second, a, second / "wide", weights=(5, 3, 2)))
    caches = (second / "wide", world.cache, second / "cache")
    merge.run(config(world, second, b, caches=caches, weights=(0.2, 0.5, 0.3)))
    (one, fmt), (two, _) = everything(a), everything(b)
    assert fmt.top_k == 4 and fmt.tail_sample_mass == 0.02 and fmt.temperature == 1.0
    assert (one == two).mean() > 0.99, "but for the last bit of a sum"
    described = Cache(a).manifest["config"]["teacher"]
    assert described.startswith(f"merge of 0.5 x {world.cache} + 0.3 x ")


def test_weights_by_token_against_a_loop(world, second, tmp_path):
    merge.run(config(world, second, tmp_path / "m", weights=(1, 3), token_temperature=0.5))
    (entries, fmt), both = (
        everything(tmp_path / "m"),
        [everything(world.cache), everything(second / "cache")],
    )
    merged, parts = decode(entries, fmt), [decode(*one) for one in both]
    for row in np.flatnonzero(merged.valid_mask.numpy())[:400:7]:
        label = [float(one["log_label"][row]) for one, _ in both]
        w = np.array([1.0, 3.0]) * np.exp(2 * (np.array(label) - max(label)))
        w /= w.sum()
        known: dict[int, float] = {}
        for share, part in zip(w, parts, strict=True):
            for token, log_p in zip(
                part.top_k_ids[row].tolist(), part.top_k_log_probs[row].tolist(), strict=True
            ):
                known[token] = known.get(token, 0.0) + share * np.exp(log_p)
        full = dict(known)
        for share, part in zip(w, parts, strict=True):
            count = int(part.num_samples[row])
            for token in part.tail_ids[row, :count].tolist():
                full[token] = full.get(token, 0.0) + share * float(part.log_tail[row].exp()) / count
        top_k = sorted(known, key=lambda token: (-known[token], token))[: fmt.top_k]
        assert merged.top_k_ids[row].tolist() == top_k
        expected = torch.tensor([full[token] for token in top_k], dtype=torch.float32)
        torch.testing.assert_close(
            merged.top_k_log_probs[row].exp(), expected, atol=2e-3, rtol=0.03
        )
        drawn = merged.tail_ids[row, : int(merged.num_samples[row])]
        assert set(drawn.tolist()) <= full.keys() - set(top_k)
        assert float(entries["log_label"][row]) == pytest.approx(
            np.log(w @ np.exp(label)), abs=5e-3
        )


def test_a_position_that_one_cache_leaves_out_is_the_others_alone(world, second, tmp_path):
    half = tmp_path / "half"
    cache_of(world, half, str(world.teacher))
    manifest = json.loads((half / "manifest.json").read_text())
    for file in half.glob("train/?????.bin"):
        entries = np.fromfile(file, SparseLayout(Cache(second / "cache").format).stored)
        entries["flags"][::2] = 0
        entries.tofile(file)
        manifest["files"][f"train/{file.name}"]["sha256"] = sha256_file(file)
    (half / "manifest.json").write_text(json.dumps(manifest))
    merge.run(
        config(world, second, tmp_path / "m", caches=(half, second / "cache"), weights=(9, 1))
    )
    (entries, fmt), (left, _), (right, right_fmt) = (
        everything(f) for f in (tmp_path / "m", half, second / "cache")
    )
    alone = (left["flags"] == 0) & (right["flags"] & 1 > 0)
    a, b = decode(entries[alone], fmt), decode(right[alone], right_fmt)
    assert bool(a.valid_mask.all()) and alone.sum() > 1000
    assert torch.equal(a.top_k_ids.sort(1).values, b.top_k_ids.sort(1).values)
    np.testing.assert_allclose(entries["log_label"][alone], right["log_label"][alone], atol=4e-3)
    neither = (left["flags"] == 0) & (right["flags"] == 0)
    assert neither.any() and not entries["flags"][neither].any()


def test_merging_a_merged_cache_again(world, second, tmp_path, monkeypatch):
    real, seeds = merge.position_uniforms, []
    monkeypatch.setattr(
        merge, "position_uniforms", lambda at, seed: seeds.append(seed) or real(at, seed)
    )
    merge.run(config(world, second, tmp_path / "m"))
    merge.run(
        config(
            world, second, tmp_path / "again", caches=(tmp_path / "m", world.cache), weights=(2, 1)
        )
    )
    assert Cache(tmp_path / "again").manifest["inputs"]["merge_depth"] == "2"
    assert len(set(seeds)) == 2 and min(seeds) >= 2**31, "each is drawn with numbers of its own"


def test_interrupted_and_continued_equals_uninterrupted(world, second, tmp_path):
    merge.run(config(world, second, tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(progress):
        if len(list((tmp_path / "m").glob("train/*.bin"))) == 2:
            raise Stop

    with pytest.raises(Stop):
        merge.run(config(world, second, tmp_path / "m"), stop)
    assert (tmp_path / "m" / PLAN).is_file()
    with pytest.raises(UsageError, match="another teacher, weights"):
        merge.run(config(world, second, tmp_path / "m", weights=(2, 1)))
    merge.run(config(world, second, tmp_path / "m"))
    assert shards(tmp_path / "m") == shards(tmp_path / "whole")


def test_a_student_trains_from_a_merged_cache(world, second, tmp_path):
    merge.run(config(world, second, tmp_path / "m"))
    result = train.run(world.distill(tmp_path / "run", cache=tmp_path / "m"))
    assert result.state.step == 8
    loss = LossConfig(temperature=2.0, temperature_mode="full", tail_weight=0.0)
    with pytest.raises(UsageError, match=r"stores the normaliser for 1.0"):
        train.run(world.distill(tmp_path / "full", cache=tmp_path / "m", loss=loss))


@pytest.fixture(scope="module")
def domains(world, tmp_path_factory):
    """A dataset of two files, and caches of it by two teachers."""
    from xinslm.demo.stories import stories

    folder = tmp_path_factory.mktemp("domains")
    for name, seed in (("code", 11), ("prose", 12)):
        lines = "".join(
            json.dumps({"text": f"{name} {text}"}) + "\n" for text in stories(6000, seed)
        )
        (folder / f"{name}.jsonl").write_text(lines)
    paths = tuple(str(folder / f"{name}.jsonl") for name in ("code", "prose"))
    prepare.run(
        PrepareConfig(data_path=paths, tokenizer_path=world.tokenizer, output_dir=folder / "data")
    )
    return folder


def test_every_document_knows_its_source(world, domains):
    dataset, tokenizer = open_dataset(domains / "data"), load_tokenizer(world.tokenizer)
    names = dataset.manifest["source_names"]
    for name in dataset.manifest["splits"]:
        split, sources = dataset.split(name), dataset.sources(name)
        assert len(sources) == len(split.document_bytes)
        for n, source in enumerate(sources):
            ids = split.tokens[split.documents[n] + 1 : split.documents[n + 1] - 1].tolist()
            piece = json.dumps(tokenizer.decode(ids))[1:-1]  # a document, or a part of a long one
            found = [path for path in names if piece in Path(path).read_text()]
            assert found == [names[source]]


def test_sources_are_no_part_of_a_datasets_fingerprint(domains, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(domains / "data", old)
    manifest = json.loads((old / "manifest.json").read_text())
    for name in ("train", "validation"):
        (old / name / "document_sources.npy").unlink()
        del manifest["files"][f"{name}/document_sources.npy"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert open_dataset(old).fingerprint == open_dataset(domains / "data").fingerprint
    with pytest.raises(UsageError, match="an older xinslm prepared it"):
        open_dataset(old).sources("train")


def test_weights_by_source(world, second, domains, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, teacher in zip(folders, (world.teacher, second / "teacher"), strict=True):
        cache_of(world, folder, str(teacher), domains / "data")
    table = tmp_path / "weights.yaml"
    table.write_text("code.jsonl: [0, 1]\n")
    merge.run(MergeConfig(tuple(folders), tmp_path / "m", weights=(1, 0), domain_weights=table))
    dataset = open_dataset(domains / "data")
    split, code = (
        dataset.split("train"),
        dataset.manifest["source_names"].index(str(domains / "code.jsonl")),
    )
    of_code = np.repeat(dataset.sources("train") == code, np.diff(split.documents))
    (entries, _), (a, _), (b, _) = (everything(folder) for folder in (tmp_path / "m", *folders))
    expected = np.where(of_code, b["log_label"], a["log_label"])
    np.testing.assert_allclose(entries["log_label"], expected, atol=1e-3)
    assert (a["log_label"] != b["log_label"]).mean() > 0.9 and 0.3 < of_code.mean() < 0.7

    table.write_text("nowhere.jsonl: [0, 1]\n")
    with pytest.raises(
        UsageError,
        match=r"no source of the dataset is called 'nowhere.jsonl'. It has: .*code.jsonl",
    ):
        merge.run(MergeConfig(tuple(folders), tmp_path / "n", domain_weights=table))
    table.write_text("code.jsonl: [0, 1, 2]\nprose.jsonl: none\n'*': [0, 0]\n")
    with pytest.raises(UsageError) as caught:
        merge.run(MergeConfig(tuple(folders), tmp_path / "n", domain_weights=table))
    assert len(str(caught.value).splitlines()) == 3
    assert not (tmp_path / "n").exists()


def test_caches_that_do_not_fit_are_refused_by_name(world, second, domains, tmp_path):
    cache_of(world, tmp_path / "other", str(world.teacher), domains / "data")
    with pytest.raises(UsageError, match=r"cache .*other was made from another dataset"):
        merge.run(config(world, second, tmp_path / "m", tmp_path / "other"))
    with pytest.raises(
        UsageError, match=r"top_k is 9, but cache .* knows only 4 tokens.*--top-k 4 or less"
    ):
        merge.run(config(world, second, tmp_path / "m", second / "wide", top_k=9))
    with pytest.raises(UsageError, match=r"3 weights are given for 2 caches"):
        merge.run(config(world, second, tmp_path / "m", weights=(1, 1, 1)))
    with pytest.raises(UsageError, match="each must be a finite number of at least 0"):
        merge.run(config(world, second, tmp_path / "m", weights=(1, -1)))
    moved = tmp_path / "moved"
    shutil.copytree(world.cache, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "dataset_path": "gone"}))
    with pytest.raises(UsageError, match="is not at gone any more: pass --data-path"):
        merge.run(config(world, second, tmp_path / "m", caches=(moved, world.cache)))
    with pytest.raises(UsageError, match="at least two caches"):
        merge.run(MergeConfig((world.cache,), tmp_path / "m"))
    with pytest.raises(UsageError, match=r"is a dataset folder, but a cache folder is needed"):
        merge.run(config(world, second, tmp_path / "m", world.data))
    with pytest.raises(UsageError, match="--force would delete"):
        merge.run(config(world, second, world.cache, force=True))
    assert not (tmp_path / "m").exists() and Cache(world.cache)


def test_entries_made_from_parts_read_back_as_they_were():
    fmt = CacheFormat(100_000, 2, 0.5, 1.0)
    entries = pack_entries(
        torch.tensor([[99_999, 5]]),
        torch.tensor([[0.5, 0.25]]),
        torch.tensor([0.25]),
        torch.tensor([[70_000, 70_000]]),
        torch.tensor([1]),
        torch.zeros(1),
        torch.tensor([-1.5]),
        fmt,
    )
    targets = decode(entries, fmt)
    assert targets.top_k_ids.tolist() == [[99_999, 5]] and targets.tail_ids.tolist() == [[70_000]]
    torch.testing.assert_close(
        targets.top_k_log_probs.exp(), torch.tensor([[0.5, 0.25]]), atol=0.01, rtol=0
    )
