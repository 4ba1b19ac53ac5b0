"""The command `doctor compare`: whether two model files hold the same model.

    xinslm doctor compare student-4bit student.gguf

Both can be of any kind that `open_model` knows. Configuration, weights, codes, tokenizer, chat
template and settings of generation are compared, one tensor in memory at a time. Weights that one
file holds in a narrower type are told apart from other weights: rounding is not a difference.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xinslm.device import pick_device
from xinslm.doctor.checks import Check, Examination, Skipped, require
from xinslm.doctor.config import CompareConfig
from xinslm.doctor.text import TEXTS, open_tokenizers, same_chats, same_generation, same_ids
from xinslm.doctor.weights import Tally, compare_weights, describe_codes, describe_values, rounding
from xinslm.errors import XinslmError
from xinslm.model.files import open_model
from xinslm.model.source import ModelSource
from xinslm.progress import Listener, ignore
from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.start import text_ids

LARGEST_KL = 0.01
"""Nats for each token; rounding to bfloat16 costs about a hundredth of that."""
_ELSEWHERE = {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
"""Settings that the checks of tokenizer and weights compare by what they do."""
_NOT_SHAPE = {
    *_ELSEWHERE,
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "use_cache",
    "initializer_range",
}


@dataclass(frozen=True)
class CompareResult:
    """All checks, in the order they were made."""

    models: tuple[str, str]
    """A line on each."""
    checks: tuple[Check, ...]
    rounded: str
    """Weights that are equal but for rounding; '' if there are none."""

    @property
    def failed(self) -> list[str]:
        """Names of the checks that found a difference."""
        return [check.name for check in self.checks if check.status == "FAIL"]

    @property
    def verdict(self) -> str:
        """One line: the same model, up to rounding, or not."""
        if self.failed:
            return f"different models: {', '.join(self.failed)}"
        return f"the same model, rounded: {self.rounded}" if self.rounded else "the same model"

    def describe(self) -> str:
        """The models, a line a check, the verdict."""
        width = max(len(check.name) for check in self.checks)
        lines = [f"{side:<8} {model}" for side, model in zip("AB", self.models, strict=True)]
        lines += [check.line(width) for check in self.checks]
        return "\n".join([*lines, f"verdict  {self.verdict}"])


def run(config: CompareConfig, on_progress: Listener = ignore) -> CompareResult:
    """Compare two models; what differs is in the result, a model that cannot be opened an error."""
    config.check()
    a, b = open_model(config.model), open_model(config.other)
    models = (_describe(a), _describe(b))
    examination = Examination(on_progress)
    examination.make("configuration", lambda: same_configuration(a, b))
    tallies: list[Tally] = []

    def weights() -> str:
        tallies.append(compare_weights(a, b, on_progress))
        return describe_values(tallies[0])

    def codes() -> str:
        found = describe_codes(tallies[0]) if tallies else None
        if found is None:
            reason = "only one model has" if tallies and tallies[0].codes_of_one else "no"
            raise Skipped(f"{reason} codes of Q4_0, Q8_0 or symmetric groups of 32")
        return found

    examination.make("weights", weights)
    examination.make("codes", codes)
    tokenizers: list[tuple[Tokenizer, Tokenizer]] = []

    def ids() -> str:
        tokenizers.append(open_tokenizers(a, b))
        return same_ids(a, b, *tokenizers[0])

    same = examination.make("tokenizer", ids)
    if tokenizers:
        examination.make("chat template", lambda: same_chats(*tokenizers[0]))
    else:
        examination.skip(("chat template",), "no tokenizers to compare")
    examination.make("generation settings", lambda: same_generation(a, b))
    if config.predictions and same:
        examination.make("predictions", lambda: _same_predictions(config, tokenizers[0][0]))
    elif config.predictions:
        examination.skip(("predictions",), "the tokenizers differ")
    rounded = rounding(tallies[0]) if tallies else ""
    return CompareResult(models, tuple(examination.checks), rounded)


def _describe(source: ModelSource) -> str:
    size = source.weight_bytes / 1e6
    return f"{source.name} ({source.kind}, {source.num_weights:,} weights, {size:,.2f} MB)"


def same_configuration(a: ModelSource, b: ModelSource) -> str:
    """Shape, rotation, epsilon, window: what our transformer, or transformers, computes with."""
    x, y = _shape(a), _shape(b)
    if a.is_own != b.is_own:
        x, y = ({"model_type": source.settings.get("model_type")} for source in (a, b))
    differing = [
        f"{key} is {x.get(key)} in A, {y.get(key)} in B"
        for key in sorted(x.keys() | y.keys())
        if not _equal(x.get(key), y.get(key))
    ]
    return require(
        not differing,
        "; ".join(differing) or f"{len(x)} fields equal",
        "The same weights compute something else with it",
    )


def _shape(source: ModelSource) -> dict[str, Any]:
    if source.is_own:
        fields = {"model_type": source.config.model_type, **asdict(source.config)}
        return {key: value for key, value in fields.items() if key not in _ELSEWHERE}
    from transformers import AutoConfig

    settings = {key: value for key, value in source.settings.items() if key != "model_type"}
    kind = str(source.settings.get("model_type"))
    try:
        full = AutoConfig.for_model(kind, **settings).to_dict()
    except Exception as error:  # transformers raises many types
        raise XinslmError(
            f"transformers has no model like {source.where}: {error!s:.300}"
        ) from None
    return {key: value for key, value in full.items() if key not in _NOT_SHAPE}


def _equal(x: Any, y: Any) -> bool:
    """Whether two settings are equal; numbers in float32, which GGUF holds them in."""
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    if isinstance(x, float) and isinstance(y, int | float):
        return bool(np.float32(x) == np.float32(y))
    return bool(x == y)


def _same_predictions(config: CompareConfig, tokenizer: Tokenizer) -> str:
    """KL divergence between the models' next-token distributions on the sample texts."""
    ids = [np.array(text_ids(tokenizer, text)) for text in TEXTS]
    x, y = (_log_probs(path, ids, config.device) for path in (config.model, config.other))
    kl = (x.exp() * (x - y)).sum(dim=1)
    agree = (x.argmax(dim=1) == y.argmax(dim=1)).double().mean()
    return require(
        float(kl.mean()) <= LARGEST_KL,
        f"KL(A, B) {float(kl.mean()):.2g} nats a token on {len(kl)} tokens, at most "
        f"{float(kl.max()):.2g}; the same most likely token at {float(agree):.0%}",
        f"The threshold is {LARGEST_KL}",
    )


def _log_probs(path: Any, ids: list[np.ndarray], device: Any) -> Any:
    """Log-probabilities, float64 (tokens, vocabulary); one model is in memory at a time."""
    from xinslm.teachers.open import TeacherOptions, open_teacher

    model: Any = open_teacher(str(path), TeacherOptions(device=pick_device(device)))
    return model.logits(model.states(ids)).double().log_softmax(-1).cpu()
