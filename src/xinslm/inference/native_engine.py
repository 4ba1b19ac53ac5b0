"""The native engine: 4-bit and 8-bit weights as they are, int8 activations, a paged cache.

Its arithmetic is that of `--activations int8` of the PyTorch engine, with keys and values in
float16: what llama.cpp computes. A token's logits have the same bits for any number of threads, and
whether it came alone, in a prompt or as one of several drafts.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.inference.config import CacheType
from xinslm.inference.engine import EngineBase
from xinslm.inference.raw_weights import RawModel, open_raw
from xinslm.machine import usable_cores
from xinslm.model.config import ModelConfig
from xinslm.native.bindings import Shape
from xinslm.native.model import NativeContext, NativeModel

if TYPE_CHECKING:
    from xinslm.tokenizer.base import Tokenizer

_LAYER = re.compile("0|[1-9][0-9]{0,5}")
CHUNK = 256
"""Tokens of a text in one call, so that Ctrl-C takes effect between them."""
_ROLES = {
    "model.embed_tokens": "embedding",
    "lm_head": "head",
    "model.norm": "final_norm",
}
_LAYER_ROLES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    **{f"self_attn.{name}": name for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": name for name in ("gate_proj", "up_proj", "down_proj")},
}


class NativeEngine(EngineBase):
    """An `Engine` on the native library."""

    def __init__(
        self,
        model: NativeModel,
        tokenizer: "Tokenizer",
        name: str = "model",
        context_length: int | None = None,
        threads: int | None = None,
        cache: CacheType = "float16",
    ) -> None:
        shape = model.shape
        super().__init__(name, tokenizer, context_length, shape.positions, shape.vocabulary)
        self.context = NativeContext(model, threads or usable_cores(), cache == "int8")
        self._sequence = self.context.add()

    @classmethod
    def load(
        cls,
        path: Path | str,
        context_length: int | None = None,
        threads: int | None = None,
        cache: CacheType = "float16",
        raw: RawModel | None = None,
    ) -> "NativeEngine":
        """Load a model that `native_problem` has no objection to, with its tokenizer; `raw` is it
        if it was opened before.
        """
        from xinslm.tokenizer.load import load_tokenizer

        raw = raw or open_raw(path)
        if raw is None:
            raise UsageError(f"{path}: the native engine does not read this kind of model")
        with _Packing(raw, threads or usable_cores()) as packing:
            tokenizer = load_tokenizer(path)
        return cls(packing.model, tokenizer, str(path), context_length, threads, cache)

    def start(self, ids: Sequence[int]) -> np.ndarray:
        """Make `ids` the sequence; only tokens after the prefix shared with the last sequence are
        computed.
        """
        self.rewind(self._shared(ids))
        self.reused = self.position
        *others, last = (ids[at : at + CHUNK] for at in range(self.reused, len(ids), CHUNK))
        for part in others:
            self._run(part, ())
        return self._run(last, (len(last) - 1,))[0]

    def step(self, token: int) -> np.ndarray:
        """Append one token; return the logits of the token after it."""
        self._require_room(self.position + 1)
        return self._run([token], (0,))[0]

    def verify(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens; return float32 logits (len(tokens), vocabulary) after each of them, the
        same bits as from `step`.
        """
        self._require_room(self.position + len(tokens))
        return self._run(tokens, range(len(tokens)))

    def rewind(self, length: int) -> None:
        """Cut the sequence to its first `length` tokens. If a sliding window has dropped what the
        next token would see, they are computed again.
        """
        wanted = self._ids[:length]
        kept = self.context.rewind(self._sequence, min(length, self._computed()))
        self._ids = wanted[:kept]
        for at in range(kept, length, CHUNK):
            self._run(wanted[at : at + CHUNK], ())

    def reset(self) -> None:
        """Forget the sequence."""
        self.context.rewind(self._sequence, 0)
        self._ids, self.reused = [], 0

    def _computed(self) -> int:
        """Tokens of the sequence in the library: others than `_ids` if Ctrl-C or a fork came
        between a call and the note of what it did.
        """
        return self.context.length(self._sequence)

    def _run(self, ids: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
        if self._computed() != self.position:
            self.rewind(self.position)
        logits = self.context.extend(ids, [self._sequence] * len(ids), wanted)
        self._ids += [int(token) for token in ids]
        return logits[:, : self.tokenizer.vocab_size]


def build(raw: RawModel, threads: int = 1) -> NativeModel:
    """Pack a model's weights for the native library."""
    with _Packing(raw, threads) as packing:
        pass
    return packing.model


class _Packing:
    """A model whose weights are packed by threads of their own while the block runs.

    An error in the block is raised first, then that of the first weight that has one.
    """

    def __init__(self, raw: RawModel, threads: int) -> None:
        self.model, self._raw = _empty(raw), raw
        self._shapes = matrix_shapes(raw.config)
        tied = raw.config.tie_word_embeddings
        names = [name for name in raw.names if not (tied and name == "lm_head.weight")]
        self._names: Iterator[tuple[int, str]] = iter(enumerate(names))
        self._lock = threading.Lock()
        """Of the file: weights are read one after the other, and packed at the same time."""
        self._errors: list[tuple[int, Exception]] = []
        self._threads = [threading.Thread(target=self._pack, daemon=True) for _ in range(threads)]

    def __enter__(self) -> "_Packing":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            self._names = iter(())
        for thread in self._threads:
            thread.join()
        if kind is not None:
            return
        if self._errors:
            raise min(self._errors, key=lambda found: found[0])[1]
        if not self._raw.config.tie_word_embeddings and "lm_head.weight" not in self._raw.names:
            raise XinslmError(
                "the model's head is not tied to its embedding, but 'lm_head.weight' is "
                "missing; copy the model again"
            )
        _ = self.model.num_bytes  # names a weight that is missing

    def _pack(self) -> None:
        while not self._errors:
            with self._lock:
                number, name = next(self._names, (0, ""))
            if not name:
                return
            try:
                self._set(name)
            except Exception as error:
                self._errors.append((number, error))

    def _set(self, name: str) -> None:
        layers = self._raw.config.num_hidden_layers
        role, layer = role_of(name)
        if layer >= layers:
            raise XinslmError(
                f"weight '{name}' is of a layer that the model does not have: its config says "
                f"{layers}"
            )
        with self._lock:
            weight = self._raw.read(name)
        if self._raw.is_packed and role in self._shapes:
            self.model.use(role, layer, self._shapes[role], weight.data)
        else:
            self.model.set(role, layer, weight)
            self._raw.forget(name)


def _empty(raw: RawModel) -> NativeModel:
    """A model of the right shape, without weights."""
    config = raw.config
    _require_limits(config)
    shape = Shape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        window=config.sliding_window or 0,
        interleaved=int(raw.interleaved),
        eps=config.rms_norm_eps,
    )
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        turns = frequencies(config, raw.frequency_divisors)
    if not np.isfinite(turns).all():
        raise XinslmError(f"rope_theta {config.rope_theta} gives rotary frequencies beyond float32")
    return NativeModel(shape, turns)


_MOST_NUMBER, _MOST_HEAD_SIZE = 2**31 - 1, 1024
"""What fits into the fields of `Shape`, which ctypes cuts to 32 bits, and into the kernels."""


def _require_limits(config: ModelConfig) -> None:
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "sliding_window": config.sliding_window or 0,
    }
    limits = [(name, size, _MOST_NUMBER) for name, size in sizes.items()]
    for name, size, most in (*limits, ("head_dim", config.head_dim, _MOST_HEAD_SIZE)):
        if size > most:
            raise XinslmError(
                f"{name} is {size:,}; the native engine runs models with at most {most:,}"
            )


def frequencies(config: ModelConfig, divisors: np.ndarray | None = None) -> np.ndarray:
    """Radians per position, float32 (head size / 2,): `model.transformer.rotary_frequencies`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = np.float32(1) / np.float32(config.rope_theta) ** exponents
    if divisors is not None:
        return plain / divisors
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    wavelengths = 2 * np.pi / plain
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    blend = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    mixed: np.ndarray = blend * plain + (1 - blend) * plain / scaling["factor"]
    return mixed.astype(np.float32)


def role_of(name: str) -> tuple[str, int]:
    """The library's name of a weight, and its layer."""
    stem, _, end = name.rpartition(".")
    if end == "weight" and stem in _ROLES:
        return _ROLES[stem], 0
    parts = stem.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and _LAYER.fullmatch(parts[2]):
        role = _LAYER_ROLES.get(parts[3])
        if role is not None and end == "weight":
            return role, int(parts[2])
        if role is not None and end == "bias" and role.endswith("_proj"):
            return f"{role}.bias", int(parts[2])
    raise XinslmError(f"weight '{name}' has no place in the native engine")


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices, by the library's names; all other weights are vectors."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    return {
        "embedding": (config.vocab_size, hidden),
        "head": (config.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
