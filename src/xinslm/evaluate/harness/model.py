"""Any model of xinslm as a model of lm-evaluation-harness, registered as `xinslm`.

    from xinslm.evaluate.harness.model import XinslmLM
    lm_eval.simple_evaluate(model=XinslmLM("SmolLM2.gguf"), tasks=["hellaswag"])

or `python -m xinslm.evaluate.harness --model xinslm --model_args pretrained=SmolLM2.gguf ...`,
which is the command line of the harness. Tokens are those of `HFLM` 0.4.13: the same library
encodes the same strings (`encoder.py`), context and continuation are cut apart as there, and a text
that begins with BOS gets no second one. All requests of a call form one tree (`likelihood.py`).
Text is generated in batches with a key-value cache (`teachers/generate.py`); greedy text equals
that of transformers up to rounding.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xinslm import __version__
from xinslm.device import pick_device
from xinslm.errors import XinslmError
from xinslm.evaluate.harness.encoder import Encoder
from xinslm.evaluate.harness.generate import answer
from xinslm.evaluate.harness.library import (
    TemplateLM,
    get_rolling_token_windows,
    has_bos_prefix,
    make_disjoint_window,
    register_model,
)
from xinslm.evaluate.harness.start import no_collection
from xinslm.evaluate.journal import Journal
from xinslm.evaluate.likelihood import BATCH_TOKENS, LikelihoodScorer, Pair, Tell
from xinslm.evaluate.scorers import load_scorer
from xinslm.heap import return_free_memory
from xinslm.ranges import Activations

ENCODE_AT_ONCE = 1024
"""Strings in one call of the tokenizer."""
WRITE_AT_ONCE = 128
"""Texts that are written before they are kept."""


@register_model("xinslm")
class XinslmLM(TemplateLM):
    """Scores and generates for the harness.

    Args:
        pretrained: Model folder, run, quantized folder, GGUF file or Hub name.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "float32" by default; "float64" gives the harness's own values to 1e-9.
        max_length: Longest input in tokens; by default the model's context.
        add_bos_token: Whether to begin texts with BOS; by default as the tokenizer's files say.
        batch_size: Ignored; the harness's command line passes it. See `batch_tokens`.
        batch_tokens: Most tokens in a forward pass.
        activations: "int8" rounds the inputs of linear layers with codes, as llama.cpp does.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "float32",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_tokens: int = BATCH_TOKENS,
        activations: Activations = "float",
        **ignored: Any,
    ) -> None:
        super().__init__()
        place = pick_device(device if device in ("cpu", "cuda", "mps") else "auto")
        context = None if max_length is None else int(max_length)
        path = Path(pretrained)
        with no_collection():
            self.model, self.facts = load_scorer(path, place, dtype, context, activations)
            self.tokenizer = Encoder(self.model.tokenizer)
        return_free_memory()
        self.scorer = LikelihoodScorer(self.model, int(batch_tokens))
        self.add_bos_token, self._device, self.dtype = add_bos_token, place, dtype
        self.tell: Tell = lambda done, total, unit: None
        """Receives the progress of the present call."""
        self.truncated: list[int] = []
        """Numbers of the last call's requests that lost their beginning."""
        self.journal: Journal | None = None
        """Where answers are kept and looked up, if the run may have to go on after a stop."""

    @property
    def eot_token_id(self) -> int:
        """Id of EOS; XinslmError if the tokenizer has none."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise XinslmError(f"{self.model.name}: the tokenizer names no end token (eos_token)")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is predicted from: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.model.max_length

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of requests."""
        return str(self.model.name).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat with the tokenizer's template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """Encode one string; without `add_special_tokens` the tokenizer's own start tokens come
        first, unless the string begins with BOS.
        """
        ids: list[int] = self.tokenizer.encode(string, **self._special(string, add_special_tokens))
        return ids

    def _special(self, string: str, add: bool | None = None) -> dict[str, bool]:
        if add is not None:
            return {"add_special_tokens": add}
        if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            return {"add_special_tokens": False}
        return {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}

    def _encode_all(self, strings: Iterable[str]) -> dict[str, np.ndarray]:
        """Ids of each different string, as `tok_encode` gives them."""
        by_option: dict[tuple, list[str]] = {}
        for string in dict.fromkeys(strings):
            by_option.setdefault(tuple(self._special(string).items()), []).append(string)
        found: dict[str, np.ndarray] = {}
        for option, group in by_option.items():
            for at in range(0, len(group), ENCODE_AT_ONCE):
                part = group[at : at + ENCODE_AT_ONCE]
                encoded = self.tokenizer(part, **dict(option))["input_ids"]
                found |= {s: np.array(ids, np.int32) for s, ids in zip(part, encoded, strict=True)}
        return found

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is greedy."""
        return self._scores(self.pairs([request.args for request in requests]))

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Encode contexts and continuations like `TemplateLM.loglikelihood`."""
        moved = [_move_spaces(*text) for text in texts]
        contexts = self._encode_all(context for context, _ in moved if context)
        pairs: list[Pair] = []
        for at in range(0, len(moved), ENCODE_AT_ONCE):
            part = moved[at : at + ENCODE_AT_ONCE]
            joined = self._encode_all(context + rest for context, rest in part if context)
            for context, rest in part:
                if context:
                    ids = contexts[context]
                    pairs.append(Pair(ids, joined[context + rest][len(ids) :]))
                else:
                    pairs.append(self._without_context(rest))
        return pairs

    def _without_context(self, text: str) -> Pair:
        ids = np.array(self.tok_encode(text, add_special_tokens=False), np.int32)
        if len(ids) and ids[0] == self.prefix_token_id:
            return Pair(ids[:1], ids[1:])
        return Pair(np.array([self.prefix_token_id], np.int32), ids)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        """Score encoded requests: (strings, context ids, continuation ids)."""
        return self._scores([Pair(np.array(c), np.array(t)) for _, c, t in requests])

    def _scores(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        if self.journal is not None:
            return self._kept_scores(pairs, self.journal)
        values, greedy = self.scorer(pairs, self.tell)
        self.truncated = self.scorer.truncated
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def _kept_scores(self, pairs: list[Pair], journal: Journal) -> list[tuple[float, bool]]:
        """The same; pairs of the journal are not scored again, and others are added to it."""
        keys = [
            journal.key(self._identity, pair.context.tobytes(), pair.continuation.tobytes())
            for pair in pairs
        ]
        found = [journal.get(key) for key in keys]
        missing = [number for number, answer in enumerate(found) if answer is None]

        def keep(numbers: np.ndarray, values: np.ndarray, greedy: np.ndarray) -> None:
            cut = set(self.scorer.truncated)
            for n, value, flag in zip(numbers, values.tolist(), greedy.tolist(), strict=True):
                found[missing[n]] = [value, flag, n in cut]
            finite = [missing[n] for n in numbers[np.isfinite(values)]]
            journal.add((keys[n], found[n]) for n in finite)

        self.scorer([pairs[number] for number in missing], self.tell, keep)
        self.truncated = [number for number, (*_, cut) in enumerate(found) if cut]
        return [(value, flag) for value, flag, _ in found]

    @cached_property
    def _identity(self) -> bytes:
        """Everything but a request that answers depend on."""
        facts = [self.facts["activations"], self.model.max_length, str(self._device), self.dtype]
        return json.dumps([__version__, self.model.fingerprint, *facts]).encode()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that score each token once.

        `HFLM` encodes the text with the tokenizer's start token and puts the prefix token before
        it, so that a tokenizer that adds BOS predicts BOS after BOS. Here a start token that equals
        the prefix is not doubled; `add_bos_token=False` gives the same value in `HFLM`.
        """
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            if ids[:1] == [self.prefix_token_id]:
                ids = ids[1:]
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, target in map(make_disjoint_window, windows):
                pairs.append(Pair(np.array(context), np.array(target)))
                owners.append(number)
        values = [value for value, _ in self._scores(pairs)]
        self.truncated = []
        return np.bincount(owners, values, minlength=len(requests)).tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string or the length limit of its settings."""
        contexts = self._encode_all(request.args[0] for request in requests)
        prompts = [contexts[request.args[0]] for request in requests]
        settings = [request.args[1] for request in requests]
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        if self.journal is not None:
            return self._kept_texts(prompts, settings, end, self.journal)
        texts, self.truncated = answer(self.model, prompts, settings, end, self.tell)
        return texts

    def _kept_texts(
        self, prompts: list[np.ndarray], settings: list[dict], end: str, journal: Journal
    ) -> list[str]:
        """The same; texts of the journal are not written again, and others are added to it."""
        keys = []
        for number, (prompt, setting) in enumerate(zip(prompts, settings, strict=True)):
            draw = number if setting.get("do_sample", setting.get("temperature")) else None
            options = json.dumps([setting, end, draw], sort_keys=True).encode()
            keys.append(journal.key(self._identity, prompt.tobytes(), options))
        found = [journal.get(key) for key in keys]
        missing = [number for number, answer in enumerate(found) if answer is None]
        for at in range(0, len(missing), WRITE_AT_ONCE):
            part = missing[at : at + WRITE_AT_ONCE]

            def tell(done: int, total: int, unit: str, at: int = at) -> None:
                self.tell(at + done, len(missing), unit)

            chosen = [prompts[n] for n in part], [settings[n] for n in part]
            texts, cut = answer(self.model, *chosen, end, tell, part)
            for place, (number, text) in enumerate(zip(part, texts, strict=True)):
                found[number] = [text, place in cut]
            journal.add((keys[number], found[number]) for number in part)
        self.truncated = [number for number, (_, cut) in enumerate(found) if cut]
        return [text for text, _ in found]


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move trailing spaces of the context to the continuation; tokens begin with a space."""
    kept = context.rstrip()
    return (kept, context[len(kept) :] + continuation) if context else (context, continuation)
