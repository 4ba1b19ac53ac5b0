"""Targets and hidden states from a live teacher that reads the training batch."""

from collections.abc import Sequence

import numpy as np
import torch

from xinslm.cache.projected_states import HiddenStateFormat, project_states
from xinslm.data.packing import Batch
from xinslm.losses.targets import DenseTargets, Targets
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.local import batches_by_length

BATCH_TOKENS = 8192
"""Tokens of one forward pass of a live teacher."""


class LiveTargets:
    """A teacher in memory: packed rows are split, so that it sees each document separately.

    With `shares`, relative depths, it also gives projected hidden states. One forward pass serves
    both if `projected_states` is called first.
    """

    def __init__(self, teacher: HuggingFaceTeacher, shares: Sequence[float] = ()) -> None:
        self.teacher, self.name = teacher, f"teacher {teacher.name}"
        self.format = HiddenStateFormat.of(shares, teacher.num_layers, teacher.hidden_size)
        self._read_already: tuple[Batch, torch.Tensor, np.ndarray] | None = None

    def projected_states(
        self, batch: Batch, chosen: np.ndarray, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the teacher on the batch; every position has projected hidden states."""
        states, hidden, row_of = self._read(batch, self.format.depths)
        self._read_already = batch, states, row_of
        wanted = torch.from_numpy(row_of[chosen]).to(states.device)
        found = project_states([x[wanted] for x in hidden], self.format)
        return found.to(device), torch.ones(len(chosen), dtype=torch.bool, device=device)

    def targets(self, batch: Batch, chosen: np.ndarray, device: torch.device) -> Targets:
        """Run the teacher on the batch; its head is applied when the loss asks for a chunk."""
        if self._read_already is not None and self._read_already[0] is batch:
            _, states, row_of = self._read_already
        else:
            states, _, row_of = self._read(batch, ())
        self._read_already = None
        wanted = torch.from_numpy(row_of[chosen]).to(states.device)

        def logits(rows: slice) -> torch.Tensor:
            return self.teacher.logits(states[wanted[rows]]).to(device)

        return DenseTargets(logits)

    def _read(
        self, batch: Batch, depths: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor], np.ndarray]:
        """States and hidden states of all tokens in some order, and the place of each flat position
        in it.
        """
        real = batch.segments.ravel() >= 0
        ids, starts = batch.input_ids.ravel()[real], batch.positions.ravel()[real] == 0
        sequences = np.split(np.arange(len(ids)), np.flatnonzero(starts)[1:])
        lengths = np.array([len(sequence) for sequence in sequences])
        order, parts, hidden_parts = [], [], []
        for batch_of in batches_by_length(lengths, BATCH_TOKENS):
            order += [sequences[k] for k in batch_of]
            texts = [ids[sequences[k]] for k in batch_of]
            if depths:
                states, hidden = self.teacher.states_and_hidden(texts, depths)
                hidden_parts.append(hidden)
            else:
                states = self.teacher.states(texts)
            parts.append(states)
        place = np.empty(len(ids), dtype=np.int64)  # where a token's state ended up
        place[np.concatenate(order)] = np.arange(len(ids))
        row_of = np.zeros(len(real), dtype=np.int64)
        row_of[real] = place
        return (
            torch.cat(parts),
            [torch.cat(of_depth) for of_depth in zip(*hidden_parts, strict=True)],
            row_of,
        )
