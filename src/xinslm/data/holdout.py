"""Which documents are held back for validation.

A document's own content and the seed decide, so that data added later moves no document to the
other side, and copies of a document stay together.
"""

import hashlib

from xinslm.data.records import Document


def draw_number(digest: bytes, seed: int) -> float:
    """Turn the hash of a document and the seed into a number that is uniform in [0, 1)."""
    drawn = hashlib.blake2b(digest, digest_size=6, key=str(seed).encode()).digest()
    return int.from_bytes(drawn, "big") / 2**48


def cut_text(document: Document, fraction: float) -> tuple[Document, Document]:
    """Cut off the last `fraction` of a text of at least 2 characters, at a line end or a space if
    it can.
    """
    text = document.plain_text
    at = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    for separator in ("\n", " "):
        found = (text.rfind(separator, 0, at), text.find(separator, at, len(text) - 1))
        near = [position + 1 for position in found if position >= 0]
        if near:
            at = min(near, key=lambda position: abs(position - at))
            break
    return Document(document.source, text=text[:at]), Document(document.source, text=text[at:])
