"""T5 encoders as teachers: hidden states of a text, without next-token distributions.

The folder is a transformers model with its tokenizer, or a diffusers folder such as FLUX's, with
the text encoder in `text_encoder_2/` and its tokenizer in `tokenizer_2/`. Weights are safetensors
only. The offsets of the fast tokenizer locate the tokens in the text; they remain correct when its
normalizer changes spaces and Unicode.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.files import read_json
from xinslm.model.files import open_model
from xinslm.precision import round_products, rounds_products
from xinslm.teachers.local import capture_hidden_states, load_pretrained

CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Model type in config.json -> class of transformers that loads the encoder alone."""
PARTS = ("text_encoder_2", "text_encoder", "text_encoder_3")
"""Subfolders of text encoders in diffusers folders."""


def find_encoder(name: str) -> Path | None:
    """Return the encoder folder at `name`, or inside it if it is a diffusers folder; None if
    neither exists.
    """
    for folder in (Path(name), *(Path(name) / part for part in PARTS)):
        if (folder / "config.json").is_file():
            settings = read_json(folder / "config.json")
            if isinstance(settings, dict) and settings.get("model_type") in CLASSES:
                return folder
    return None


@dataclass(frozen=True)
class Reading:
    """Tokens of a text, and the bytes that each covers."""

    ids: np.ndarray
    """(tokens,) int64."""
    begins: np.ndarray
    """First byte of each token, int64."""
    ends: np.ndarray
    """Index after the last byte of each token, int64; non-decreasing."""


class EncoderTeacher:
    """Computes hidden states of texts; attention is bidirectional, so a state depends on later
    tokens.
    """

    def __init__(
        self, name: str, folder: Path, dtype: str = "float32", device: torch.device | str = "cpu"
    ) -> None:
        import transformers

        self.name, self.device = name, torch.device(device)
        self.source = open_model(folder)
        self.source.require()  # refuses pickles and names missing files
        self.tokenizer = EncoderTokenizer(name, _tokenizer_folder(folder))
        cls = getattr(transformers, CLASSES[self.source.settings["model_type"]])
        model = load_pretrained(cls, self.source, dtype, f"encoder {name}")
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        if rounds_products(dtype, device):
            round_products(self.model)
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < self.tokenizer.vocab_size:
            raise XinslmError(
                f"encoder {name}: its tokenizer has {self.tokenizer.vocab_size} ids, but its "
                f"embedding only {rows} rows; the tokenizer belongs to another model"
            )
        self.num_layers: int = model.config.num_layers
        self.hidden_size: int = model.config.d_model
        self.max_length = self.tokenizer.max_length

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and the configuration."""
        return self.source.fingerprint

    @torch.no_grad()
    def hidden(self, sequences: list[np.ndarray], depths: Sequence[int]) -> list[Tensor]:
        """Return the outputs of blocks `depths` (from 1), (total tokens, hidden_size) each, with
        the sequences concatenated.

        The encoder was trained with an end token, which is appended to each sequence; its state is
        dropped.
        """
        end = [] if self.tokenizer.end is None else [self.tokenizer.end]
        longest = max(len(s) for s in sequences) + len(end)
        batch = np.zeros((len(sequences), longest), dtype=np.int64)
        seen, real = np.zeros_like(batch), np.zeros(batch.shape, dtype=bool)
        for row, ids in enumerate(sequences):
            extended = [*ids, *end]
            batch[row, : len(extended)] = extended
            seen[row, : len(extended)] = 1
            real[row, : len(ids)] = True
        with capture_hidden_states(self.model, self.num_layers, depths, self.name) as outputs:
            self.model(
                input_ids=torch.from_numpy(batch).to(self.device),
                attention_mask=torch.from_numpy(seen).to(self.device),
            )
        kept = torch.from_numpy(real).to(self.device)
        return [outputs[depth][kept] for depth in depths]


class EncoderTokenizer:
    """The fast tokenizer of an encoder, which locates its tokens in a text."""

    def __init__(self, name: str, folder: Path) -> None:
        import transformers

        try:
            self.fast: Any = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises many types
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise XinslmError(
                f"transformers cannot load the tokenizer of encoder {name} in {folder}: {first}"
            ) from error
        if not self.fast.is_fast:
            raise XinslmError(
                f"the tokenizer of encoder {name} in {folder} gives no character offsets: it needs "
                "a tokenizer.json. Load it with transformers' AutoTokenizer and save it again"
            )
        self.vocab_size = len(self.fast)
        self.end: int | None = self.fast.eos_token_id
        limit = self.fast.model_max_length
        self.max_length: int = limit if limit < 1 << 30 else 1 << 30

    def fingerprint(self) -> str:
        """Return a hash of the tokenizer's definition."""
        return hashlib.sha256(self.fast.backend_tokenizer.to_str().encode()).hexdigest()

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """Tokenize each text, without an end token."""
        encoded = self.fast(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return [
            _in_bytes(text, ids, offsets)
            for text, ids, offsets in zip(
                texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]


def _in_bytes(text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Reading:
    """Convert offsets in characters to offsets in UTF-8 bytes."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = (
        1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    )
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    begins, ends = bytes_before[spans[:, 0]], np.maximum.accumulate(bytes_before[spans[:, 1]])
    return Reading(np.array(ids, dtype=np.int64), begins, ends)


def _tokenizer_folder(folder: Path) -> Path:
    """Return the folder of an encoder's tokenizer: its own, or its sibling (diffusers)."""
    sibling = folder.resolve().parent / folder.resolve().name.replace("text_encoder", "tokenizer")
    for place in (folder, sibling):
        if (place / "tokenizer.json").is_file() or any(place.glob("*.model")):
            return place
    raise XinslmError(
        f"encoder {folder} has no tokenizer: neither {folder} nor {sibling} contains a "
        "tokenizer.json or a .model file"
    )
