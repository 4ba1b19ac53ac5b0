"""Buckets of tokens that begin alike: counted cuts and the chain rule by brute force, the cache,
and training.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import training as train
from other_tokenizers import (
    KINDS,
    byte_level,
    cache_of_another_tokenizer,
    characters,
    metaspace,
    texts,
)
from xinslm.alignment.byte_prefix import BytePrefixAligner, byte_order
from xinslm.alignment.choose import choose_alignment
from xinslm.alignment.spans import ByteReader
from xinslm.cache import score
from xinslm.cache.bucket_entries import (
    ONWARD,
    bucket_dtype,
    bucket_entries,
    decode_buckets,
)
from xinslm.cache.entries import VALID
from xinslm.cache.folder import Cache
from xinslm.cache.kinds import kind_of
from xinslm.data.dataset import open_dataset
from xinslm.distill.config import DistillConfig
from xinslm.doctor import run as doctor
from xinslm.doctor.config import DoctorConfig
from xinslm.errors import UsageError, XinslmError
from xinslm.losses import fused_loss
from xinslm.losses.config import LossConfig
from xinslm.model.files import load_model
from xinslm.teachers.open import open_teacher
from xinslm.teachers.own import OwnTeacher
from xinslm.tokenizer.hf import HFTokenizer
from xinslm.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def grouped(world, tmp_path_factory):
    return cache_of_another_tokenizer(world, tmp_path_factory.mktemp("byte_prefix"), "byte_prefix")


def stored(folder):
    return np.concatenate(kind_of(Cache(folder)).splits()["train"].fixed_parts)


def predicted(tops, probs, label_probs):
    """Predictions as the aligner takes them, in float64."""
    dtype = [("top_ids", "i8", tops.shape[1:]), ("top_probs", "f8", tops.shape[1:])]
    found = np.zeros(len(tops), [*dtype, ("label_prob", "f8")])
    found["top_ids"], found["top_probs"], found["label_prob"] = tops, probs, label_probs
    return found


def documents(tokenizer, count=40):
    return [np.array(tokenizer.encode(text)) for text in texts()[:count]]


def test_ranges_hold_what_begins_alike_and_shares_are_counted():
    student = byte_level(400)
    sample = documents(student)
    aligner = BytePrefixAligner(student, characters(), "eos", sample)
    spelled = [student.token_bytes(int(i)) for i in aligner.order]
    control = set(student.special_tokens.values())
    assert sorted(aligner.order.tolist()) == list(range(student.vocab_size))
    assert (aligner.order == byte_order(student)).all()
    beginnings = {piece[:size] for piece in spelled for size in range(1, len(piece) + 1)}
    for x in sorted(beginnings)[::7]:
        begin, end = aligner.range_of(x)
        inside = {int(i) for i in aligner.order[begin:end]}
        assert inside == {
            i
            for i in range(student.vocab_size)
            if i not in control and student.token_bytes(i).startswith(x)
        }
    counted: dict[bytes, list[int]] = {}
    for ids in sample:
        pieces = [student.token_bytes(int(i)) for i in ids]
        text, at = b"".join(pieces), 0
        for piece in pieces:
            for size in range(1, 8):
                if at + size <= len(text):
                    counted.setdefault(text[at : at + size], []).append(len(piece))
            at += len(piece)
    checked = 0
    for x, lengths in counted.items():
        shares = aligner.shares(x)
        assert sum(share for _, _, share in shares) == pytest.approx(1)
        if len(lengths) < 30 or x not in beginnings:
            continue
        for size, _, share in shares:
            true = np.mean(
                [length >= len(x) if size == len(x) else length == size for length in lengths]
            )
            assert share == pytest.approx(true, abs=0.03)
            checked += 1
    assert checked > 50


def test_cuts_that_never_come_have_next_to_no_mass():
    """Behind the student's " th" no "e" follows: it would have been " the"."""
    student = byte_level(400)
    aligner = BytePrefixAligner(student, characters(), "eos", documents(student))
    assert {b" th", b" the"} <= {student.token_bytes(i) for i in range(400)}
    assert aligner.cut_share(b" th", b"e") < 0.05 < 0.9 < aligner.cut_share(b" the", b" ")
    ids = np.array([student.bos_id, *student.encode("x thy")])
    pair = aligner.align(ids)
    theirs = characters()
    at = int(np.flatnonzero(pair.teacher_ids == theirs.encode("y")[-1])[0])
    tops = np.zeros((len(pair.teacher_ids), 2), dtype=np.int64)
    tops[at] = theirs.encode("e")[-1], theirs.encode("y")[-1]
    probs = np.full((len(pair.teacher_ids), 2), 0.0)
    probs[at] = 0.5, 0.4
    own = np.full(len(pair.teacher_ids), 0.4)
    said, _ = aligner.buckets(ids, pair, predicted(tops, probs, own))
    masses = {
        student.token_bytes(int(aligner.order[begin]))[:1]: p
        for begin, _, level, _, p in said[-1]
        if level == 0
    }
    assert [student.token_bytes(int(i)) for i in ids[-2:]] == [b" th", b"y"]
    assert masses.get(b"e", 0.0) < 0.1 < 0.6 < masses[b"y"]


def said_of(aligner, ids, seed, sharpness):
    """Buckets for random teacher probabilities, sharp enough that some are 0 in float32."""
    pair = aligner.align(ids)
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(
        rng.normal(size=(len(pair.teacher_ids), aligner.teacher.tokenizer.vocab_size))
    )
    full = torch.softmax(sharpness * logits.float(), dim=1).numpy()
    tops = np.argsort(-full, axis=1)[:, :32]
    own = full[np.arange(len(full)), pair.teacher_ids].astype(np.float64)
    own[0] = np.nan
    return aligner.buckets(ids, pair, predicted(tops, np.take_along_axis(full, tops, 1), own))


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_any_two_tokenizers_give_valid_entries(student, teacher):
    student, teacher = KINDS[student](), KINDS[teacher]()
    text = f"{texts()[0][:160]}  <s> naïve 😀 東京\n\n  the end"
    ids = np.array([student.bos_id, *student.encode(text), student.eos_id])
    aligner = BytePrefixAligner(student, teacher, "eos", documents(student, 8))
    place = np.argsort(aligner.order)
    for seed, sharpness in enumerate((1.0, 8.0, 40.0)):
        said, _ = said_of(aligner, ids, seed, sharpness)
        assert sum(map(bool, said)) > len(ids) / 4
        for most in (2, 20):
            entries = bucket_entries(
                said, np.zeros(len(said)), np.ones(len(said)), bucket_dtype(len(place), most)
            )
            found = decode_buckets(entries, torch.from_numpy(aligner.order))
            for row, label in enumerate(ids[1:]):
                used = [
                    (int(b), int(e), int(x), bool(on))
                    for b, e, x, on in zip(
                        found.begins[row],
                        found.ends[row],
                        found.levels[row],
                        found.onward[row],
                        strict=True,
                    )
                    if e > b
                ]
                assert len({(b, e) for b, e, *_ in used}) == len(used)
                ways = sorted((x, b, e) for b, e, x, on in used if on)
                assert [x for x, *_ in ways] == list(range(len(ways))), (
                    "the way to each level is there"
                )
                assert all(b <= place[label] < e for _, b, e in ways)
                for begin, end, level, _ in used:
                    assert all(b <= begin and end <= e for x, b, e in ways if x < level)
            hidden = torch.randn(len(ids), 8, dtype=torch.float64, requires_grad=True)
            weight = torch.randn(len(place) + 3, 8, dtype=torch.float64)  # a padded vocabulary
            loss, _ = fused_loss(hidden, weight, torch.from_numpy(ids.clip(0)), found, LossConfig())
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_a_teachers_unknown_token_has_no_mass():
    student, teacher = byte_level(400), characters()
    aligner = BytePrefixAligner(student, teacher, "eos", documents(student, 8))
    ids = np.array([student.bos_id, *student.encode("the cat")])
    pair = aligner.align(ids)
    unknown = teacher.special_tokens["<unk>"]
    tops, probs = (
        np.full((len(pair.teacher_ids), 1), unknown),
        np.full((len(pair.teacher_ids), 1), 0.6),
    )
    said, _ = aligner.buckets(
        ids, pair, predicted(tops, probs, np.full(len(pair.teacher_ids), 0.4))
    )
    pads = int(np.argsort(aligner.order)[student.pad_id])
    assert all(bucket[0] != pads for buckets in said for bucket in buckets)


def test_text_that_the_teacher_rewrites_is_not_taught():
    """A teacher that lowers capitals does not speak of the student's " The"."""
    content = ByteReader(metaspace(300)).definition
    content["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    teacher = HFTokenizer(
        content, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}, None, "made"
    )
    student = byte_level(400)
    aligner = BytePrefixAligner(student, teacher, "eos", documents(student, 8))
    for text, uncovered in (("and The cat", True), ("and the cat", False)):
        ids = np.array([student.bos_id, *student.encode(text)])
        said, _ = said_of(aligner, ids, 0, 1.0)
        at = next(
            i
            for i, token in enumerate(ids.tolist())
            if student.token_bytes(token).lower().startswith(b" t")
        )
        assert not uncovered or said[at - 1] == []
        labels = [int(np.argsort(aligner.order)[token]) for token in ids[1:]]
        for buckets, label in zip(said, labels, strict=True):
            assert all(begin <= label < end for begin, end, _, onward, _ in buckets if onward)


def test_a_student_of_characters_is_taught_the_teachers_own_distribution():
    student = teacher = characters()
    aligner = BytePrefixAligner(student, teacher, "eos")
    rng = np.random.default_rng(0)
    ids = np.array([student.bos_id, *student.encode("the cat sat")])
    pair = aligner.align(ids)
    count = len(pair.teacher_ids)
    full = rng.dirichlet(np.full(teacher.vocab_size, 0.05), count)
    tops = np.argsort(-full, axis=1)
    own = full[np.arange(count), pair.teacher_ids]
    own[0] = np.nan
    said, label_log_probs = aligner.buckets(
        ids, pair, predicted(tops, np.take_along_axis(full, tops, 1), own)
    )
    place, control = np.argsort(aligner.order), set(teacher.special_tokens.values())
    assert not said[0]  # the space that the tokenizer puts in front has no place in the text
    for at, buckets in list(enumerate(said))[1:]:
        assert buckets and label_log_probs[at] == pytest.approx(np.log(own[at + 1]), abs=1e-9)
        usual = [
            i for i in range(teacher.vocab_size) if i not in control and teacher.token_bytes(i)
        ]
        for begin, end, level, onward, p in buckets:
            assert (level, onward, end - begin) == (0, False, 1)
            token = int(aligner.order[begin])
            if token in usual:
                assert p == pytest.approx(
                    full[at + 1, token] / full[at + 1].sum(), rel=0.02, abs=2e-3
                )
        assert place[ids[at + 1]] in [bucket[0] for bucket in buckets]


def test_groups_of_a_position_are_apart_or_nested_and_shares_sum_to_one(grouped):
    data, folder, result, _ = grouped
    assert (
        result.alignment == "byte_prefix"
        and result.share > 0.9
        and "byte_prefix" in result.describe()
    )
    entries = stored(folder)
    valid = entries[(entries["flags"] & VALID) != 0]
    assert result.stream_bytes / result.stored == entries.itemsize == 3 + 20 * 6
    labels = np.append(np.asarray(open_dataset(data).split("train").tokens)[1:], 0)[
        (entries["flags"] & VALID) != 0
    ]
    place = np.argsort(byte_order(load_tokenizer(data / "tokenizer")))
    levels = 0
    for row, label in zip(valid[:400], labels[:400], strict=True):
        used = [
            (int(b), int(e), int(x) & ~ONWARD, bool(x & ONWARD))
            for b, e, x in zip(row["begins"], row["ends"], row["levels"], strict=True)
            if e > b
        ]
        assert len({(b, e) for b, e, *_ in used}) == len(used)
        for (a, b, *_), (c, d, *_) in ((x, y) for x in used for y in used if x < y):
            assert b <= c or d <= a or (a <= c and d <= b) or (c <= a and b <= d)
        for begin, end, level, onward in used:
            if onward:  # the text goes on inside
                assert begin <= place[label] < end
                assert all(begin <= b and e <= end for b, e, other, _ in used if other > level)
        levels += max(level for *_, level, _ in used)
    assert levels > 40
    targets = decode_buckets(valid, torch.arange(300))
    for level in range(3):
        assert ((targets.probs * (targets.levels == level)).sum(1) <= 1.0001).all()


def test_bytes_of_a_token_have_the_models_likelihood(world, grouped):
    """log p of the text, where teacher tokens spell a student token whole, from the model
    itself.
    """
    data, folder, _, _ = grouped
    model = load_model(world.teacher)
    aligner = choose_alignment(open_dataset(data), open_teacher(str(world.teacher)), "byte_prefix")
    split = open_dataset(data).split("train")
    entries = stored(folder)
    start, end = (int(x) for x in split.documents[:2])
    pair = aligner.align(np.asarray(split.tokens[start:end]).astype(np.int64))
    theirs = pair.teacher_ids[:65]
    with torch.no_grad():
        log_p = model.logits(model.hidden(torch.from_numpy(theirs[:64])[None]))[0].log_softmax(1)
    own = np.append(np.nan, log_p[np.arange(64), theirs[1:65]].numpy())
    checked = 0
    for token, (a, b) in enumerate(pairwise(pair.student_starts.tolist())):
        first, behind = np.searchsorted(pair.teacher_starts, (a, b))
        if (
            token
            and behind < 60
            and (pair.teacher_starts[[first, behind]] == (a, b)).all()
            and entries["flags"][token - 1]
        ):
            assert float(entries["log_label"][token - 1]) == pytest.approx(
                own[first:behind].sum(), rel=2e-3, abs=2e-3
            )
            checked += 1
    assert checked > 10


def test_entries_keep_what_levels_need_and_the_most_likely():
    buckets = [(i, i + 1, 0, False, 0.01 * i) for i in range(1, 9)] + [
        (20, 30, 0, True, 0.001),
        (20, 21, 1, False, 0.5),
    ]
    entries = bucket_entries(
        [buckets, [], buckets],
        np.array([-1.0, np.nan, np.nan]),
        np.array([1, 1, 0]),
        bucket_dtype(300, 4),
    )
    assert entries["flags"].tolist() == [VALID, 0, 0, 0]
    found = decode_buckets(entries[:1], torch.arange(300))
    assert found.begins[0].tolist() == [20, 20, 8, 7] and found.onward[0].tolist() == [
        True,
        False,
        False,
        False,
    ]
    np.testing.assert_allclose(found.probs[0], [0.001, 0.5, 0.08, 0.07], rtol=0.06)
    wide = bucket_entries([buckets], np.array([0.0]), np.array([1]), bucket_dtype(100_000, 4))
    assert (
        wide["begins"].dtype == np.uint32
        and decode_buckets(wide[:1], torch.arange(9)).ends[0, 0] == 30
    )


def test_training_takes_them_and_other_uses_are_refused(world, grouped, tmp_path):
    data, folder, _, _ = grouped
    settings = {**world.settings, "max_steps": 20, "learning_rate": 5e-3, "eval_steps": 10}
    result = train.run(
        DistillConfig(data_path=data, output_dir=tmp_path / "run", cache=folder, **settings)
    )
    assert (
        result.validation is not None
        and result.validation.kd is not None
        and np.isfinite(result.validation.kd)
    )
    with pytest.raises(UsageError, match=r"loss\.temperature is 2.*set it to 1"):
        loss = LossConfig(temperature=2.0)
        train.run(
            DistillConfig(
                data_path=data, output_dir=tmp_path / "hot", cache=folder, loss=loss, **settings
            )
        )
    with pytest.raises(UsageError, match="masses of buckets of tokens"):
        Cache(folder).split("train")


def test_shards_are_made_again_alike(grouped, tmp_path):
    _, folder, _, config = grouped
    score.run(replace(config, output_dir=tmp_path / "c", shard_positions=10**6, batch_tokens=200))
    once, again = (stored(f) for f in (folder, tmp_path / "c"))
    assert (once["flags"] == again["flags"]).all()
    # rounding orders what is equally likely
    assert (once["begins"][:, 0] == again["begins"][:, 0]).mean() > 0.99


def test_doctor_knows_the_teacher_of_such_a_cache(world, grouped):
    data, folder, _, _ = grouped
    result = doctor.run(
        DoctorConfig(data_path=data, cache=folder, teacher=str(world.teacher), device="cpu")
    )
    status = {check.name: check.status for check in result.checks}
    assert (
        not result.failed
        and status["teacher vocabulary"] == status["teacher of this cache"] == "ok"
    )
    assert status["entries"] == status["teacher agreement"] == "skipped"


def test_a_teacher_that_is_not_finite_is_named_and_what_is_done_is_kept(
    grouped, tmp_path, monkeypatch
):
    _, _, _, config = grouped
    real, calls = OwnTeacher.logits, []

    def broken(self, states):
        calls.append(1)
        return real(self, states) * (torch.nan if len(calls) > 20 else 1.0)

    settings = replace(config, output_dir=tmp_path / "c", shard_positions=300)
    monkeypatch.setattr(OwnTeacher, "logits", broken)
    with pytest.raises(
        XinslmError, match=r"the probability of a token is not finite.*finished work is kept"
    ):
        score.run(settings)
    kept = len(list((tmp_path / "c").glob("*/*.bin")))
    assert kept > 0 and not (tmp_path / "c" / "manifest.json").exists()
    monkeypatch.setattr(OwnTeacher, "logits", real)
    assert score.run(settings).positions > 0
