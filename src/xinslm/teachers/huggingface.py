"""A causal language model in transformers as teacher, any architecture.

`hidden` and `logits` are apart so that a caller can apply the head to a few rows at a time and
never holds (positions, vocabulary). Models that do more after the head (soft caps, scales) are
recognised by comparing both ways on a short input when the teacher is loaded; for those, `logits`
comes from whole forward passes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.files import sha256_json
from xinslm.model.source import ModelSource
from xinslm.precision import round_products, rounds_products
from xinslm.teachers.adapter import adapter_hash, apply_adapter, check_adapter, require_peft
from xinslm.teachers.huggingface_decoder import HuggingFaceDecoder
from xinslm.teachers.local import LocalTeacher, load_pretrained
from xinslm.tokenizer.load import load_tokenizer


class HuggingFaceTeacher(LocalTeacher):
    """Scores sequences of token ids.

    `vocab_size` is the number of the tokenizer's ids; padding rows of the head are cut off.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        adapter: Path | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Load the model, apply `adapter`; `tokenizer` names the one that replaces its own."""
        from transformers import AutoModelForCausalLM

        self.source, self.name = source, source.name
        self.tokenizer = load_tokenizer(source.path if tokenizer is None else tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.device = torch.device(device)
        self.adapter = adapter
        if adapter is not None:
            require_peft()
            check_adapter(adapter, source.fingerprint, self.name)
        self._require_rows(_configured_rows(source.settings))
        model = load_pretrained(
            AutoModelForCausalLM,
            source,
            dtype,
            f"teacher {self.name}",
            trust_remote_code=trust_remote_code,
        )
        if adapter is not None:
            model = apply_adapter(model, adapter, self.name)
        self.model = model.to(self.device).eval().requires_grad_(False)
        if rounds_products(dtype, device):
            round_products(self.model)
        self.max_length = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        head = self.model.get_output_embeddings()
        self._require_rows(None if head is None else head.weight.shape[0])
        self._split = self._head_is_plain()
        text = self.model.config.get_text_config()
        self.num_layers = text.num_hidden_layers
        self.hidden_size: int = text.hidden_size
        self.cache_bytes_per_token = (
            2 * self.num_layers * _key_width(text) * self.model.dtype.itemsize
        )

    @property
    def fingerprint(self) -> str:
        """Hash of weights, shape and adapter."""
        base = self.source.fingerprint
        return base if self.adapter is None else sha256_json([base, adapter_hash(self.adapter)])

    @property
    def has_plain_head(self) -> bool:
        """Whether the logits are just the output head applied to the backbone's states."""
        return self._split

    def _require_rows(self, rows: int | None) -> None:
        """Raise XinslmError if the output has fewer rows than the tokenizer has ids."""
        if rows is not None and rows < self.vocab_size:
            raise XinslmError(
                f"teacher {self.name}: its tokenizer has {self.vocab_size} ids, its output only "
                f"{rows} rows; "
                f"the tokenizer belongs to another model"
            )

    def _head_is_plain(self) -> bool:
        ids = torch.arange(8, device=self.device)[None] % self.vocab_size
        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
            backbone = getattr(self.model, self.model.base_model_prefix, None)
            if backbone is None or backbone is self.model:
                return False
            hidden = backbone(input_ids=ids, use_cache=False)[0]
            apart = self.model.get_output_embeddings()(hidden).float()
        return apart.shape == whole.shape and bool(
            (apart - whole).abs().max() <= 1e-3 * whole.abs().max().clamp_min(1)
        )

    @torch.no_grad()
    def states(self, sequences: list[np.ndarray]) -> Tensor:
        """Run sequences of ids, right-padded into one batch; return the input of `logits` for each
        token.

        Rows of all sequences are concatenated: (total tokens, ...), without pads.
        """
        inputs, real = self.padded(sequences)
        if self._split:
            backbone = getattr(self.model, self.model.base_model_prefix)
            out = backbone(input_ids=inputs, use_cache=False)[0]
        else:
            out = self.model(input_ids=inputs, use_cache=False).logits
        rows: Tensor = out[real]
        return rows

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """(rows, ...) from `states` -> logits (rows, vocab_size) float32."""
        out = self.model.get_output_embeddings()(states) if self._split else states
        return out[:, : self.vocab_size].float()

    @property
    def output_size(self) -> int:
        """Rows of the output matrix, padding included."""
        head = self.model.get_output_embeddings()
        return self.vocab_size if head is None else int(head.weight.shape[0])

    @torch.no_grad()
    def outputs(self, states: Tensor) -> Tensor:
        """(rows, ...) from `states` -> (rows, output_size), padding included, in float32 at
        least.
        """
        logits = self.model.get_output_embeddings()(states) if self._split else states
        return logits if logits.dtype == torch.float64 else logits.float()

    def open_decoder(self, rows: int, length: int) -> HuggingFaceDecoder:
        """A cache for texts; it grows with them."""
        return HuggingFaceDecoder(self.model, self.vocab_size, self.name)


def _key_width(text: Any) -> int:
    """Keys of a token in one layer; an estimate for models of unusual shape."""
    heads = getattr(text, "num_attention_heads", 1)
    shared = getattr(text, "num_key_value_heads", None) or heads
    return int(shared * (getattr(text, "head_dim", None) or text.hidden_size // heads))


def _configured_rows(settings: dict[str, Any]) -> int | None:
    """Vocabulary size in config.json, if it is there."""
    inner = settings.get("text_config")
    rows = settings.get("vocab_size") or (
        inner.get("vocab_size") if isinstance(inner, dict) else None
    )
    return rows if isinstance(rows, int) else None
