"""A GGUF file as teacher: the very weights that llama.cpp multiplies with, expanded into our own
transformer.

Architecture "llama" (LLaMA 1 to 3, Mistral, and the many models like them). The `gguf` package,
llama.cpp's own, reads and dequantizes; query and key rows go back from llama.cpp's order
(neighbouring pairs) to Hugging Face's. What differs from llama.cpp's results is its rounding of
activations to 8 bits, which is not done here.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file
from xinslm.model.config import ModelConfig
from xinslm.model.files import rebuild_buffers, require_weights
from xinslm.model.transformer import Transformer
from xinslm.teachers.own import OwnTeacher

_PARTS = {
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
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GgufTeacher(OwnTeacher):
    """Scores and writes text with a GGUF file; `tokenizer` replaces the one in the file."""

    def __init__(
        self,
        path: Path,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        tokenizer: str | None = None,
    ) -> None:
        from xinslm.teachers.gguf_vocabulary import read_tokenizer
        from xinslm.tokenizer.load import load_tokenizer

        reader = _open(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        own = (
            load_tokenizer(tokenizer) if tokenizer is not None else read_tokenizer(keys, str(path))
        )
        model = read_model(reader, keys, path, getattr(torch, dtype))
        super().__init__(str(path), path.parent, model, own, device)
        self.path = path

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return gguf_fingerprint(self.path)


def gguf_fingerprint(path: Path) -> str:
    """What names the teacher in this file: the hash of its bytes."""
    _require_file(path)
    return sha256_file(path)


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in this file; the weights are not read."""
    from xinslm.teachers.gguf_vocabulary import read_tokenizer

    return read_tokenizer(
        {name: field.contents() for name, field in _open(path).fields.items()}, str(path)
    )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    _require_file(path)
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader raises what it stumbles over
        raise XinslmError(
            f"{path} is not a whole GGUF file ({error}); copy or download it again"
        ) from None
    split = reader.fields.get("split.count")
    if split is not None and int(split.contents()) > 1:
        raise UsageError(
            f"{path} is one of several parts; join them first: llama-gguf-split "
            f"--merge {path.name} OUT"
        )
    _require_sound_places(reader, path)
    return reader


def _require_sound_places(reader: Any, path: Path) -> None:
    """Raise XinslmError for tensors that overlap, are misaligned or end behind the file.

    The reader does not check; llama.cpp refuses such files (`gguf_init_from_file`).
    """
    end, before, size = reader.data_offset, "the header", path.stat().st_size
    for tensor in sorted(reader.tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes)):
        begin, wrong = int(tensor.data_offset), None
        if (begin - reader.data_offset) % reader.alignment:
            wrong = f"begins at byte {begin:,}, which is not aligned to {reader.alignment}"
        elif begin < end:
            wrong = f"overlaps {before}"
        elif begin + tensor.n_bytes > size:
            wrong = f"ends at byte {begin + tensor.n_bytes:,}, but the file has {size:,}"
        if wrong:
            raise XinslmError(
                f"{path}: weight '{tensor.name}' {wrong}; the file is damaged. Copy or download it "
                "again"
            )
        end, before = begin + int(tensor.n_bytes), f"'{tensor.name}'"


def read_config(keys: dict[str, Any], names: set[str], path: Path) -> ModelConfig:
    """The shape that a GGUF's keys tell; UsageError for what our transformer cannot be."""
    architecture = keys.get("general.architecture")
    if architecture != "llama" or keys.get("llama.expert_count"):
        kind = architecture if architecture != "llama" else "mixture-of-experts llama"
        raise UsageError(
            f"{path} holds a {kind} model; GGUF teachers are of the llama architecture (LLaMA, "
            "Mistral and alike). "
            f"Give the model's Hugging Face folder instead"
        )
    missing = object()

    def get(key: str, default: Any = missing) -> Any:
        value = keys.get(f"llama.{key}", default)
        if value is missing:
            raise XinslmError(
                f"{path}: key 'llama.{key}' is missing; the file is no sound llama model"
            )
        return value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = int(get("attention.key_length", hidden // heads))
    if (
        get("rope.dimension_count", head_dim) != head_dim
        or get("attention.value_length", head_dim) != head_dim
    ):
        raise UsageError(
            f"{path} turns part of each head only, or has heads of two widths; no "
            "llama model here does"
        )
    if get("rope.scaling.type", "none") not in ("none", ""):
        raise UsageError(
            f"{path} stretches its positions ('{get('rope.scaling.type')}'); give "
            "the model's folder"
        )
    tokens = keys.get("tokenizer.ggml.tokens") or ()
    return ModelConfig(
        vocab_size=int(get("vocab_size", len(tokens))),
        hidden_size=int(hidden),
        intermediate_size=int(get("feed_forward_length")),
        num_hidden_layers=int(get("block_count")),
        num_attention_heads=int(heads),
        num_key_value_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        max_position_embeddings=int(get("context_length")),
        rope_theta=_shortest(get("rope.freq_base", 10000.0)),
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in names,
    )


def read_model(
    reader: Any, keys: dict[str, Any], path: Path, dtype: torch.dtype = torch.float32
) -> Transformer:
    """Expand the weights, one tensor at a time, into our transformer."""
    from gguf import quants

    config = read_config(keys, {tensor.name for tensor in reader.tensors}, path)
    require_weights(config, len(reader.tensors), path.stat().st_size, f"{path}")
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    factors: Tensor | None = None
    for tensor in reader.tensors:
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise UsageError(
                f"{path}: weight '{tensor.name}' is of type {tensor.tensor_type.name}, which the "
                "gguf package cannot "
                f"expand; give another quantization of the model"
            ) from None
        if tensor.name == "rope_freqs.weight":
            factors = torch.from_numpy(values)
            continue
        name = _hf_name(tensor.name)
        if name is None or expected.get(name) != values.shape:
            raise XinslmError(
                f"{path}: weight '{tensor.name}' of shape {values.shape} has no place in a llama "
                "model of this shape"
            )
        if ".q_proj." in name or ".k_proj." in name:
            half = config.head_dim // 2
            values = (
                values.reshape(-1, half, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            )
        loaded[name] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    if lacking := sorted(expected.keys() - loaded.keys()):
        raise XinslmError(
            f"{path}: {len(lacking)} weights are missing, the first is '{lacking[0]}'"
        )
    model.load_state_dict(loaded, assign=True)
    rebuild_buffers(model)
    if factors is not None:
        model.frequencies = model.frequencies / factors
    return model.eval()


def _hf_name(name: str) -> str | None:
    """Translate llama.cpp's name: 'blk.0.ffn_up.weight' -> 'model.layers.0.mlp.up_proj.weight'."""
    stem = name.removesuffix(".weight")
    if stem.startswith("blk.") and stem.count(".") == 2:
        _, layer, part = stem.split(".")
        return (
            f"model.layers.{layer}.{_PARTS[part]}.weight"
            if part in _PARTS and name != stem
            else None
        )
    return f"{_WHOLE[stem]}.weight" if stem in _WHOLE and name != stem else None


def _shortest(value: float) -> float:
    """What was meant by a number that float32 rounded: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))
