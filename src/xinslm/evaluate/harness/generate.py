"""Text for the harness's `generate_until` requests, in batches.

Settings are those that the harness knows: `until`, `max_gen_toks`, `do_sample`, `temperature`,
`top_p`, `top_k`, `repetition_penalty`; anything else is refused.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from xinslm.errors import UsageError
from xinslm.evaluate.likelihood import Tell
from xinslm.sampling import Sampling
from xinslm.teachers.generate import Limits, generate_batch
from xinslm.tokenizer.chat import end_ids

MAX_NEW_TOKENS = 256
"""The harness's own limit where a task has none."""
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the limit."""


def answer(
    model: Any,
    prompts: Sequence[np.ndarray],
    settings: Sequence[dict[str, Any]],
    end: str,
    tell: Tell,
    draws: Sequence[int] | None = None,
) -> tuple[list[str], list[int]]:
    """Continue prompts (ids) with a teacher's or student's adapter.

    Texts that are sampled differ by the numbers `draws`, by default the prompts' places.
    Return the texts in the same order, and the numbers of the prompts that were cut on the left, as
    in `HFLM`, because they leave no room for the answer.
    """
    cut: list[int] = []
    groups: dict[str, list[int]] = {}
    for number, setting in enumerate(settings):
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(number)
    texts, finished = [""] * len(prompts), 0
    for key, numbers in groups.items():
        sampling, limit, until = _parse(json.loads(key))
        room = model.max_length - limit
        if room < 1:
            raise UsageError(
                f"a task asks for {limit:,} new tokens, but the context of {model.name} is "
                f"{model.max_length:,}"
            )
        until = [*until, end]
        cut += [number for number in numbers if len(prompts[number]) > room]
        limits = Limits(
            limit,
            model.max_length,
            end_ids(model.tokenizer),
            bytes_per_token=model.cache_bytes_per_token,
            name=str(model.name),
            is_over=_stop_test(model.tokenizer, until),
        )
        chosen = [np.asarray(prompts[number][-room:], np.int64) for number in numbers]
        written = generate_batch(
            model.open_decoder,
            chosen,
            numbers if draws is None else [draws[number] for number in numbers],
            sampling,
            limits,
            partial(_tell, tell, finished, len(prompts)),
        )
        finished += len(numbers)
        for number, text in zip(numbers, written.texts, strict=True):
            ids = text.tokens[: len(text.tokens) - text.ended].tolist()
            texts[number] = _cut(model.tokenizer.decode(ids, skip_special=True), until)
    return texts, sorted(cut)


def _tell(tell: Tell, before: int, total: int, texts: int, tokens: int) -> None:
    tell(before + texts, total, "answers")


def _parse(setting: dict[str, Any]) -> tuple[Sampling, int, list[str]]:
    """Sampling, most new tokens and stop strings of a request."""
    setting = dict(setting)
    until = setting.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    limits = [setting.pop(name) for name in LENGTH_NAMES if name in setting]
    temperature = float(setting.pop("temperature", 0.0))
    draws = bool(setting.pop("do_sample", temperature > 0)) and temperature > 0
    sampling = Sampling(
        temperature=temperature if draws else 0.0,
        top_k=int(setting.pop("top_k", 0)),
        top_p=float(setting.pop("top_p", 1.0)),
        min_p=0.0,
        repetition_penalty=float(setting.pop("repetition_penalty", 1.0)),
        seed=int(setting.pop("seed", 0)),
    )
    if setting:
        raise UsageError(f"a task's generation settings are not supported: {', '.join(setting)}")
    return sampling, int(limits[0]) if limits else MAX_NEW_TOKENS, [text for text in until if text]


def _stop_test(tokenizer: Any, until: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the last token completed a stop string."""
    longest = max(len(text.encode()) for text in until)

    def is_over(ids: list[int]) -> bool:
        # a token has at least one byte, but for special tokens, which are kept
        tail = tokenizer.decode(ids[-longest - 1 :])
        return any(text in tail for text in until)

    return is_over


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.split(stop)[0]
    return text
