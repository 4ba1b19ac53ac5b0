"""The top k of on-policy text: the tokens that the student considers likely.

The reverse divergences weight by the student's probabilities, so the teacher must be known exactly
where the student has its mass. The top k is the student's most likely tokens (kept during
generation), the label, and as many of the teacher's most likely tokens as fit. The rest is tail
mass, so no bucket is ever dropped: a sum over a truncated distribution would be minimal with no
mass there at all.

Codes reach 20 nats: a top-k token with a teacher probability below e^-20 counts as e^-20 (2e-9), so
the log-ratio of student to teacher is bounded by 20 nats there.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import Dataset, Split
from xinslm.errors import XinslmError
from xinslm.tokenizer.base import id_dtype
from xinslm.topk import blocked_topk

FILE = "support.npy"
"""File in a split's folder: (targets, s) ids, uint16 or uint32, one row per target."""
TEACHERS = 4
"""Least number of the teacher's own most likely tokens in a top k."""


class Support:
    """The student's most likely tokens at each target of a split."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    @property
    def top_k(self) -> int:
        """Size that has room for all three kinds of tokens."""
        return int(self.ids.shape[1]) + 1 + TEACHERS

    def of(self, split: Split, first: int, last: int) -> np.ndarray:
        """Rows of the targets of documents `first` to `last` (not included)."""
        start, end = int(split.documents[first]), int(split.documents[last])
        before = int(np.count_nonzero(split.mask[:start]))
        return self.ids[before : before + int(np.count_nonzero(split.mask[start:end]))]


def read_support(dataset: Dataset) -> Support | None:
    """The support of a dataset that `onpolicy` made; None for any other."""
    path = dataset.folder / "train" / FILE
    if not path.is_file():
        return None
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    targets = dataset.manifest["splits"]["train"]["targets"]
    if ids.ndim != 2 or len(ids) != targets:
        raise XinslmError(
            f"{path} has shape {ids.shape} for {targets:,} targets: delete the round's folder"
        )
    return Support(ids)


def write_support(folder: Path, ids: np.ndarray, vocab_size: int) -> None:
    """Write (targets, s) ids into a split's folder."""
    np.save(folder / FILE, ids.astype(id_dtype(vocab_size)), allow_pickle=False)


def top_k_ids(probs: Tensor, support: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Distinct ids (N, top_k) int64: the support, the label, the teacher's most likely.

    probs: (N, V), the teacher's. support: (N, s) distinct ids, s < top_k <= V. labels: (N,).
    """
    own = blocked_topk(probs, top_k)[1]
    candidates = torch.cat((support, labels[:, None], own), dim=1)  # (N, s + 1 + top_k)
    equal = candidates[:, :, None] == candidates[:, None, :]
    again = equal.tril(diagonal=-1).any(dim=2)  # equal to one before it
    order = torch.argsort(again.to(torch.uint8), dim=1, stable=True)[:, :top_k]
    return candidates.gather(1, order)
