"""The model families whose GGUF files are read: llama.cpp's names and keys as Hugging Face's.

`llama` covers LLaMA 1 to 3, Mistral and the many models like them. It, `qwen2` and `qwen3` are our
own transformer and are also written by `export gguf`; `gemma3` runs in transformers. Each is
compared with llama.cpp on the same file in `tests/model/test_gguf_families.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.gguf_file import GgufFile
from xinslm.model.config import ModelConfig

_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GEMMA3_PERIOD = 6
"""Every sixth layer of Gemma 3 sees all tokens; llama.cpp has this number in its code, too."""

Keys = Callable[..., Any]
"""Value of one of the family's keys, its prefix left out; a second argument is the default."""


@dataclass(frozen=True)
class Family:
    """How one of llama.cpp's architectures is written."""

    settings: Callable[[Keys, dict[str, Any]], dict[str, Any]]
    """Content of config.json, from the keys and the entries that all families share."""
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    """llama.cpp's names of a block's weights."""
    biases: tuple[str, ...] = ()
    """Weights of a block that have a bias."""
    is_permuted: bool = False
    """Whether query and key rows are in the order of llama.cpp's rotation of neighbouring pairs."""
    norm_offset: float = 0.0
    """What llama.cpp adds to the weights of norms."""

    def hf_name(self, name: str) -> str | None:
        """Translate 'blk.0.ffn_up.weight' to 'model.layers.0.mlp.up_proj.weight'."""
        stem, _, end = name.rpartition(".")
        if stem in _WHOLE and end == "weight":
            return f"{_WHOLE[stem]}.weight"
        parts = stem.split(".")
        if len(parts) != 3 or parts[0] != "blk" or parts[2] not in self.block:
            return None
        if end != "weight" and not (end == "bias" and parts[2] in self.biases):
            return None
        return f"model.layers.{parts[1]}.{self.block[parts[2]]}.{end}"

    def gguf_name(self, name: str) -> str:
        """Translate 'model.layers.0.mlp.up_proj.weight' to 'blk.0.ffn_up.weight'."""
        stem, _, end = name.rpartition(".")
        if not stem.startswith("model.layers."):
            return f"{_theirs(_WHOLE, stem)}.{end}"
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_theirs(self.block, part)}.{end}"

    def for_rotation(self, rows: np.ndarray, name: str, head_dim: int) -> np.ndarray:
        """Reorder query and key rows (rows, ...) from Hugging Face's order within each head to that
        of this family; leave other weights.
        """
        if not self._is_reordered(name):
            return rows
        pairs = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def from_rotation(self, rows: np.ndarray, name: str, head_dim: int) -> np.ndarray:
        """Undo `for_rotation`."""
        if not self._is_reordered(name):
            return rows
        pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def _is_reordered(self, name: str) -> bool:
        return self.is_permuted and (".q_proj." in name or ".k_proj." in name)


def _theirs(names: Mapping[str, str], ours: str) -> str:
    return next(theirs for theirs, name in names.items() if name == ours)


def _llama(get: Keys, shared: dict[str, Any]) -> dict[str, Any]:
    names = {key: shared[key] for key in shared if key in ModelConfig.__dataclass_fields__}
    return ModelConfig(**names).to_hf()


def _qwen2(get: Keys, shared: dict[str, Any]) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **shared}


def _qwen3(get: Keys, shared: dict[str, Any]) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **shared}


def _gemma3(get: Keys, shared: dict[str, Any]) -> dict[str, Any]:
    layers, heads = shared["num_hidden_layers"], shared["num_attention_heads"]
    # llama.cpp knows the 27B model, whose queries are scaled otherwise, by its number of layers
    scale = shared["hidden_size"] // heads if layers == 62 else shared["head_dim"]
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **{key: value for key, value in shared.items() if key not in ("hidden_act", "rope_theta")},
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": int(get("attention.sliding_window")),
        "layer_types": [kinds[(layer + 1) % _GEMMA3_PERIOD == 0] for layer in range(layers)],
        "rope_theta": shared["rope_theta"],
        "rope_local_base_freq": shortest(get("rope.freq_base_swa", 10000.0)),
    }


FAMILIES = {
    "llama": Family(_llama, biases=("attn_q", "attn_k", "attn_v", "attn_output"), is_permuted=True),
    "qwen2": Family(_qwen2, biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Family(_qwen3, {**_BLOCK, **_HEAD_NORMS}),
    "gemma3": Family(
        _gemma3,
        {
            **_BLOCK,
            **_HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}


def shared_settings(get: Keys, tokens: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return the entries of config.json that all families have; `tokens` are special ids by role.

    Raises whatever conversions raise for keys of the wrong type.
    """
    heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    head_dim = int(get("attention.key_length", hidden // max(heads, 1)))
    return {
        "vocab_size": int(get("vocab_size", num_tokens)),
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(get("context_length")),
        "rope_theta": shortest(get("rope.freq_base", 10000.0)),
        "rms_norm_eps": shortest(get("attention.layer_norm_rms_epsilon")),
        **{f"{role}_token_id": int(token) for role, token in tokens.items()},
    }


def shortest(value: float) -> float:
    """What was meant by a number that float32 rounded: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def read_settings(file: GgufFile) -> dict[str, Any]:
    """Return the content that config.json would have, without a rescaling of frequencies.

    UsageError for an architecture that is not read, XinslmError for damaged keys.
    """
    keys, path, missing = file.keys, file.path, object()
    architecture = keys.get("general.architecture")
    experts = keys.get(f"{architecture}.expert_count")
    if not isinstance(architecture, str) or architecture not in FAMILIES or experts:
        kind = f"mixture-of-experts {architecture}" if experts else architecture
        raise UsageError(
            f"{path} holds a {kind} model; GGUF files are read of the architectures "
            f"{', '.join(FAMILIES)} (llama is also Mistral and alike). Give the model's "
            "Hugging Face folder instead"
        )

    def get(key: str, default: Any = missing) -> Any:
        value = keys.get(f"{architecture}.{key}", default)
        if value is missing:
            raise XinslmError(
                f"{path}: key '{architecture}.{key}' is missing; the file is no "
                f"sound {architecture} model"
            )
        return value

    tokens = {
        role: token
        for role, key in _ROLES.items()
        if (token := keys.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    try:
        shared = shared_settings(get, tokens, len(keys.get("tokenizer.ggml.tokens") or ()))
        _require_plain_rotation(get, shared["head_dim"], path)
        shared["tie_word_embeddings"] = "output.weight" not in file.tensors
        if architecture == "llama":
            shared["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
            shared["attention_output_bias"] = "blk.0.attn_output.bias" in file.tensors
        return FAMILIES[architecture].settings(get, shared)
    except XinslmError:
        raise
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise XinslmError(
            f"{path}: its keys are damaged ({error!r}); copy or download it again"
        ) from None


def _require_plain_rotation(get: Keys, head_dim: int, path: Path) -> None:
    if (
        get("rope.dimension_count", head_dim) != head_dim
        or get("attention.value_length", head_dim) != head_dim
    ):
        raise UsageError(
            f"{path} turns part of each head only, or has heads of two widths; no model here does"
        )
    if get("rope.scaling.type", "none") not in ("none", ""):
        raise UsageError(
            f"{path} stretches its positions ('{get('rope.scaling.type')}'); give the model's "
            "Hugging Face folder"
        )
