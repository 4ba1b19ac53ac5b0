"""llama.cpp, in this process, as an independent reader of GGUF files: tokens, next-token
log-probabilities, templates.

`xllamacpp` starts llama.cpp's own server on a loopback port; keys and values are kept in float32,
so that what differs from PyTorch is the arithmetic of the weights alone."""

import json
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="llama.cpp's Python package xllamacpp is not installed"
)


class LlamaCpp:
    """`with LlamaCpp(path, context) as llama: llama.tokenize("text")`."""

    def __init__(self, path: Path, context: int = 256) -> None:
        self._parameters = xllamacpp.CommonParams()
        p = self._parameters
        p.model.path = str(path)
        p.n_ctx, p.n_parallel, p.warmup, p.verbosity = context, 1, False, 0
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cache_prompt, p.fit_params, p.use_jinja = False, False, True

    def __enter__(self) -> "LlamaCpp":
        self._server = xllamacpp.Server(self._parameters)
        self._plain = self.tokenize("a")[-1]
        # the server's loop runs once it has answered; stopped before, it waits for ever
        self._post("/completion", {"prompt": [self._plain], "n_predict": 1})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._server

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._server.listening_address + path, data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(
        self, text: str, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        return self._post(
            "/tokenize",
            {"content": text, "add_special": add_special, "parse_special": parse_special},
        )["tokens"]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def complete(self, prompt: str, count: int) -> str:
        """Continue a text greedily, from the ids that llama.cpp makes of it."""
        return self._post("/completion", {"prompt": prompt, "n_predict": count, "top_k": 1})[
            "content"
        ]

    def answer(self, messages: list[dict[str, str]], count: int) -> tuple[str, int]:
        """Answer a chat greedily; the text, and the number of the prompt's tokens."""
        body = {"messages": messages, "max_tokens": count, "top_k": 1}
        answer = self._post("/v1/chat/completions", body)
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]

    def next_logprobs(self, ids: list[int], vocab_size: int) -> np.ndarray:
        """Log-probabilities (vocabulary,) of the token after `ids`."""
        # Which token is drawn plays no part, so a bias draws a harmless one; the figures are from
        # before the bias.
        body = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": vocab_size,
            "logit_bias": [[self._plain, 1000.0]],
        }
        answer = self._post("/completion", body)
        out = np.full(vocab_size, -np.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out
