"""Nested tokenizers: every boundary of the teacher is one of the student; pieces laid end to end
are its tokens.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from xinslm.errors import UsageError
from xinslm.tokenizer import BPETokenizer, load_tokenizer, prefix_pieces

TEXT = st.text(st.characters(codec="utf-8"), max_size=80) | st.text("theandio w'n1\n", max_size=120)


@pytest.fixture(scope="module")
def teacher(prose):
    tokenizer = BPETokenizer(vocab_size=1400)
    tokenizer.train(prose)
    return tokenizer


def check_nested(student, teacher, pieces, text):
    theirs, ours = teacher.encode(text), student.encode(text)
    assert [token for t in theirs for token in pieces[t]] == ours

    def ends(tokenizer, ids):
        position, places = 0, set()
        for token in ids:
            position += len(tokenizer.token_bytes(token))
            places.add(position)
        return places

    assert ends(teacher, theirs) <= ends(student, ours)


@pytest.mark.parametrize("size", [260, 300, 700, 1400])
def test_student_refines_teacher(teacher, prose, tricky, size):
    student = BPETokenizer.prefix_of(teacher, size)
    assert student.vocab_size == size
    pieces = prefix_pieces(student, teacher)
    for text in [*prose[:40], *tricky]:
        check_nested(student, teacher, pieces, text)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_any_text(teacher, text):
    student = BPETokenizer.prefix_of(teacher, 500)
    check_nested(student, teacher, prefix_pieces(student, teacher), text)


def test_nested_is_what_training_stopped_earlier_gives(teacher, prose):
    """Greedy learning: the tokenizer of 700 ids is the beginning of that of 1,400."""
    earlier = BPETokenizer(vocab_size=700)
    earlier.train(prose)
    student = BPETokenizer.prefix_of(teacher, 700)
    assert student.merges == earlier.merges and student.fingerprint() == earlier.fingerprint()


def test_special_tokens_map_by_content(teacher):
    student = BPETokenizer.prefix_of(teacher, 300, special_tokens=("<|endoftext|>", "<|new|>"))
    pieces = prefix_pieces(student, teacher)
    assert pieces[teacher.special_tokens["<|endoftext|>"]] == (
        student.special_tokens["<|endoftext|>"],
    )
    assert pieces[teacher.special_tokens["<|im_end|>"]] == ()
    assert (
        student.special_tokens == {"<|endoftext|>": 298, "<|new|>": 299} and student.eos_id == 298
    )


def test_student_has_the_teachers_roles_and_loads_elsewhere(teacher, tmp_path, prose):
    student = BPETokenizer.prefix_of(teacher, 400)
    assert student.eos_id == student.special_tokens["<|endoftext|>"] and student.chat_template
    student.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(prose[3]).ids == [student.bos_id, *student.encode(prose[3])]


def test_added_tokens_stay_because_they_cut_text(teacher, tmp_path):
    """A teacher's non-control added token splits text before merges; a student without it would
    cross the cut.
    """
    teacher.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"].append(
        content["added_tokens"][-1]
        | {"id": content["model"]["vocab"]["ing"], "content": "ing", "special": False}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    cutting = BPETokenizer.load(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "thingings in the ring"
    assert cutting.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    student = BPETokenizer.prefix_of(cutting, 600)
    check_nested(student, cutting, prefix_pieces(student, cutting), text)


@pytest.mark.parametrize("name", ["models/stories5M", "tokenizers/gpt2", "tokenizers/smollm2"])
def test_real_teachers(shared_data, corpora, name):
    teacher = load_tokenizer(shared_data / name)
    student = BPETokenizer.prefix_of(teacher, 2048)
    pieces = prefix_pieces(student, teacher)
    for text in [*corpora["stories"][:200], *corpora["peps"][:5]]:
        check_nested(student, teacher, pieces, text)


@pytest.mark.parametrize("size", [259, 1401])
def test_sizes_that_the_teacher_cannot_give(teacher, size):
    with pytest.raises(UsageError, match="260 to 1,400 ids"):
        BPETokenizer.prefix_of(teacher, size)


def test_sentencepiece_teachers_are_refused(shared_data):
    with pytest.raises(UsageError, match="byte-level BPE"):
        BPETokenizer.prefix_of(load_tokenizer(shared_data / "models/stories260K"), 300)
