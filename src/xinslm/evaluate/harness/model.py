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

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from xinslm.evaluate.likelihood import LikelihoodScorer, Pair, Tell
from xinslm.evaluate.scorers import load_scorer
from xinslm.machine import return_free_memory
from xinslm.ranges import Activations

ENCODE_AT_ONCE = 1024
"""Strings in one call of the tokenizer."""


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
        batch_tokens: int = 1024,
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
        self.add_bos_token, self._device = add_bos_token, place
        self.tell: Tell = lambda done, total, unit: None
        """Receives the progress of the present call."""
        self.truncated: list[int] = []
        """Numbers of the last call's requests that lost their beginning."""

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
        values, greedy = self.scorer(pairs, self.tell)
        self.truncated = self.scorer.truncated
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

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
        values, _ = self.scorer(pairs, self.tell)
        self.truncated = []
        return np.bincount(owners, values, minlength=len(requests)).tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string or the length limit of its settings."""
        contexts = self._encode_all(request.args[0] for request in requests)
        prompts = [contexts[request.args[0]] for request in requests]
        settings = [request.args[1] for request in requests]
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        texts, self.truncated = answer(self.model, prompts, settings, end, self.tell)
        return texts


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Move trailing spaces of the context to the continuation; tokens begin with a space."""
    kept = context.rstrip()
    return (kept, context[len(kept) :] + continuation) if context else (context, continuation)
