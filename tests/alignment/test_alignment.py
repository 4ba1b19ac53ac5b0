"""Pushing distributions between tokenizers: against text that came, against sampling, and over the
whole pipeline.
"""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from other_tokenizers import KINDS, byte_level, characters, metaspace, texts
from xinslm.alignment.bytewise import BytePush
from xinslm.alignment.nested import PushForward
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.entries import Cache
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.losses.config import LossConfig
from xinslm.model.config import ModelConfig
from xinslm.model.files import load_model, save_model
from xinslm.model.transformer import Transformer
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train import run as train

PAIRS = [(a, b) for a in KINDS for b in KINDS if a not in (b, "characters")]


@functools.cache
def push_of(ours: str, theirs: str) -> BytePush:
    return BytePush(KINDS[ours](), KINDS[theirs]())


def came(push: BytePush, document: str, shift: int = 0) -> tuple[int, int, int]:
    """Positions at a shared boundary or inside a teacher token where the table names the token, and
    those it got right, for the teacher's token that came; all positions."""
    student, teacher = push.student, push.teacher
    ids = np.array([student.bos_id, *student.encode(document), student.eos_id])
    aligned = push.align(ids)
    places = np.flatnonzero(aligned.prefixes[: len(ids) - 1 - shift] >= 0)
    rows = torch.zeros(len(places), teacher.vocab_size)
    rows[np.arange(len(places)), aligned.teacher_ids[aligned.rows[places] + 1]] = 1.0
    most, token = push(rows, aligned.prefixes[places]).max(dim=1)
    named = (most > 0.5).numpy()
    right = token.numpy() == ids[places + 1 + shift]
    return int(named.sum()), int((named & right).sum()), len(ids) - 1


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_token_that_came_is_the_one_the_table_names(ours, theirs):
    push = push_of(ours, theirs)
    counts = np.array([came(push, text) for text in texts()[:4]]).sum(axis=0)
    wrong = np.array([came(push, text, shift=1) for text in texts()[:1]]).sum(axis=0)
    assert counts[0] > 0 and counts[1] >= 0.99 * counts[0]
    assert wrong[1] < 0.5 * wrong[0], "tables off by one position would be seen"


def test_awkward_texts_and_bos_on_one_side():
    for ours, theirs in PAIRS:
        push = push_of(ours, theirs)
        for text in ("\r\n\r\nLily said 😀 'hi'\r\n", "  two  spaces", "é e\u0301 中文", "👩‍👩‍👧"):
            named, right, _ = came(push, text)
            assert right >= named - 1, (ours, theirs, text)
            bare = push.align(np.array(push.student.encode(text)))
            full = push.align(np.array([push.student.bos_id, *push.student.encode(text)]))
            assert bare.prefixes.tolist() == full.prefixes[1:].tolist()
            assert bare.teacher_ids.tolist() == full.teacher_ids.tolist()


def test_nested_tokenizers_push_alike_where_bytes_says_anything():
    """An independent way to the same numbers: the exact push-forward of a nested student."""
    teacher = byte_level(400)
    student = BPETokenizer.prefix_of(teacher, 300)
    exact, known = PushForward(student, teacher), BytePush(student, teacher)
    probs = (
        3 * torch.randn(20, teacher.vocab_size, generator=torch.Generator().manual_seed(0))
    ).softmax(1)
    boundary = np.zeros(20, dtype=np.int64)
    a, b = exact(probs, boundary), known(probs, boundary)
    assert known.exact.sum() > 150
    torch.testing.assert_close(b[:, known.exact], a[:, known.exact])
    assert (b[:, ~known.exact] == 0).all() and (b.sum(1) <= 1 + 1e-5).all()


def test_a_table_by_hand():
    """Teacher tokens a, b, ab, c; the student has a, b, c and abc."""
    student, teacher = (
        BPETokenizer(vocab_size=256, special_tokens=()),
        BPETokenizer(vocab_size=256, special_tokens=()),
    )
    for tokenizer, merges in ((teacher, [("a", "b")]), (student, [("b", "c"), ("a", "bc")])):
        vocab = dict(tokenizer.definition.vocab)
        for left, right in merges:
            vocab[left + right] = len(vocab)
        tokenizer._take(replace(tokenizer.definition, vocab=vocab, merges=merges))
    push = BytePush(student, teacher)
    ours, theirs = student.definition.vocab, teacher.definition.vocab
    probs = torch.zeros(1, teacher.vocab_size)
    for token, p in (("a", 0.1), ("b", 0.2), ("ab", 0.3), ("c", 0.4)):
        probs[0, theirs[token]] = p
    pushed = push(probs, np.zeros(1, dtype=np.int64))[0]
    assert pushed[ours["c"]].item() == pytest.approx(0.4)
    # "ab" may go on with c, which makes abc of it; so the whole probability of a, of abc and of b
    # (bc) is not known.
    assert pushed.sum().item() == pytest.approx(0.4)
    assert not push.exact[[ours["a"], ours["abc"], ours["b"], ours["bc"]]].any()


@pytest.fixture(scope="module")
def stories(shared_data):
    teacher = HuggingFaceTeacher(str(shared_data / "models" / "stories260K"))
    student = BPETokenizer(vocab_size=1024)
    lines = (shared_data / "text" / "tinystories_docs.jsonl").read_text().splitlines()
    student.train([json.loads(line)["text"] for line in lines])
    return teacher, student


@pytest.mark.parametrize(
    "begin", ["One day, a girl named Lily went to the", "Tom was sad. He said,", "Once upon a time"]
)
def test_probabilities_are_those_of_sampled_texts(stories, begin):
    """The teacher writes on, the student's tokenizer reads it: how often does which token come?"""
    teacher, student = stories
    push = BytePush(student, teacher.tokenizer)
    context = torch.tensor([[teacher.tokenizer.bos_id, *teacher.tokenizer.encode(begin)]])
    torch.manual_seed(0)
    drawn = 1500
    written = teacher.model.generate(
        context.repeat(drawn, 1), do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=0
    )[:, context.shape[1] :]
    size = len(student.encode(begin))
    counts = np.zeros(student.vocab_size)
    for row in written.tolist():
        ids = student.encode(
            begin + b"".join(map(teacher.tokenizer.token_bytes, row)).decode("utf-8", "replace")
        )
        if b"".join(map(student.token_bytes, ids[:size])) == begin.encode():
            counts[ids[size]] += 1
    assert counts.sum() > 0.98 * drawn, "the student has a boundary there, too"
    with torch.no_grad():
        probs = teacher.logits(teacher.states([context[0].numpy()]))[-1:].softmax(1)
    pushed = push(probs, np.zeros(1, dtype=np.int64))[0].numpy()
    share = counts / counts.sum()
    error = 4 * np.sqrt(np.maximum(pushed, share) / drawn) + 0.004
    assert (np.abs(pushed - share)[push.exact] < error[push.exact]).all()
    assert abs(pushed.sum() - share[push.exact].sum()) < 0.06
    # Tokens by the way the teacher spells them: of the 12 most frequent that the table leaves open.
    checked = 0
    for token in np.argsort(-np.where(push.exact, 0, share))[:12]:
        spelled = student.token_bytes(int(token)).decode()
        path = teacher.tokenizer.encode(begin + spelled)
        if path[: context.shape[1] - 1] != context[0, 1:].tolist():
            continue
        whole = np.array([teacher.tokenizer.bos_id, *path])
        with torch.no_grad():
            log_p = teacher.logits(teacher.states([whole])).log_softmax(1)
        steps = torch.arange(context.shape[1] - 1, len(whole) - 1)
        along = log_p[steps, torch.from_numpy(whole)[steps + 1]].sum().exp().item()
        stay = push.stay(log_p[-1:].exp(), np.array([token]))[0].item()
        if np.isfinite(stay):
            checked += 1
            assert abs(along * stay - share[token]) < 4 * np.sqrt(share[token] / drawn) + 0.02, (
                spelled
            )
    assert checked >= 2


def dataset(world, folder, tokenizer):
    tokenizer.save(folder / "tokenizer")
    data = folder / "data"
    prepare.run(
        PrepareConfig(
            data_path=(str(world.text),), tokenizer_path=folder / "tokenizer", output_dir=data
        )
    )
    return data


def cached(world, data, folder, **changes):
    settings = {
        "max_seq_length": 64,
        "shard_positions": 3000,
        "batch_tokens": 512,
        "device": "cpu",
        **changes,
    }
    return score.run(
        CacheConfig(settings.pop("teacher", str(world.teacher)), data, folder, **settings)
    )


@pytest.fixture(scope="module")
def other(world, tmp_path_factory):
    """A dataset whose tokenizer is neither the teacher's nor nested in it, and its cache by
    bytes.
    """
    folder = tmp_path_factory.mktemp("other")
    data = dataset(world, folder, metaspace(300))
    result = cached(world, data, folder / "bytes", alignment="bytes")
    return data, folder / "bytes", result


def test_cache_by_bytes_holds_what_a_direct_computation_says(world, other):
    data, folder, result = other
    cache = Cache(folder)
    assert cache.manifest["alignment"]["kind"] == "bytes" and result.share > 0.8
    assert "alignment   bytes;" in result.describe()
    student, teacher = load_tokenizer(data / "tokenizer"), load_tokenizer(world.teacher)
    push, model = BytePush(student, teacher), load_model(world.teacher)
    split, records = open_dataset(data).split("train"), cache.split("train")
    checked = paths = 0
    for document in (1, 4):
        start, end = (int(x) for x in split.documents[document : document + 2])
        ids = np.asarray(split.tokens[start:end]).astype(np.int64)
        aligned = push.align(ids)
        with torch.no_grad():
            probs = model.logits(model.hidden(torch.from_numpy(aligned.teacher_ids)[None, :64]))[
                0
            ].softmax(1)
        for place in np.flatnonzero((aligned.prefixes >= 0) & (aligned.rows < 60)):
            row, label = int(aligned.rows[place]), int(ids[place + 1])
            expected = push(probs[row : row + 1], aligned.prefixes[place : place + 1])[0]
            stop = int(aligned.path_ends[place])
            if (
                stop >= 0
                and aligned.prefixes[place] == 0
                and not push.exact[label]
                and stop - 1 < 60
            ):
                along = np.prod(
                    [probs[r, aligned.teacher_ids[r + 1]].item() for r in range(row, stop - 1)]
                )
                stay = push.stay(probs[stop - 1 : stop], np.array([label]))[0].item()
                if np.isfinite(stay):
                    expected[label] = along * stay
                    paths += 1
            targets = records.targets(np.array([start + place]))
            found = targets.head_log_probs.exp()[0]
            enough = expected[targets.head_ids[0]] > 1e-3
            torch.testing.assert_close(
                found[enough], expected[targets.head_ids[0]][enough], atol=0.02, rtol=0.06
            )
            assert targets.has_draws.item() == (1 - expected.sum().item() < 1e-5)
            checked += 1
    assert checked > 60 and paths > 10


def test_students_learn_from_another_tokenizers_teacher(world, other, tmp_path):
    data, folder, _ = other
    config = DistillConfig(
        data_path=data,
        output_dir=tmp_path / "run",
        cache=folder,
        max_steps=40,
        learning_rate=5e-3,
        validate_every=20,
        loss=LossConfig(alpha=0.2, beta=0.8),
        **world.settings,
    )
    result = train.run(config)
    assert result.validation is not None and result.validation.ce < 0.9 * np.log(556)


@pytest.mark.parametrize("wish", ["same", "nested"])
def test_ways_that_do_not_lead_are_refused_with_reasons(world, other, tmp_path, wish):
    data, _, _ = other
    with pytest.raises(
        UsageError, match=r"(?s)no way leads .*same: the tokenizers differ.*--prefix-of"
    ) as caught:
        cached(world, data, tmp_path / "c", alignment=wish)
    assert ("nested: the dataset's tokenizer is not a merge prefix" in str(caught.value)) == (
        wish == "nested"
    )
    assert not (tmp_path / "c").exists()


def test_auto_takes_the_first_way_that_leads(world, tmp_path):
    nested = dataset(world, tmp_path, BPETokenizer.prefix_of(load_tokenizer(world.teacher), 300))
    assert cached(world, nested, tmp_path / "nested").alignment == "nested"
    assert cached(world, nested, tmp_path / "bytes", alignment="bytes").alignment == "bytes"
    assert Cache(world.cache).manifest["alignment"]["kind"] == "same"


def test_teachers_of_characters_know_the_tokens_of_their_text(world, tmp_path):
    save_model(
        Transformer(ModelConfig(characters().vocab_size, 32, 64, 1, 2, 2, 16)), tmp_path / "teacher"
    )
    characters().save(tmp_path / "teacher")
    result = cached(
        world, world.data, tmp_path / "c", teacher=str(tmp_path / "teacher"), alignment="bytes"
    )
    assert result.alignment == "bytes" and result.share > 0.9
    result = cached(world, world.data, tmp_path / "p", teacher=str(tmp_path / "teacher"))
    assert result.alignment == "prefixes" and result.share > 0.9, "what auto takes"


def test_shards_and_batches_change_nothing(world, other, tmp_path):
    data, folder, _ = other
    cached(world, data, tmp_path / "c", shard_positions=10**6, batch_tokens=128, alignment="bytes")
    a, b = Cache(folder).split("train"), Cache(tmp_path / "c").split("train")
    positions = np.arange(1500)
    torch.testing.assert_close(
        a.targets(positions).log_tail, b.targets(positions).log_tail, atol=2e-3, rtol=1e-3
    )
    assert (a.targets(positions).valid == b.targets(positions).valid).all()
