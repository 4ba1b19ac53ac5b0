"""The student's shape: Hugging Face's field names, so that `config.json` is the format of record.

Presets are deep and narrow (MobileLLM, arXiv:2402.14905, section 2.2): hidden and feed-forward
sizes are multiples of 256 from 10M up (of 32 below), so that every 4-bit block format fits.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.model.json_reader import JsonReader
from xinslm.ranges import POSITIVE, Settings

MAX_POSITIONS = 2**24
"""Most positions of a model; float32 holds every integer up to here."""


class UnsupportedModelError(XinslmError):
    """The config.json is sound, but of a model that this package's own transformer cannot
    express.
    """


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Shape of a LLaMA-style decoder. Its parts decide the family (`model_type`): LLaMA, Mistral,
    Qwen2 or Qwen3.
    """

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
    attention_bias: bool = False
    """Whether the query, key and value projections have biases (Qwen2, some LLaMAs)."""
    attention_output_bias: bool = False
    """Whether the attention's output projection has one, too (some LLaMAs)."""
    qk_norm: bool = False
    """Whether each head of queries and keys goes through RMSNorm before the rotation (Qwen3)."""
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
        is_bound = self.model_type in ("llama", "mistral")
        if is_bound and self.hidden_size % max(self.num_attention_heads, 1):
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
        if self._has_no_family:
            wrong.append(
                "no family has these parts together: attention_output_bias needs attention_bias "
                "and excludes sliding_window, and qk_norm excludes biases"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            if problem := POSITIVE.problem(getattr(self, name)):
                wrong.append(f"{name} is {getattr(self, name)}, but must be {problem}")
        return wrong

    @property
    def _has_no_family(self) -> bool:
        if self.qk_norm:
            return self.attention_bias or self.attention_output_bias
        output = self.attention_output_bias
        return output and (not self.attention_bias or self.sliding_window is not None)

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family that has these parts: llama, mistral, qwen2, qwen3."""
        if self.qk_norm:
            return "qwen3"
        if self.attention_bias and not self.attention_output_bias:
            return "qwen2"
        return "llama" if self.sliding_window is None else "mistral"

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, a tied embedding counted once."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        attention = 2 * d * self.num_attention_heads * self.head_dim + 2 * d * kv
        matrices = attention + 3 * d * self.intermediate_size
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * matrices + self.num_vector_parameters

    @property
    def num_vector_parameters(self) -> int:
        """Trainable numbers of norms and biases."""
        d, heads = self.hidden_size, self.num_attention_heads + 2 * self.num_key_value_heads
        block = 2 * d + d * self.attention_output_bias
        block += self.head_dim * (heads * self.attention_bias + 2 * self.qk_norm)
        return self.num_hidden_layers * block + d

    def to_hf(self) -> dict[str, Any]:
        """`config.json` as transformers 4 and 5, llama.cpp, mlx-lm and vLLM read it."""
        scaling = self.rope_scaling or {"rope_type": "default"}
        family, fields = self.model_type, dataclasses.asdict(self)
        values: dict[str, Any] = {
            "architectures": [_FAMILIES[family].architecture],
            "model_type": family,
            **{key: value for key, value in fields.items() if key not in _OWN_FIELDS},
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "mlp_bias": False,
            "rope_parameters": {"rope_theta": self.rope_theta, **scaling},
        }
        windowed = self.sliding_window is not None
        if family == "llama":
            del values["sliding_window"]
        elif family != "mistral":
            values["use_sliding_window"] = windowed
            values["max_window_layers"] = 0 if windowed else self.num_hidden_layers
        if family == "qwen2":
            del values["attention_bias"]  # it has them always
        return values

    @staticmethod
    def from_hf(values: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a `config.json` of a LLaMA, Mistral, Qwen2 or Qwen3; XinslmError names what this
        model file cannot express.
        """
        if not isinstance(values, dict):
            raise XinslmError(f"{where}: must hold an object, but holds {type(values).__name__}")
        name = values.get("model_type")
        if not isinstance(name, str) or name not in _FAMILIES:
            *others, last = (repr(known) for known in _FAMILIES)
            raise UnsupportedModelError(
                f"{where}: model_type is {name!r}; xinslm's own model is {', '.join(others)} or "
                f"{last}"
            )
        family = _FAMILIES[name]
        refused: dict[str, Any] = {
            "hidden_act": "silu",
            "mlp_bias": False,
            "quantization_config": None,
        }
        if name in ("mistral", "qwen3"):
            refused["attention_bias"] = False
        for key, supported in refused.items():
            if values.get(key, supported) != supported:
                raise UnsupportedModelError(
                    f"{where}: {key} is {values[key]!r:.60}; xinslm's own {name} model has only "
                    f"{supported!r}"
                )
        read = JsonReader(values, where)
        theta, scaling = _rope(read)
        heads, hidden = read.whole("num_attention_heads"), read.whole("hidden_size")
        kv_heads = read.whole_or_null("num_key_value_heads", family.num_key_value_heads)
        head_dim = read.whole_or_null("head_dim", family.head_dim)
        layers = read.whole("num_hidden_layers")
        all_biases = name == "llama" and read.flag("attention_bias", False)
        config = ModelConfig(
            vocab_size=read.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.whole("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=hidden // max(heads, 1) if head_dim is None else head_dim,
            max_position_embeddings=read.whole("max_position_embeddings", family.positions),
            rope_theta=theta,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            sliding_window=_window(read, name, layers),
            rope_scaling=scaling,
            attention_bias=all_biases or name == "qwen2",
            attention_output_bias=all_biases,
            qk_norm=name == "qwen3",
            bos_token_id=read.token("bos_token_id"),
            eos_token_id=read.token("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
        )
        try:
            config.check()
        except UsageError as error:
            raise XinslmError(f"{where}: {error}") from None
        return config


_OWN_FIELDS = {"attention_output_bias", "qk_norm"}
"""Fields that have no key in config.json: they follow from `model_type` and `attention_bias`."""


@dataclass(frozen=True)
class _Family:
    """transformers' class, and what it takes for keys that a config.json leaves out."""

    architecture: str
    positions: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048),
    "mistral": _Family("MistralForCausalLM", 131072, 8),
    "qwen2": _Family("Qwen2ForCausalLM", 32768, 32),
    "qwen3": _Family("Qwen3ForCausalLM", 32768, 32, 128),
}


def _window(read: JsonReader, family: str, layers: int) -> int | None:
    """Read the sliding window, which Qwen's models have in no layer, in all or in the last ones;
    UnsupportedModelError for the last case.
    """
    if family == "llama":
        return None
    if family == "mistral":
        return read.whole_or_null("sliding_window", 4096)
    window = read.whole_or_null("sliding_window", 4096)
    window = window if read.flag("use_sliding_window", False) else None
    full = min(max(read.whole("max_window_layers", 28), 0), layers) if window else layers
    if (kinds := read.values.get("layer_types")) is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise XinslmError(f"{read.where}: layer_types must list {layers:,} types")
        full = kinds.count("full_attention")
    if full == layers:
        return None
    if full or window is None or (kinds and kinds.count("sliding_attention") != layers):
        raise UnsupportedModelError(
            f"{read.where}: {full} of {layers} layers see all tokens, the others a sliding window "
            "(use_sliding_window, max_window_layers, layer_types); xinslm's own model has one "
            "kind of layer"
        )
    return window


def _rope(read: JsonReader) -> tuple[float, dict[str, Any] | None]:
    """Read the rotary base, and LLaMA-3's rescaling where there is one, in the old spelling or the
    new.
    """
    key = "rope_parameters" if read.entries("rope_parameters") else "rope_scaling"
    rope = dict(read.entries(key) or {})
    inner = JsonReader(rope, read.where, f"{key}.")
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
