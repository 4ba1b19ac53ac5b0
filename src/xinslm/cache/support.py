"""What an entry's top k holds where the student wrote the text itself: the tokens that the student
thinks likely.

The reverse divergences weigh by the student's probabilities, so the teacher must be known exactly
there, not where it itself has its mass. A head is the student's most likely tokens (kept when it
wrote), the token that came, and as many of the teacher's most likely ones as there is room for; the
rest is the tail's mass, so no bucket is ever dropped: a bare sum over a truncated head would be
minimised by putting no mass there at all.

Codes reach 20 nats. A top-k token that the teacher gives less than e^-20 counts as e^-20 (2e-9), so
the log-ratio of student to teacher is at most 20 nats there, where it would grow without limit.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xinslm.data.dataset import Dataset, Split
from xinslm.errors import XinslmError
from xinslm.topk import blocked_topk

FILE = "support.npy"
"""Beside a split's tokens: (targets, s) ids, uint16 or uint32, one row for each token that
counts.
"""
TEACHERS = 4
"""Places in a head for the teacher's own most likely tokens, at least."""


class Support:
    """The student's most likely tokens at each target of a split."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    @property
    def top_k(self) -> int:
        """Size of a head that has room for all three kinds."""
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
    np.save(
        folder / FILE,
        ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32),
        allow_pickle=False,
    )


def top_k_ids(probs: Tensor, support: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Distinct ids for heads, (N, head) int64: the support, the token that came, the teacher's most
    likely.

    probs: (N, V), the teacher's. support: (N, s) distinct ids, s < head <= V. labels: (N,).
    """
    own = blocked_topk(probs, top_k)[1]
    candidates = torch.cat((support, labels[:, None], own), dim=1)  # (N, s + 1 + head)
    equal = candidates[:, :, None] == candidates[:, None, :]
    again = equal.tril(diagonal=-1).any(dim=2)  # equal to one before it
    order = torch.argsort(again.to(torch.uint8), dim=1, stable=True)[:, :top_k]
    return candidates.gather(1, order)
