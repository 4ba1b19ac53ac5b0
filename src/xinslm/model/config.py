"""The student's shape: Hugging Face's field names, so that `config.json` is the format of record.

Presets are deep and narrow (MobileLLM, arXiv:2402.14905, section 2.2): hidden and feed-forward sizes are
multiples of 256 from 10M up (of 32 below), so that every 4-bit block format fits.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from xinslm.errors import UsageError, XinslmError


@dataclass(frozen=True)
class ModelConfig:
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
        """Raise UsageError listing all shapes that cannot work."""
        wrong = []
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            if getattr(self, name) < 1:
                wrong.append(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % max(self.num_key_value_heads, 1):
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
            wrong.append(f"head_dim is {self.head_dim}, but the rotary embedding needs an even number")
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"sliding_window is {self.sliding_window}, but must be at least 1")
        if wrong:
            raise UsageError("the model's shape cannot work:\n  " + "\n  ".join(wrong))

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
        """Read a Llama or Mistral `config.json`; XinslmError names what this model file cannot express."""
        if not isinstance(values, dict):
            raise XinslmError(f"{where}: must hold an object, but holds {type(values).__name__}")
        family = values.get("model_type")
        if family not in ("llama", "mistral"):
            raise XinslmError(f"{where}: model_type is {family!r}; xinslm's own model is 'llama' or 'mistral'")
        refused = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, supported in refused.items():
            if values.get(key, supported) != supported:
                raise XinslmError(f"{where}: {key} is {values[key]!r}; xinslm's own model has only {supported!r}")
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
        kind = rope.get("rope_type", rope.pop("type", "default"))
        if kind not in ("default", "llama3"):
            raise XinslmError(f"{where}: rope_type is {kind!r}; xinslm's own model has 'default' and 'llama3'")
        windowed = family == "mistral"  # what transformers takes for keys that a config.json leaves out differs
        try:
            heads, hidden = values["num_attention_heads"], values["hidden_size"]
            config = ModelConfig(
                vocab_size=values["vocab_size"],
                hidden_size=hidden,
                intermediate_size=values["intermediate_size"],
                num_hidden_layers=values["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=values.get("num_key_value_heads", 8 if windowed else None) or heads,
                head_dim=values.get("head_dim") or hidden // heads,
                max_position_embeddings=values.get("max_position_embeddings", 131072 if windowed else 2048),
                rope_theta=float(theta),
                rms_norm_eps=values.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=values.get("tie_word_embeddings", False),
                sliding_window=values.get("sliding_window", 4096) if windowed else None,
                rope_scaling={**rope, "rope_type": kind} if kind == "llama3" else None,
                bos_token_id=values.get("bos_token_id"),
                eos_token_id=_first(values.get("eos_token_id")),
                pad_token_id=values.get("pad_token_id"),
            )
        except KeyError as error:
            raise XinslmError(f"{where}: key {error} is missing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise XinslmError(f"{where}: a value is of the wrong kind ({error})") from None
        config.check()
        return config


def _first(ids: Any) -> int | None:
    """LLaMA-3 lists several end ids; the first closes a document."""
    return ids[0] if isinstance(ids, list) and ids else ids


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
"""By parameter count with the vocabulary each is meant for: 1m with 4k, 10m with 8k, the others with 32k."""
