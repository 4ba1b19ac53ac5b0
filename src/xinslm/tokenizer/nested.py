"""Nested tokenizers: the student's vocabulary is the teacher's first merges (merge-prefix
vocabulary).

Merges apply in the order of their rank, so the student's tokens are the teacher's state before its
later merges. Every token boundary of the teacher is one of the student, and each teacher token is a
fixed sequence of student tokens in any context. A table therefore converts a teacher's distribution
to one over student tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xinslm.errors import UsageError
from xinslm.tokenizer.alphabet import ALPHABET
from xinslm.tokenizer.chat import with_start
from xinslm.tokenizer.files import Definition, default_names, default_template
from xinslm.tokenizer.start import start_processor

if TYPE_CHECKING:
    from xinslm.tokenizer.bpe import BPETokenizer


def prefix_definition(
    teacher: Any, vocab_size: int, special_tokens: Sequence[str] | None
) -> Definition:
    """Cut a teacher's vocabulary down to `vocab_size` ids; the special tokens are the last.

    `special_tokens` selects from the teacher's and may add new ones; None keeps all of the
    teacher's.
    """
    source = getattr(teacher, "definition", None)
    if not isinstance(source, Definition):
        raise UsageError(
            f"cannot nest a tokenizer in a {type(teacher).__name__}: the teacher must have a "
            "byte-level BPE with a known split rule (LLaMA-3, GPT-2, Qwen2). Train a tokenizer, "
            "or let the student keep the teacher's"
        )
    special = list(source.special_tokens) if special_tokens is None else list(special_tokens)
    # The teacher splits text at added tokens before any merge: a student without them would cross
    # its boundaries.
    vocab, merges = _first_merges(source, vocab_size, len(special) + len(source.added_tokens))
    added: dict[str, int] = {}
    first = len(vocab)
    # an added token that merges also produce keeps that id, as in Hugging Face
    for content in source.added_tokens:
        added[content] = vocab.get(content, first)
        first += content not in vocab
    kept = {name: content for name, content in source.named_tokens.items() if content in special}
    ids = {content: first + index for index, content in enumerate(special)}
    named = kept if "eos_token" in kept else default_names(special)
    start = named.get("bos_token", named.get("eos_token"))
    template = source.chat_template or default_template(special)
    if start is not None:
        named = named | {"bos_token": start}
        template = template and with_start(template, named)
    return replace(
        source,
        vocab=vocab,
        merges=merges,
        added_tokens=added,
        special_tokens=ids,
        named_tokens=named,
        chat_template=template,
        post_processor=None if start is None else start_processor(start, ids[start]),
    )


def _first_merges(
    source: Definition, vocab_size: int, num_fixed: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the bytes and first merges that leave room for `num_fixed` other tokens."""
    wanted = vocab_size - num_fixed
    present = sorted(filter(source.vocab.__contains__, ALPHABET), key=source.vocab.__getitem__)
    largest = len({left + right for left, right in source.merges}) + len(present)
    if not len(present) <= wanted <= largest:
        raise UsageError(
            f"vocab_size is {vocab_size:,}, but a tokenizer nested in this teacher's can have "
            f"{len(present) + num_fixed:,} to {largest + num_fixed:,} ids, of which {num_fixed} "
            "are added or special tokens"
        )
    vocab = {char: index for index, char in enumerate(present)}
    merges: list[tuple[str, str]] = []
    for left, right in source.merges:
        if left + right not in vocab:
            if len(vocab) == wanted:
                break
            vocab[left + right] = len(vocab)
        merges.append((left, right))
    return vocab, merges


def prefix_pieces(student: "BPETokenizer", teacher: "BPETokenizer") -> list[tuple[int, ...]]:
    """Return, for each teacher id, the student's ids of the same bytes.

    A special token maps to the student's special token of the same content. It maps to () if the
    student has none, and so does an unused id.
    """
    named = student.added_tokens | student.special_tokens
    reserved = teacher.added_tokens | teacher.special_tokens
    content_of = {token: content for content, token in reserved.items()}
    pieces: list[tuple[int, ...]] = []
    for token in range(teacher.vocab_size):
        if token in content_of:
            same = named.get(content_of[token])
            pieces.append(() if same is None else (same,))
        else:
            pieces.append(tuple(student.encode_piece(teacher.token_bytes(token))))
    return pieces
