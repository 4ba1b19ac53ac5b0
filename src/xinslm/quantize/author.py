"""A model that writes texts on its own, from the start token or an empty chat.

Tokens are drawn from the model's own distribution: temperature 1, no filters. A chat model gets its
template up to where the user speaks, writes the user's turn, then the answer (Magpie, Xu et al.,
arXiv:2406.08464).

    opening, notes = find_opening(tokenizer, length=512)
    documents = Author(source, tokenizer, opening, 512, seed=0).write(0, 16, tell)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.model.decode import RowDecoder, token_bytes
from xinslm.model.source import ModelSource
from xinslm.sampling import UNFILTERED
from xinslm.teachers.generate import Completion, Limits, generate_batch
from xinslm.tokenizer.chat import end_ids
from xinslm.tokenizer.start import prefix_ids

_PROGRESS_TOKENS = 64


@dataclass(frozen=True)
class Opening:
    """The tokens that a text is given; the model writes all others."""

    prompt: list[int]
    """What the first token is predicted from, at least one."""
    num_kept: int
    """How many of `prompt`, the last ones, belong to the document: all, or 0 if documents of this
    tokenizer begin with their first token.
    """
    turn_end: int | None = None
    """Token that ends the user's turn; None for plain text."""
    answer: tuple[int, ...] = ()
    """Tokens between `turn_end` and the answer."""


@dataclass(frozen=True)
class Document:
    """A text with the tokens that it was given."""

    tokens: np.ndarray
    """Ids, int64, (n,)."""
    mask: np.ndarray
    """1 where the model wrote the token, and not the template; uint8, (n,)."""
    ended_at_once: bool
    """Whether the first token that the model wrote was an end token."""


def find_opening(tokenizer: Any, length: int) -> tuple[Opening, list[str]]:
    """How texts of at most `length` tokens begin, and a note if a chat template is of no use."""
    chat, notes = _chat_opening(tokenizer), []
    if chat is not None and len(chat.prompt) + len(chat.answer) + 1 <= length // 2:
        return chat, []
    if chat is not None:
        notes.append(
            f"the chat template takes more than half of the {length} tokens of a row, so the model "
            "wrote plain text: raise --max-seq-length"
        )
    elif tokenizer.chat_template is not None:
        notes.append(
            "the chat template does not end the user's turn with a token that the model could "
            "write, so the model wrote plain text"
        )
    prompt = prefix_ids(tokenizer)
    if not prompt:
        raise UsageError(
            "the tokenizer has no start, BOS or EOS token that a text could begin from: give text "
            "to calibrate on with --data-path DATASET"
        )
    return Opening(prompt, len(tokenizer.start_ids)), notes


def _chat_opening(tokenizer: Any) -> Opening | None:
    """The template around the user's turn, from the ids that two messages have in common; None if
    the turn does not end with a control token.
    """
    if tokenizer.chat_template is None:
        return None
    contents = ("a", "Z")
    try:
        first, second = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )[0]
            for content in contents
        )
    except XinslmError:  # a template that refuses such a chat
        return None
    before = _num_common(first, second)
    after = _num_common(first[before:][::-1], second[before:][::-1])
    prompt, end = first[:before], first[len(first) - after :]
    said = [tokenizer.decode(ids[before : len(ids) - after]).strip() for ids in (first, second)]
    is_turn = tuple(said) == contents and bool(prompt) and bool(end)
    if not is_turn or end[0] not in tokenizer.special_tokens.values():
        return None
    return Opening(prompt, len(prompt), end[0], tuple(end[1:]))


def _num_common(left: list[int], right: list[int]) -> int:
    """Length of the beginning that two lists share."""
    equal = (a == b for a, b in zip(left, right, strict=False))
    return next((i for i, same in enumerate(equal) if not same), min(len(left), len(right)))


class Author:
    """The model and how it writes."""

    def __init__(
        self, source: ModelSource, tokenizer: Any, opening: Opening, length: int, seed: int
    ) -> None:
        self._model = source.transformer().requires_grad_(False)
        self._vocab_size, self._opening = tokenizer.vocab_size, opening
        self._sampling = replace(UNFILTERED, seed=seed)
        ends = end_ids(tokenizer)
        if opening.turn_end is not None:
            ends |= {opening.turn_end}
        # a document of `length` inputs has one token more, which is not read
        context = length + len(opening.prompt) - opening.num_kept
        self._limits = Limits(
            length + 1,
            min(context, self._model.config.max_position_embeddings),
            ends,
            bytes_per_token=token_bytes(self._model),
            name=source.name,
        )

    def write(self, first: int, count: int, tell: Callable[[int], None]) -> list[Document]:
        """Write texts number `first` and following; `tell` receives the number of their tokens."""
        opening, report = self._opening, _Counter(tell)
        prompt = np.array(opening.prompt)
        numbers = np.arange(first, first + count)
        # a continuation must not be drawn with the numbers of its beginning: it has another key
        texts = self._continue([prompt] * count, 2 * numbers, opening.num_kept, report)
        given = prompt[len(prompt) - opening.num_kept :]
        tokens = [np.concatenate([given, text.tokens]) for text in texts]
        masks = [_mask(len(given), len(text.tokens)) for text in texts]
        at_once = [text.ended and len(text.tokens) == 1 for text in texts]
        asked = [
            index
            for index, text in enumerate(texts)
            if text.tokens[-1] == opening.turn_end
            and len(tokens[index]) + len(opening.answer) <= self._limits.context
        ]
        prompts = [np.append(tokens[index], opening.answer).astype(np.int64) for index in asked]
        answers = self._continue(prompts, 2 * numbers[asked] + 1, len(opening.answer), report)
        for index, chat, answer in zip(asked, prompts, answers, strict=True):
            tokens[index] = np.concatenate([chat, answer.tokens])
            given_and_written = _mask(len(opening.answer), len(answer.tokens))
            masks[index] = np.concatenate([masks[index], given_and_written])
        for mask in masks:
            mask[0] = 0  # no position predicts a document's first token
        return [Document(*parts) for parts in zip(tokens, masks, at_once, strict=True)]

    def _continue(
        self, prompts: list[np.ndarray], keys: np.ndarray, num_given: int, report: "_Counter"
    ) -> list[Completion]:
        """Continue prompts, of which the last `num_given` tokens are new in their documents."""

        def count(tokens: list[int]) -> bool:
            report.add(1 + (num_given if len(tokens) == 1 else 0))
            return False

        # asked after each token, so progress moves before the first text ends
        limits = replace(self._limits, is_over=count)
        return generate_batch(
            lambda rows, length: RowDecoder(self._model, rows, length, self._vocab_size),
            prompts,
            keys.tolist(),
            self._sampling,
            limits,
        ).texts


class _Counter:
    """Counts tokens and reports their number now and then."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._tokens, self._told = tell, 0, 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        if self._tokens - self._told >= _PROGRESS_TOKENS:
            self._told = self._tokens
            self._tell(self._tokens)


def _mask(num_given: int, num_written: int) -> np.ndarray:
    return np.repeat(np.array([0, 1], np.uint8), (num_given, num_written))
