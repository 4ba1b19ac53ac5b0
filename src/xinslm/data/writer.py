"""Writes one split of a dataset folder as a stream.

Tokens and mask are written to disk immediately; only offsets stay in memory.
"""

import io
from pathlib import Path

import numpy as np


class SplitWriter:
    """The files of `folder` (train or validation), open for appending documents."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        folder.mkdir()
        self.folder = folder
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.documents = [0]
        self.document_bytes: list[int] = []
        self.sources: list[int] = []
        self.targets = 0
        self._tokens = open(folder / "tokens.bin", "w+b")  # noqa: SIM115 closed by __exit__
        self._mask = open(folder / "mask.bin", "w+b")  # noqa: SIM115

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._tokens.close()
        finally:
            self._mask.close()

    def __len__(self) -> int:
        return len(self.document_bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self.documents[-1]

    def append(self, tokens: np.ndarray, mask: np.ndarray, num_bytes: int, source: int = 0) -> None:
        """Write one document: ids, mask (1 = target), bytes of its text, index of its source."""
        self._tokens.write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        self._mask.write(np.ascontiguousarray(mask, np.uint8).tobytes())
        self.documents.append(self.documents[-1] + len(tokens))
        self.document_bytes.append(num_bytes)
        self.sources.append(source)
        self.targets += int(np.count_nonzero(mask))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return the arguments of `append` for a document; nothing can be appended afterwards."""
        begin, end = self.documents[index], self.documents[index + 1]
        parts = []
        for file, dtype in ((self._tokens, self.dtype), (self._mask, np.dtype(np.uint8))):
            file.seek(begin * dtype.itemsize)
            parts.append(np.frombuffer(file.read((end - begin) * dtype.itemsize), dtype))
        return parts[0], parts[1], self.document_bytes[index], self.sources[index]

    def finish(self) -> dict[str, int]:
        """Write the offsets and return the split's counts for the manifest."""
        self._tokens.flush()
        self._mask.flush()
        _save(self.folder / "documents.npy", self.documents)
        _save(self.folder / "document_bytes.npy", self.document_bytes)
        _save(self.folder / "document_sources.npy", self.sources)
        return {
            "documents": len(self),
            "tokens": self.num_tokens,
            "targets": self.targets,
            "bytes": sum(self.document_bytes),
        }


def _save(path: Path, values: list[int]) -> None:
    """Write an int64 .npy file; np.save to a path would hide that the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, np.int64), allow_pickle=False)
    path.write_bytes(buffer.getvalue())
