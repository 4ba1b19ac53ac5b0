"""Which layers to keep.

Layers are removed one by one, each time the one whose removal costs the least loss on calibration
text, or all at once those with the smallest block influence (ShortGPT, arXiv:2403.03853).
Candidates that differ from some layer on share the states before it, which halves the work.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from xinslm.model.transformer import Transformer
from xinslm.prune.measure import Passage, sum_of_losses


def choose_by_influence(influence: Sequence[float], count: int) -> list[int]:
    """Return the `count` layers with the largest influence, in their order."""
    return sorted(
        sorted(range(len(influence)), key=lambda layer: (-influence[layer], layer))[:count]
    )


def choose_by_loss(
    teacher: Transformer,
    count: int,
    passages: Sequence[Passage],
    on_layer: Callable[[int], None],
) -> list[int]:
    """Remove layers one at a time, always the one without which the loss on the passages is the
    lowest, until `count` are left.
    """
    kept = list(range(teacher.config.num_hidden_layers))
    while len(kept) > count:
        totals = [0.0] * len(kept)
        for passage in passages:
            found = _losses_without(teacher, kept, passage)
            totals = [total + one for total, one in zip(totals, found, strict=True)]
        kept.pop(totals.index(min(totals)))
        on_layer(teacher.config.num_hidden_layers - len(kept))
    return kept


def _losses_without(teacher: Transformer, kept: Sequence[int], passage: Passage) -> list[float]:
    """Sum of losses without each of the layers `kept` in turn."""
    with passage.forward():
        x = teacher.model.embed_tokens(passage.ids)
        cos, sin = teacher.rotary(passage.positions, x.dtype)
        mask = teacher.attended(passage.ids, passage.segments)

        def through(layers: Sequence[int], states: Tensor) -> Tensor:
            for layer in layers:
                states = teacher.model.layers[layer](states, cos, sin, mask)
            return states

        losses = []
        for place, layer in enumerate(kept):
            hidden = teacher.model.norm(through(kept[place + 1 :], x))
            losses.append(sum_of_losses(teacher, hidden, passage))
            x = through([layer], x)
    return losses
