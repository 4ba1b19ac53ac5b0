"""A teacher behind an OpenAI-compatible endpoint: what the server can do is tried out before any
work is given to it.

vLLM scores a given text (`prompt_logprobs` on /v1/completions, token ids as the prompt). Others,
llama.cpp among them, give the most likely tokens only beside text that they write themselves: good
for `synthesize`, not for `cache`.

    teacher = EndpointTeacher("http://localhost:8000/v1", EndpointConfig(),
    tokenizer="Qwen/Qwen3-8B")
    teacher.require_scoring()     # says what to do where the server cannot
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
"""Further rivals asked for beside written text, since some may be no tokens of the student's."""
MOST_RIVALS = 20
"""What hosted models give at most beside written text."""


def is_endpoint(name: str) -> bool:
    """Whether a teacher's name is a URL; UsageError for one with a password in it."""
    found = name.lower().startswith(("http://", "https://"))
    if found:
        refuse_password(name)
    return found


class EndpointTeacher:
    """Scores and writes text over HTTP; may be used from many threads.

    `top` is how many of the most likely tokens to ask for at each place.
    """

    def __init__(
        self,
        url: str,
        config: EndpointConfig,
        top: int = 8,
        tokenizer: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.client = Client(url, config, _key(config, api_key))
        self.config, self.top = config, top
        self.model, facts = self._find_model(config.model)
        self.name = f"{self.model} at {self.client.url}"
        self.max_length = _context(facts)
        self.tokenizer = _tokenizer(tokenizer, self.model)
        self.rivals = min(top + SPARE, max(MOST_RIVALS, top))
        """How many of the most likely tokens to ask for beside written text; 0 asks for none."""

    @property
    def fingerprint(self) -> str:
        """Hash of the model's name and tokenizer: what else decides its answers only the server
        knows.
        """
        return sha256_json(
            ["endpoint", self.model, self.tokenizer.fingerprint() if self.tokenizer else None]
        )

    def _find_model(self, wanted: str | None) -> tuple[str, dict[str, Any]]:
        try:
            listed = self.client.get("/models")
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
                    f"{self.client.url} has no model {wanted!r}. It has: "
                    f"{', '.join(list(models)[:20])}"
                )
            return wanted, models.get(wanted, {})
        if len(models) != 1:
            raise UsageError(
                f"{self.client.url} has {len(models)} models; name one with --endpoint.model. It "
                "has: "
                f"{', '.join(list(models)[:20]) or 'none'}"
            )
        return next(iter(models.items()))

    def require_scoring(self) -> None:
        """Try to have a text of two tokens scored; UsageError, with the ways out, where the server
        cannot.
        """
        reason = "it leaves prompt_logprobs unanswered"
        try:
            answer = self.client.post("/completions", self._scoring([0, 0]), 3)
        except RefusedError as error:
            reason, answer = str(error), None
        if answer is None or not isinstance(first_choice(answer).get("prompt_logprobs"), list):
            raise UsageError(
                f"{self.name} cannot score a given text ({reason}); only servers with vLLM's "
                "prompt_logprobs can. Let "
                "it write the text itself with `xinslm synthesize`, or cache from the model's "
                "files: a Hugging Face "
                f"folder or a .gguf"
            )
        if self.tokenizer is None:
            raise UsageError(
                f"no tokenizer is found under the name {self.model}; give that of the endpoint's "
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
        """The `top` most likely tokens at each place of `ids` (N + 1,) behind the first, and the
        token that came.
        """
        answer = self.client.post("/completions", self._scoring(ids.tolist()), len(ids) + 1)
        return prompt_scores(first_choice(answer), ids, self.top, self.tokenizer)

    def gives_log_probs(self, prompt: Prompt) -> str | None:
        """Let the server write one token after `prompt`; None if it says how likely that was, else
        why it does not.

        Servers that refuse so many rivals are asked for as many as are kept, then for none.
        """
        reason = "it leaves logprobs unanswered"
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
                # an answer that ended at once says nothing
                return None if self.rivals and given else reason
        return reason

    def write(
        self, prompt: Prompt, key: int, sampling: Sampling, max_new_tokens: int = 256
    ) -> Generation | None:
        """Let the server continue a text or answer a chat; None where it refuses.

        The server is told temperature, top_p and seed; the protocol has no top_k and min_p.
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
                f"{self.name} gives {fewest} log-probabilities at a place where {self.rivals} "
                "were asked for and "
                f"{self.top} are kept; take --top-k {fewest}"
            )
        return written

    def _continue(
        self, prompt: Prompt, key: int, sampling: Sampling, max_new_tokens: int
    ) -> dict[str, Any]:
        """The choice that the server answers with."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": (sampling.required_seed() * 1_000_003 + key) % 2**31,
        }
        more: dict[str, Any]
        if isinstance(prompt, str):
            # As ids, it begins with BOS whatever the server would add to a text, as a dataset's
            # documents do.
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


def _key(config: EndpointConfig, given: str | None) -> str | None:
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
    """Longest context as vLLM and llama.cpp tell it in their list of models; else no limit is
    known.
    """
    meta = facts.get("meta")
    found = facts.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return found if isinstance(found, int) and found > 0 else 1 << 30


def _tokenizer(given: str | None, model: str) -> Any:
    """The tokenizer that was given, else what the model's name leads to, else None."""
    from xinslm.tokenizer.load import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    try:
        return load_tokenizer(model)
    except XinslmError:
        return None
