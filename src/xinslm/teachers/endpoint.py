"""A teacher served by an OpenAI-compatible endpoint; the server's capabilities are tested before
any work starts.

vLLM scores a given text (`prompt_logprobs` on /v1/completions, token ids as the prompt). Other
servers, such as llama.cpp, return log-probabilities only with text that they generate: enough for
`synthesize`, not for `cache`.

    teacher = EndpointTeacher("http://localhost:8000/v1", EndpointConfig(),
    tokenizer="Qwen/Qwen3-8B")
    teacher.require_scoring()     # UsageError with alternatives if the server cannot score
"""

from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_json
from xinslm.sampling import UNFILTERED, Sampling
from xinslm.teachers.base import Generation, Prompt
from xinslm.teachers.client import Client, RefusedError, read_key, refuse_password
from xinslm.teachers.endpoint_answers import Scored, first_choice, generation, prompt_scores
from xinslm.teachers.endpoint_config import EndpointConfig
from xinslm.teachers.generate import prompt_ids

SPARE = 4
"""Extra alternatives to request with generated text, since the student may lack some tokens."""
MOST_RIVALS = 20
"""Maximum number of alternatives that hosted models return with generated text."""


def is_endpoint(name: str) -> bool:
    """Return whether a teacher's name is a URL; UsageError if the URL contains a password."""
    found = name.lower().startswith(("http://", "https://"))
    if found:
        refuse_password(name)
    return found


class EndpointTeacher:
    """Scores and generates text over HTTP; thread-safe.

    `top` is the number of most likely tokens to request at each position.
    """

    def __init__(
        self,
        url: str,
        config: EndpointConfig,
        top: int = 8,
        tokenizer: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.client = Client(url, config, find_key(config, api_key))
        self.config, self.top = config, top
        self.model, facts = find_model(self.client, config.model)
        self.name = f"{self.model} at {self.client.url}"
        self.max_length = _context(facts)
        self.tokenizer = _tokenizer(tokenizer, self.model)
        self.rivals = min(top + SPARE, max(MOST_RIVALS, top))
        """Number of most likely tokens to request with generated text; 0 requests none."""

    @property
    def fingerprint(self) -> str:
        """Hash of the model's name and tokenizer; other properties are known only to the server."""
        return sha256_json(
            ["endpoint", self.model, self.tokenizer.fingerprint() if self.tokenizer else None]
        )

    def require_scoring(self) -> None:
        """Request scores of two tokens; UsageError says what to do if the server has none."""
        reason = "it ignores prompt_logprobs"
        try:
            answer = self.client.post("/completions", self._scoring([0, 0]), 3)
        except RefusedError as error:
            reason, answer = str(error), None
        if answer is None or not isinstance(first_choice(answer).get("prompt_logprobs"), list):
            raise UsageError(
                f"{self.name} cannot score a given text ({reason}); this needs vLLM's "
                "prompt_logprobs. Let it generate the text with `xinslm synthesize`, or cache from "
                "the model's files: a Hugging Face folder or a .gguf"
            )
        if self.tokenizer is None:
            raise UsageError(
                f"no tokenizer was found for {self.model}; pass the tokenizer of the endpoint's "
                "model with --teacher-tokenizer-path"
            )

    def _scoring(self, ids: list[int]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": self.top,
        }

    def score(self, ids: np.ndarray) -> Scored:
        """Return the `top` most likely tokens at each position of `ids` (N + 1,) after the first,
        and the label's log-probability.
        """
        answer = self.client.post("/completions", self._scoring(ids.tolist()), len(ids) + 1)
        return prompt_scores(first_choice(answer), ids, self.top, self.tokenizer)

    def gives_log_probs(self, prompt: Prompt) -> str | None:
        """Generate one token after `prompt`; return None if the server returns log-probabilities,
        else the reason.

        If the server refuses this many alternatives, `top` are requested, then none.
        """
        reason = "it ignores logprobs"
        for rivals in dict.fromkeys((self.rivals, self.top, 0)):
            self.rivals = rivals
            try:
                choice = self._continue(prompt, 0, UNFILTERED, 1)
            except RefusedError as error:
                if self.rivals == 0:
                    raise
                reason = str(error)
            else:
                given = (
                    isinstance(choice.get("logprobs"), dict)
                    or choice.get("finish_reason") == "stop"
                )
                # an answer without tokens has no log-probabilities
                return None if self.rivals and given else reason
        return reason

    def write(
        self, prompt: Prompt, key: int, sampling: Sampling, max_new_tokens: int = 256
    ) -> Generation | None:
        """Let the server continue a text or answer a chat; None if the model refuses.

        The request has temperature, top_p and seed; the protocol has no top_k and min_p.
        """
        choice = self._continue(prompt, key, sampling, max_new_tokens)
        written = generation(choice, self.tokenizer)
        fewest = (
            min((len(top) for top in written.top if top), default=None)
            if written is not None
            else None
        )
        if fewest is not None and fewest < self.top:
            raise XinslmError(
                f"{self.name} returned {fewest} log-probabilities at a position for which "
                f"{self.rivals} were requested and {self.top} are kept; pass --top-k {fewest}"
            )
        return written

    def _continue(
        self, prompt: Prompt, key: int, sampling: Sampling, max_new_tokens: int
    ) -> dict[str, Any]:
        """Return the first choice of the server's response."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": (sampling.required_seed() * 1_000_003 + key) % 2**31,
        }
        more: dict[str, Any]
        if isinstance(prompt, str):
            # Ids start with BOS like a dataset's documents, independent of what the server adds to
            # text.
            ids = prompt_ids(self.tokenizer, prompt) if self.tokenizer is not None else prompt
            path, more = "/completions", {"prompt": ids}
            asked: dict[str, Any] = {"logprobs": self.rivals}
        else:
            messages = [dict(message) for message in prompt]
            path, more = "/chat/completions", {"messages": messages}
            asked = {"logprobs": True, "top_logprobs": self.rivals}
        if self.rivals:
            body |= asked
        size = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
        return first_choice(self.client.post(path, {**body, **more}, size // 4 + max_new_tokens))


def find_model(client: Client, wanted: str | None) -> tuple[str, dict[str, Any]]:
    """Return the name and the properties of a server's model: the wanted one, else its only one."""
    try:
        listed = client.get("/models")
    except RefusedError as error:
        raise UsageError(
            f"{error}. Is this the address of an OpenAI-compatible API? It often ends in /v1"
        ) from None
    rows = listed.get("data") if isinstance(listed, dict) else None
    models = {
        row["id"]: row
        for row in rows or ()
        if isinstance(row, dict) and isinstance(row.get("id"), str)
    }
    if wanted is not None:
        if models and wanted not in models:
            raise UsageError(
                f"{client.url} has no model {wanted!r}. It has: {', '.join(list(models)[:20])}"
            )
        return wanted, models.get(wanted, {})
    if len(models) != 1:
        raise UsageError(
            f"{client.url} has {len(models)} models; select one with --endpoint.model. "
            f"It has: {', '.join(list(models)[:20]) or 'none'}"
        )
    return next(iter(models.items()))


def find_key(config: EndpointConfig, given: str | None) -> str | None:
    """Return the API key: from the configured file, else `given`."""
    if config.api_key_file is None:
        return given
    where = f"--endpoint.api-key-file {config.api_key_file}"
    try:
        text = config.api_key_file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{where}: not UTF-8 text") from None
    return read_key(text, where)


def _context(facts: dict[str, Any]) -> int:
    """Return the context length from the model list of vLLM or llama.cpp; else a huge number."""
    meta = facts.get("meta")
    found = facts.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return found if isinstance(found, int) and found > 0 else 1 << 30


def _tokenizer(given: str | None, model: str) -> Any:
    """Load the given tokenizer, else that of the model's name; None if there is none."""
    from xinslm.tokenizer.load import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    try:
        return load_tokenizer(model)
    except XinslmError:
        return None
