"""The dataset folder as later stages read it: memory-mapped tokens, document offsets, loss mask.

Layout (kind "dataset", version 1), for each of `train/` and `validation/`: `tokens.bin`
(little-endian uint16, or uint32 for more than 65,536 ids; all documents concatenated),
`mask.bin` (uint8, 1 = this token counts as a target), `documents.npy` (int64 offsets, n+1),
`document_bytes.npy` (int64, UTF-8 bytes of each document's text), `document_sources.npy` (int64,
the source of each document, an index into the manifest's `source_names`; not part of the
fingerprint). `tokenizer/` holds the tokenizer, so that the folder is self-contained.

    dataset = open_dataset(Path("data"))
    rows = PackedDataset(dataset.split("train"), row_length=512)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, read_manifest, sha256_json

KIND, VERSION = "dataset", 1
SOURCES = "document_sources.npy"


@dataclass(frozen=True)
class Split:
    """The concatenated documents of one split."""

    tokens: np.ndarray
    """Token ids, uint16 or uint32, (tokens,)."""
    mask: np.ndarray
    """1 if the token is a target, uint8, (tokens,); a document's first token is never one."""
    documents: np.ndarray
    """Offsets of the documents in the stream, int64, (documents + 1,)."""
    document_bytes: np.ndarray
    """UTF-8 bytes of each document's text, or of a chat's answers; int64, (documents,)."""
    vocab_size: int
    """Number of ids of the tokenizer; all tokens are less than it."""
    name: str = ""
    """'train' or 'validation'."""


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    folder: Path
    manifest: dict[str, Any]
    fingerprint: str
    """Hash of the tokens: the same data prepared again, anywhere, has the same fingerprint."""
    tokenizer_fingerprint: str

    def split(self, name: str) -> Split:
        """Map the split 'train' or 'validation' into memory."""
        splits, vocab_size = self.manifest["splits"], self.manifest["vocab_size"]
        if name not in splits:
            raise UsageError(f"{self.folder} has no split '{name}'. It has: {', '.join(splits)}")
        folder = self.folder / name
        split = Split(
            tokens=_map(folder / "tokens.bin", np.dtype(self.manifest["dtype"]).newbyteorder("<")),
            mask=_map(folder / "mask.bin", np.dtype(np.uint8)),
            documents=np.load(folder / "documents.npy", allow_pickle=False),
            document_bytes=np.load(folder / "document_bytes.npy", allow_pickle=False),
            vocab_size=vocab_size,
            name=name,
        )
        ends, count = split.documents[-1], len(split.documents) - 1
        if not (
            ends == len(split.tokens) == len(split.mask) and count == len(split.document_bytes)
        ):
            raise XinslmError(
                f"{folder}: its files do not belong together. Create the dataset again with "
                "`xinslm prepare`"
            )
        return split

    def sources(self, name: str) -> np.ndarray:
        """Return each document's index in the manifest's `source_names`; int64 (documents,)."""
        path = self.folder / name / SOURCES
        if not path.is_file() or not isinstance(self.manifest.get("source_names"), list):
            raise UsageError(
                f"{self.folder} does not record the source of each document: an older xinslm "
                "prepared it. Create it again with `xinslm prepare`; its caches remain valid"
            )
        sources: np.ndarray = np.load(path, allow_pickle=False)
        return sources


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file of numbers; an empty file cannot be mapped and gives an empty array."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def open_dataset(folder: Path, check_hashes: bool = True) -> Dataset:
    """Open a folder of `xinslm prepare`, after checking that it is complete and intact."""
    folder = Path(folder)
    manifest = read_manifest(folder, KIND, VERSION, "xinslm prepare", check_hashes=check_hashes)
    if damage := _damage(manifest):
        raise XinslmError(
            f"{folder / MANIFEST}: {damage}. Create the dataset again with `xinslm prepare`"
        )
    tokenizer = manifest["inputs"]["tokenizer"]
    hashes = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    contents = {
        name: hash
        for name, hash in hashes.items()
        if name.startswith(("train/", "validation/")) and not name.endswith(SOURCES)
    }
    fingerprint = sha256_json({"files": contents, "tokenizer": tokenizer})
    return Dataset(folder, manifest, fingerprint, tokenizer)


def _damage(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with a dataset's manifest; None if nothing."""
    inputs, splits, files = (manifest.get(key) for key in ("inputs", "splits", "files"))
    if not isinstance(inputs, dict) or not isinstance(inputs.get("tokenizer"), str):
        return "the tokenizer's fingerprint ('inputs.tokenizer') is missing"
    if not isinstance(splits, dict) or not all(
        isinstance(facts, dict) for facts in splits.values()
    ):
        return "'splits' must contain an object for each split"
    if not isinstance(files, dict) or not all(
        isinstance(f, dict) and "sha256" in f for f in files.values()
    ):
        return "'files' must contain the size and hash of each file"
    if type(manifest.get("vocab_size")) is not int or manifest["vocab_size"] < 1:
        return (
            f"'vocab_size' is {manifest.get('vocab_size')!r}, but must be an integer of at least 1"
        )
    if manifest.get("dtype") not in ("uint16", "uint32"):
        return f"'dtype' is {manifest.get('dtype')!r}, but must be 'uint16' or 'uint32'"
    return None


def require_tokenizer(dataset: Dataset, fingerprint: str, what: str) -> None:
    """Raise UsageError unless `what` ('the model runs/a') uses the tokenizer of the dataset."""
    if fingerprint != dataset.tokenizer_fingerprint:
        raise UsageError(
            f"the tokenizer of {what} ({fingerprint[:12]}) is not that of {dataset.folder} "
            f"({dataset.tokenizer_fingerprint[:12]}): the same ids mean different text. Prepare "
            "the data again with `xinslm prepare` and --tokenizer-path set to the tokenizer of "
            f"{what}, or use one that has the tokenizer {dataset.folder / 'tokenizer'}"
        )
