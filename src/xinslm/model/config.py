"""The student's shape: Hugging Face's field names, so that `config.json` is the format of record.

Presets are deep and narrow (MobileLLM, arXiv:2402.14905, section 2.2): hidden and feed-forward
sizes are multiples of 256 from 10M up (of 32 below), so that every 4-bit block format fits.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from xinslm.errors import UsageError, XinslmError
from xinslm.ranges import POSITIVE, Settings

MAX_POSITIONS = 2**24
"""Most positions of a model; float32 holds every integer up to here."""


class UnsupportedModelError(XinslmError):
    """The config.json is sound, but of a model that this package's own transformer cannot
    express.
    """


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Shape of a LLaMA-style decoder; Mistral's where `sliding_window` is set."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream; a multiple of 32."""
    intermediate_size: int
    """Width of the SwiGLU feed-forward."""
    num_hidden_layers: int
    """Number of decoder blocks."""
    num_attention_heads: int
    """Query heads a layer."""
    num_key_value_heads: int
    """Key and value heads a layer (GQA); divides `num_attention_heads`."""
    head_dim: int
    """Width of one head; even, for the rotary embedding."""
    max_position_embeddings: int = 2048
    """Longest context in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""
    sliding_window: int | None = None
    """Each token sees this many tokens, itself included; None sees all."""
    rope_scaling: dict[str, Any] | None = None
    """LLaMA-3's frequency rescaling (`rope_type: llama3`), or None."""
    bos_token_id: int | None = None
    """Id that opens a document."""
    eos_token_id: int | None = None
    """Id that closes a document."""
    pad_token_id: int | None = None
    """Id that fills unused places."""

    def check(self) -> None:
        """Raise UsageError listing everything that cannot work."""
        if wrong := self.errors():
            raise UsageError("the model's shape cannot work:\n  " + "\n  ".join(wrong))

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = []
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % max(
            self.num_key_value_heads, 1
        ):
            wrong.append(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            wrong.append(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), or transformers refuses the model"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            wrong.append(
                f"head_dim is {self.head_dim}, but the rotary embedding needs an even number"
            )
        if self.max_position_embeddings > MAX_POSITIONS:
            wrong.append(
                f"max_position_embeddings is {self.max_position_embeddings:,}, but must be at most "
                f"{MAX_POSITIONS:,}: positions are computed in float32, which has no more integers"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"sliding_window is {self.sliding_window}, but must be at least 1")
        for name in ("rope_theta", "rms_norm_eps"):
            if problem := POSITIVE.problem(getattr(self, name)):
                wrong.append(f"{name} is {getattr(self, name)}, but must be {problem}")
        return wrong

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, a tied embedding counted once."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        attention = 2 * d * self.num_attention_heads * self.head_dim + 2 * d * kv
        block = attention + 3 * d * self.intermediate_size + 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + d

    def to_hf(self) -> dict[str, Any]:
        """`config.json` as transformers 4 and 5, llama.cpp, mlx-lm and vLLM read it."""
        windowed = self.sliding_window is not None
        scaling = self.rope_scaling or {"rope_type": "default"}
        values: dict[str, Any] = {
            "architectures": ["MistralForCausalLM" if windowed else "LlamaForCausalLM"],
            "model_type": "mistral" if windowed else "llama",
            **dataclasses.asdict(self),
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
        }
        if not windowed:
            del values["sliding_window"]
        return values

    @staticmethod
    def from_hf(values: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a Llama or Mistral `config.json`; XinslmError names what this model file cannot
        express.
        """
        if not isinstance(values, dict):
            raise XinslmError(f"{where}: must hold an object, but holds {type(values).__name__}")
        family = values.get("model_type")
        if family not in ("llama", "mistral"):
            raise UnsupportedModelError(
                f"{where}: model_type is {family!r}; xinslm's own model is 'llama' or 'mistral'"
            )
        refused = {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "quantization_config": None,
        }
        for key, supported in refused.items():
            if values.get(key, supported) != supported:
                raise UnsupportedModelError(
                    f"{where}: {key} is {values[key]!r:.60}; xinslm's own model has only "
                    f"{supported!r}"
                )
        read = _Reader(values, where)
        theta, scaling = _rope(read)
        # what transformers takes for keys that a config.json leaves out differs
        windowed = family == "mistral"
        heads, hidden = read.whole("num_attention_heads"), read.whole("hidden_size")
        kv_heads = read.whole_or_null("num_key_value_heads", 8 if windowed else None)
        head_dim = read.whole_or_null("head_dim")
        config = ModelConfig(
            vocab_size=read.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.whole("intermediate_size"),
            num_hidden_layers=read.whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=hidden // max(heads, 1) if head_dim is None else head_dim,
            max_position_embeddings=read.whole(
                "max_position_embeddings", 131072 if windowed else 2048
            ),
            rope_theta=theta,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            sliding_window=read.whole_or_null("sliding_window", 4096) if windowed else None,
            rope_scaling=scaling,
            bos_token_id=read.token("bos_token_id"),
            eos_token_id=read.token("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
        )
        try:
            config.check()
        except UsageError as error:
            raise XinslmError(f"{where}: {error}") from None
        return config


class _Reader:
    """Entries of a parsed JSON object by type; an XinslmError names file, key and value of what is
    another.
    """

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def whole(self, key: str, default: int | None = None) -> int:
        """An integer; without a default it must be there."""
        value = self._get(key, default)
        return value if type(value) is int else self._refuse(key, value, "an integer")

    def whole_or_null(self, key: str, default: int | None = None) -> int | None:
        """An integer or null."""
        value = self.values.get(key, default)
        return (
            value
            if value is None or type(value) is int
            else self._refuse(key, value, "an integer or null")
        )

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or POSITIVE.problem(abs(value)) == "a finite number":
            self._refuse(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Either true or false."""
        value = self.values.get(key, default)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def token(self, key: str) -> int | None:
        """A token's id or null; LLaMA-3 lists several end ids, of which the first closes a
        document.
        """
        value = self.values.get(key)
        first = value[0] if isinstance(value, list) and value else value
        return (
            first
            if first is None or type(first) is int
            else self._refuse(key, value, "an id, ids or null")
        )

    def entries(self, key: str) -> dict[str, Any] | None:
        """An object or null."""
        value = self.values.get(key)
        return (
            value
            if value is None or isinstance(value, dict)
            else self._refuse(key, value, "an object or null")
        )

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.values and default is None:
            raise XinslmError(f"{self.where}: key '{self.prefix}{key}' is missing")
        return self.values.get(key, default)

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise XinslmError(
            f"{self.where}: {self.prefix}{key} is {json.dumps(value):.80}, but must be {wanted}"
        )


def _rope(read: _Reader) -> tuple[float, dict[str, Any] | None]:
    """Read the rotary base, and LLaMA-3's rescaling where there is one, in the old spelling or the
    new.
    """
    key = "rope_parameters" if read.entries("rope_parameters") else "rope_scaling"
    rope = dict(read.entries(key) or {})
    inner = _Reader(rope, read.where, f"{key}.")
    base = next(
        (reader for reader in (inner, read) if reader.values.get("rope_theta") is not None), None
    )
    theta = 10000.0 if base is None else base.number("rope_theta")
    rope.pop("rope_theta", None)
    kind = rope.get("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedModelError(
            f"{read.where}: rope_type is {kind!r}; xinslm's own model has 'default' and 'llama3'"
        )
    if kind == "default":
        return theta, None
    numbers = {name: inner.number(name) for name in _LLAMA3_ROPE}
    if min(numbers.values()) <= 0 or numbers["low_freq_factor"] == numbers["high_freq_factor"]:
        raise XinslmError(
            f"{read.where}: {key} must hold numbers above 0, and low_freq_factor other than "
            "high_freq_factor"
        )
    return theta, {**rope, "rope_type": kind}


_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Preset:
    """A shape without its vocabulary."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


PRESETS = {
    "1m": Preset(128, 320, 5, 4, 2, 32),
    "10m": Preset(256, 768, 12, 8, 4, 32),
    "135m": Preset(768, 2048, 18, 12, 4, 64),
    "360m": Preset(1024, 2816, 30, 16, 4, 64),
    "1b": Preset(1536, 6144, 28, 24, 8, 64),
}
"""By parameter count with the vocabulary each is meant for: 1m with 4k, 10m with 8k, the others
with 32k.
"""
