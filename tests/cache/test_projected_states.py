"""Projected hidden states: the projection, their bytes, the array in a cache, and what is
refused.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.cache.projected_states import (
    CachedHiddenStates,
    HiddenStateFormat,
    decode_projected_states,
    encode_projected_states,
    project_states,
    projection_matrix,
    rms_normalise,
)
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.distill.target_sources import LiveTargets
from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file
from xinslm.model.files import open_model
from xinslm.teachers.huggingface import HuggingFaceTeacher

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def with_hidden_states(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_hidden_states") / "cache"
    settings = {"max_seq_length": 64, "shard_positions": 3000, "batch_tokens": 512, "device": "cpu"}
    result = score.run(
        CacheConfig(
            str(world.teacher), world.data, folder, hidden_state_depths=(0.5, 1.0), **settings
        )
    )
    split = open_dataset(world.data)
    targets = sum(int(split.split(name).mask.sum()) for name in ("train", "validation"))
    assert (result.hidden_state_positions, result.hidden_state_bytes) == (targets, 2 * 66)
    assert f"hidden      states of {targets:,} positions; 132 bytes each" in result.describe()
    return folder


def test_projection_keeps_lengths_on_average_and_is_always_the_same():
    x = draw(200, 96)
    ratios = []
    for width in range(40, 80):  # each width draws anew
        y = x @ projection_matrix(width, 96).t()
        ratios.append(float((y.pow(2).sum(1) / x.pow(2).sum(1)).mean()))
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)
    assert torch.equal(projection_matrix(64, 96), projection_matrix.__wrapped__(64, 96))
    assert projection_matrix(64, 96).flatten()[:3].tolist() == pytest.approx(
        [0.0952991, -0.0001619, 0.0316069], abs=1e-6
    )


def test_a_projection_forgets_the_length_of_a_state():
    fmt = HiddenStateFormat((1, 2), 2, 96)
    x = draw(10, 96)
    torch.testing.assert_close(
        project_states([x, 100 * x], fmt)[0], project_states([x, 100 * x], fmt)[1]
    )
    torch.testing.assert_close(
        project_states([x, x], fmt)[0], rms_normalise(x) @ projection_matrix(64, 96).t()
    )


def test_a_position_has_66_bytes_a_depth_and_an_error_of_half_its_scale():
    fmt = HiddenStateFormat((2, 4, 6), 6, 96)
    assert fmt.dtype.itemsize == 3 * 66
    x = draw(3, 500, 64) * torch.logspace(-2, 2, 500)[None, :, None]
    found, valid = decode_projected_states(encode_projected_states(x, fmt))
    assert bool(valid.all()) and found.shape == x.shape
    bound = x.abs().amax(2, keepdim=True) / 127 * (0.5 + 0.07)  # the scale itself is fp16
    assert bool(((found - x).abs() <= bound).all())
    relative = (found - x).norm(dim=2) / x.norm(dim=2)
    assert float(relative.max()) < 0.02
    assert float((found - x).abs().max()) > 0, "8 bits cannot be exact"


def test_positions_without_projected_states_and_states_that_are_not_finite():
    fmt = HiddenStateFormat((1,), 1, 8, 4)
    _, valid = decode_projected_states(np.zeros(3, dtype=fmt.dtype))
    assert not bool(valid.any())
    with pytest.raises(FloatingPointError, match="not finite"):
        encode_projected_states(torch.tensor([[[1.0, float("nan"), 0, 0]]]), fmt)


def test_depths_of_a_format_are_shares_of_the_layers():
    fmt = HiddenStateFormat.of((0.5, 0.55, 1.0), 10, 96)
    assert fmt.depths == (5, 6, 10)
    assert [fmt.column(share, "x") for share in (0.5, 0.6, 1.0)] == [0, 1, 2]
    assert HiddenStateFormat.of((0.41, 0.5), 2, 96).depths == (1,)
    with pytest.raises(
        UsageError,
        match=r"cache c has no projected hidden states of relative depth 0.25 \(block 3 of 10\), "
        r"only of 0.5",
    ):
        fmt.column(0.25, "cache c")


def test_cached_projected_states_are_the_live_ones_and_both_those_of_transformers(
    world, with_hidden_states
):
    from transformers import AutoModelForCausalLM

    rows = PackedDataset(open_dataset(world.data).split("train"), 64)
    batch = rows.batch([0, 3, 11])
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    live = LiveTargets(HuggingFaceTeacher(open_model(world.teacher)), (0.5, 1.0))
    cached = CachedHiddenStates(Cache(with_hidden_states), "train")
    assert cached.format == live.format == HiddenStateFormat((1, 2), 2, 48)
    (a, all_valid), (b, valid) = (
        live.projected_states(batch, chosen, CPU),
        cached.projected_states(batch, chosen, CPU),
    )
    assert bool(all_valid.all()) and bool(valid.all())
    assert bool(((a - b).abs() <= a.abs().amax(2, keepdim=True) / 127 * 0.6 + 1e-4).all())
    reference = AutoModelForCausalLM.from_pretrained(world.teacher).eval()
    for index in range(0, len(chosen), 23):
        row, column = divmod(int(chosen[index]), 64)
        start = column - batch.positions[row, column]
        ids = torch.from_numpy(batch.input_ids[row, start : column + 1])[None]
        with torch.no_grad():
            out = reference(ids, output_hidden_states=True)
        expected = rms_normalise(out.hidden_states[1][0, -1]) @ projection_matrix(64, 48).t()
        torch.testing.assert_close(a[0, index], expected, atol=1e-4, rtol=1e-4)
        # transformers' last entry is behind the final norm: the same direction once its weights are
        # divided out.
        last = (
            rms_normalise(out.hidden_states[2][0, -1] / reference.model.norm.weight)
            @ projection_matrix(64, 48).t()
        )
        torch.testing.assert_close(a[1, index], last, atol=1e-3, rtol=1e-3)


def test_one_forward_pass_of_a_live_teacher_serves_states_and_logits(world, monkeypatch):
    teacher = HuggingFaceTeacher(open_model(world.teacher))
    rows = PackedDataset(open_dataset(world.data).split("train"), 64)
    batch, other = rows.batch([0, 3]), rows.batch([1, 2])
    chosen, calls = np.flatnonzero(batch.labels.ravel() >= 0), []
    expected = LiveTargets(teacher).targets(batch, chosen, CPU).logits(slice(0, 9))
    real = teacher.states
    monkeypatch.setattr(teacher, "states", lambda sequences: calls.append(1) or real(sequences))
    live = LiveTargets(teacher, (1.0,))
    live.projected_states(batch, chosen, CPU)
    torch.testing.assert_close(live.targets(batch, chosen, CPU).logits(slice(0, 9)), expected)
    assert len(calls) == 1
    live.projected_states(batch, chosen, CPU)
    there = np.flatnonzero(other.labels.ravel() >= 0)
    found = live.targets(other, there, CPU).logits(slice(0, 9))
    torch.testing.assert_close(
        found, LiveTargets(teacher).targets(other, there, CPU).logits(slice(0, 9))
    )


def test_entries_do_not_change_where_projected_states_are_kept(world, with_hidden_states):
    for path in world.cache.glob("*/*.bin"):
        assert sha256_file(path) == sha256_file(with_hidden_states / path.relative_to(world.cache))


def test_positions_inside_a_nested_teachers_token_have_no_projected_state(world, tmp_path):
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig
    from xinslm.tokenizer.bpe import BPETokenizer
    from xinslm.tokenizer.load import load_tokenizer

    teacher = load_tokenizer(world.teacher)
    student = BPETokenizer.prefix_of(teacher, 300)
    student.save(tmp_path / "tokenizer")
    data = tmp_path / "nested"
    prepare.run(
        PrepareConfig(
            data_path=(str(world.text),), tokenizer_path=tmp_path / "tokenizer", output_dir=data
        )
    )
    folder = tmp_path / "c"
    score.run(
        CacheConfig(
            str(world.teacher),
            data,
            folder,
            max_seq_length=64,
            hidden_state_depths=(1.0,),
            device="cpu",
        )
    )
    split, source = open_dataset(data).split("train"), CachedHiddenStates(Cache(folder), "train")
    model = HuggingFaceTeacher(open_model(world.teacher))
    inside = 0
    for document in (1, 4):
        start, end = (int(x) for x in split.documents[document : document + 2])
        ids = split.tokens[start:end].astype(int).tolist()
        text = student.decode(ids[1:-1])
        theirs = [
            teacher.bos_id if teacher.bos_id is not None else teacher.eos_id,
            *teacher.encode(text),
        ][:64]
        ends = {len(teacher.decode(theirs[1 : n + 1]).encode()): n for n in range(len(theirs))}
        _, (states,) = model.states_and_hidden([np.array(theirs)], (2,))
        expected = project_states([states], source.format)[0]
        at = 0
        for place, token in enumerate(ids[:40]):
            at += len(student.token_bytes(token)) if place else 0
            entries = source.fixed_parts[0][start + place]
            assert (float(entries["scales"][0]) > 0) == (at in ends)
            if at in ends:
                found = decode_projected_states(
                    source.fixed_parts[0][start + place : start + place + 1]
                )[0][0, 0]
                assert float((found - expected[ends[at]]).abs().max()) < 0.05
            inside += at not in ends
    assert inside > 5


def copy(with_hidden_states, tmp_path):
    return shutil.copytree(with_hidden_states, tmp_path / "copy")


def test_damaged_and_missing_projected_states_are_refused(world, with_hidden_states, tmp_path):
    with pytest.raises(UsageError, match=r"has no projected hidden states.*--hidden-state-depths"):
        CachedHiddenStates(Cache(world.cache), "train")
    folder = copy(with_hidden_states, tmp_path)
    array = folder / "train" / "00000.hidden_states.bin"
    whole = array.read_bytes()
    array.write_bytes(whole[:-132])
    with pytest.raises(XinslmError, match="damaged or half-copied"):
        Cache(folder)
    array.unlink()
    with pytest.raises(XinslmError, match="is missing"):
        Cache(folder)
    array.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "hidden_states": {**manifest["hidden_states"], "width": 32}})
    )
    with pytest.raises(XinslmError, match="entries of 68 bytes"):
        CachedHiddenStates(Cache(folder), "train")
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "hidden_states": {"depths": [1]}})
    )
    with pytest.raises(XinslmError, match="'hidden_states' in its manifest is damaged"):
        CachedHiddenStates(Cache(folder), "train")


def test_interrupted_cache_with_projected_states_continues_to_the_same_bytes(
    world, with_hidden_states, tmp_path
):
    folder = tmp_path / "c"
    settings = {"max_seq_length": 64, "shard_positions": 3000, "batch_tokens": 512, "device": "cpu"}
    config = CacheConfig(
        str(world.teacher), world.data, folder, hidden_state_depths=(0.5, 1.0), **settings
    )

    def stop(progress):
        if (folder / "train" / "00001.hidden_states.bin").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.run(config, stop)
    (folder / "train" / "00001.hidden_states.bin").unlink()  # killed between the files of one shard
    score.run(config)
    for path in with_hidden_states.glob("*/*.bin"):
        assert sha256_file(path) == sha256_file(folder / path.relative_to(with_hidden_states))
