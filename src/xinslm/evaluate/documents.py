"""Documents to evaluate, from a dataset folder or raw files, encoded for the model.

A dataset made with the model's own tokenizer is used as it is; in chats only the answers are
scored. A dataset of another tokenizer is first decoded to text. This works for plain texts, but not
for chats, because the markers of a chat template are not text.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.perplexity import Item
from xinslm.files import MANIFEST
from xinslm.tokenizer.start import prefix_ids

if TYPE_CHECKING:
    from xinslm.data.dataset import Dataset
    from xinslm.data.records import Document
    from xinslm.tokenizer.base import Tokenizer


def read_items(
    data: tuple[str, ...], split: str, tokenizer: "Tokenizer", max_documents: int | None
) -> list[Item]:
    """Read and encode the documents; UsageError if there are fewer than `max_documents`."""
    if not prefix_ids(tokenizer):
        raise UsageError(
            "the model's tokenizer has neither a BOS nor an EOS token to predict a text's first "
            "token from"
        )
    if any((Path(path) / MANIFEST).is_file() for path in data):
        if len(data) > 1:
            raise UsageError(
                "give one dataset folder, or raw files, with --data-path; not several datasets"
            )
        items: Iterable[Item] = _dataset_items(Path(data[0]), split, tokenizer)
    else:
        from xinslm.data.read import read_documents

        items = _encode(read_documents(data), tokenizer)
    found = list(islice(items, max_documents))
    if max_documents is not None and len(found) < max_documents:
        raise UsageError(
            f"--max-documents {max_documents}: {' '.join(data)} has only {len(found):,} documents"
        )
    if not any(item.scored.any() for item in found):
        raise XinslmError(
            f"{' '.join(data)}: there is nothing to score in its {len(found):,} documents"
        )
    return found


def frequencies_bits_per_byte(data: tuple[str, ...], split: str) -> float | None:
    """Bits per byte from token frequencies alone on a dataset's split; None for raw files."""
    if not (Path(data[0]) / MANIFEST).is_file():
        return None
    from xinslm.data.dataset import open_dataset
    from xinslm.data.unigram import unigram_bits_per_byte

    return unigram_bits_per_byte(open_dataset(Path(data[0])), split)


def _encode(documents: Iterable["Document"], tokenizer: "Tokenizer") -> Iterator[Item]:
    """Encode raw documents; chats by the tokenizer's template."""
    from xinslm.data.encode import Encoder

    encoder = Encoder(tokenizer, "none", train_on_prompts=False)
    documents = iter(documents)
    while batch := list(islice(documents, 256)):
        for document, encoded in zip(batch, encoder(batch), strict=True):
            yield _item(document.source, encoded.tokens, encoded.mask, encoded.num_bytes, tokenizer)


def _item(
    source: str, tokens: np.ndarray, mask: np.ndarray, num_bytes: int, tokenizer: "Tokenizer"
) -> Item:
    """Mark the scored tokens, and drop the tokens after the last of them.

    The first token of a text whose tokenizer adds no start token is predicted from the prefix.
    """
    special = np.fromiter(tokenizer.special_tokens.values(), np.int64)
    if not tokenizer.start_ids and len(tokens) and mask[1:].all() and tokens[0] not in special:
        tokens = np.concatenate([prefix_ids(tokenizer), tokens])
        mask = np.ones(len(tokens), np.uint8)
    scored = (mask > 0) & ~np.isin(tokens, special)
    scored[:1] = False
    end = int(scored.nonzero()[0][-1]) + 1 if scored.any() else 1
    return Item(source, tokens[:end].astype(np.int64), scored[:end], int(num_bytes))


def _dataset_items(folder: Path, split: str, tokenizer: "Tokenizer") -> Iterator[Item]:
    from xinslm.data.dataset import open_dataset
    from xinslm.tokenizer.load import load_tokenizer

    dataset = open_dataset(folder)
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint():
        yield from _encode(_texts(dataset, split, load_tokenizer(folder / "tokenizer")), tokenizer)
        return
    for source, tokens, mask, num_bytes in _stored(dataset, split):
        yield _item(source, tokens, mask, num_bytes, tokenizer)


def _stored(dataset: "Dataset", split: str) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """Yield the documents of a split: source, tokens, mask, bytes."""
    stored = dataset.split(split)
    for index, num_bytes in enumerate(stored.document_bytes):
        part = slice(stored.documents[index], stored.documents[index + 1])
        yield (
            f"{dataset.folder} {split} document {index}",
            stored.tokens[part],
            stored.mask[part],
            int(num_bytes),
        )


def _texts(dataset: "Dataset", split: str, tokenizer: "Tokenizer") -> Iterator["Document"]:
    """Decode a dataset's documents with its own tokenizer."""
    from xinslm.data.records import Document

    special = np.fromiter(tokenizer.special_tokens.values(), np.int64)
    start = len(tokenizer.start_ids)
    for source, tokens, mask, num_bytes in _stored(dataset, split):
        ids = tokens[start:]
        if len(ids) and ids[-1] in (tokenizer.eos_id, tokenizer.bos_id):
            ids = ids[:-1]
        if not mask[max(1, start) :].all() or np.isin(ids, special).any():
            raise UsageError(
                f"{source} is a chat that was encoded with another tokenizer than the model's, "
                "and cannot be "
                "turned back. Prepare the data again with the model's tokenizer, or give the raw "
                "files"
            )
        text = tokenizer.decode(ids.tolist())
        if len(text.encode()) != num_bytes:
            raise XinslmError(
                f"{source}: the dataset's tokenizer does not give its text back "
                f"({len(text.encode()):,} "
                f"bytes, not {num_bytes:,}). Give the raw files with --data-path"
            )
        yield Document(source, text=text)
