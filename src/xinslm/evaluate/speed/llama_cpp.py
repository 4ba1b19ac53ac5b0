"""llama.cpp as a `TimedModel`, through the optional package `xllamacpp`.

The package runs llama.cpp's own server in this process, on a loopback port. The server times each
request (`timings` in its answer): `prompt_n` tokens read in `prompt_ms`, `cache_n` taken from its
cache, and `predicted_ms` from the first generated token to the last.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from xinslm.errors import UsageError, XinslmError

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with keys and values in its default type, float16."""

    def __init__(self, path: Path, threads: int, context_length: int) -> None:
        """Load a file; `context_length` tokens are reserved."""
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        parameters = _parameters(path, threads, context_length)
        try:
            self._server = _xllamacpp().Server(parameters)
        except RuntimeError as error:
            raise XinslmError(f"llama.cpp cannot load {path}: {error}") from None
        facts = self._request("/v1/models")["data"][0]["meta"]
        self.context_length: int = facts["n_ctx_train"]
        self.vocab_size: int = facts["n_vocab"]

    def first_token(self, ids: Sequence[int]) -> float:
        """Time a request for one token, the loopback connection included."""
        start = perf_counter()
        self._complete(ids, 1, cache_prompt=False)
        return perf_counter() - start

    def prefill(self, ids: Sequence[int], depth: int) -> float | None:
        """Time that the server took for the prompt."""
        timings = self._complete(ids, 1)
        read = timings["cache_n"] == depth and timings["prompt_n"] == len(ids) - depth
        return timings["prompt_ms"] / 1000 if read else None

    def decode(self, ids: Sequence[int], count: int) -> float:
        """Time that the server took from the first token to the last of `count` + 1."""
        timings = self._complete(ids, count + 1)
        if timings["predicted_n"] != count + 1:
            raise XinslmError(
                f"llama.cpp generated {timings['predicted_n']} tokens instead of {count + 1}"
            )
        seconds: float = timings["predicted_ms"] / 1000
        return seconds

    def _complete(
        self, ids: Sequence[int], count: int, cache_prompt: bool = True
    ) -> dict[str, float]:
        """Generate `count` tokens greedily, also after an end token; return the timings."""
        body = {
            "prompt": list(ids),
            "n_predict": count,
            "ignore_eos": True,
            "cache_prompt": cache_prompt,
            "samplers": ["top_k"],
            "top_k": 1,
        }
        timings: dict[str, float] = self._request("/completion", body)["timings"]
        return timings

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with _NO_PROXY.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:300]
            raise XinslmError(f"llama.cpp refused a request ({error.code}): {text}") from None


def version() -> str:
    """Name and version of the package."""
    return f"xllamacpp {_xllamacpp().__version__}"


def _xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise XinslmError(
            "llama.cpp is not available: the Python package xllamacpp is not installed"
        ) from None
    return xllamacpp


def _parameters(path: Path, threads: int, context_length: int) -> Any:
    """One sequence; nothing that saves or shares state between requests but the prompt cache."""
    parameters = _xllamacpp().CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel = context_length, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers, parameters.fit_params = 0, False
    parameters.cache_ram_mib, parameters.n_ctx_checkpoints = 0, 0
    parameters.warmup, parameters.verbosity = False, 0
    return parameters
