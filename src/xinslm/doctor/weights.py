"""Two models' weights next to each other: equal, rounded to a narrower type, or different.

One tensor of each is in memory at a time. Codes and scales (`ModelSource.stored`) are compared as
well as values, because the same values can come from other codes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xinslm.errors import XinslmError
from xinslm.model.source import ModelSource
from xinslm.model.stored import StoredWeight
from xinslm.progress import Listener, Progress, ignore

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NARROW = (torch.bfloat16, torch.float16)
SHOWN = 5
"""Weights that a message names."""
UNRELATED = 0.9
"""Relative error from which weights share nothing: two independent tensors have 1.4."""


@dataclass(frozen=True)
class Rounded:
    """A weight that one model holds as the other's, rounded to a narrower type."""

    name: str
    dtype: str
    side: str
    """'A' or 'B': the model with the rounded values."""


@dataclass(frozen=True)
class Differing:
    """A weight with other values."""

    name: str
    count: int
    size: int
    largest: float
    """Largest absolute difference."""
    squares: tuple[float, float]
    """Sums of squares: of the difference, and of A's values."""

    @property
    def relative(self) -> float:
        """Norm of the difference relative to that of A's weight."""
        return _ratio(*self.squares)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.count:,} of {self.size:,} values, by at most {self.largest:.3g}, "
            f"relative error {self.relative:.2g}"
        )


@dataclass
class Tally:
    """What a pass over all weights found; names in the order of model A."""

    equal: int = 0
    rounded: list[Rounded] = field(default_factory=list)
    differing: list[Differing] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    """Weights that only one model has, or of two shapes; a sentence each."""
    same_codes: int = 0
    """Weights whose codes and scales are equal."""
    other_codes: list[str] = field(default_factory=list)
    """Weights whose codes or scales differ; a sentence each."""
    codes_of_one: Counter[str] = field(default_factory=Counter)
    """Weights that only 'A' or only 'B' has codes of."""
    tied: str = ""
    """Which model alone shares its LM head with the embedding, 'A' or 'B'."""


class _Side:
    """One model; its LM head can be its embedding."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        source.require()
        source.require_tied()
        self.is_tied = bool(source.settings.get("tie_word_embeddings"))
        self.names = [
            name
            for name in source.names
            if not (name == HEAD and self.is_tied) and not name.endswith(".inv_freq")
        ]

    def _place(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.is_tied else name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape_of(self._place(name))

    def values(self, name: str) -> Tensor:
        return self.source.rows(self._place(name), self.shape(name))

    def codes(self, name: str) -> StoredWeight | None:
        weight = self.source.stored(self._place(name))
        return None if weight is None or weight.scales is None else weight


def compare_weights(a: ModelSource, b: ModelSource, on_progress: Listener = ignore) -> Tally:
    """Compare all weights of two models; XinslmError for weights that are damaged or not finite."""
    ours, theirs, tally = _Side(a), _Side(b), Tally()
    if ours.is_tied != theirs.is_tied:
        tally.tied = "A" if ours.is_tied else "B"
        tied = ours if ours.is_tied else theirs
        tied.names += [HEAD] if EMBEDDING in tied.names else []
    known = set(theirs.names)
    shared = [name for name in ours.names if name in known]
    for side, names in (("A", ours.names), ("B", theirs.names)):
        tally.misfits += _only(side, [name for name in names if name not in set(shared)])
    for done, name in enumerate(shared):
        on_progress(Progress("compare", done, len(shared), "tensors"))
        if ours.shape(name) != theirs.shape(name):
            tally.misfits.append(f"{name} has shapes {ours.shape(name)} and {theirs.shape(name)}")
            continue
        _compare_values(tally, name, ours.values(name), theirs.values(name))
        _compare_codes(tally, name, ours.codes(name), theirs.codes(name))
    on_progress(Progress("compare", len(shared), len(shared), "tensors"))
    return tally


def _only(side: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return [f"only in {side}: {names[0]}{more}"]


def _compare_values(tally: Tally, name: str, a: Tensor, b: Tensor) -> None:
    if torch.equal(a, b):
        tally.equal += 1
    elif (found := _rounding(a, b)) is not None:
        tally.rounded.append(Rounded(name, *found))
    else:
        difference = a - b
        squares = (_sum_of_squares(difference), _sum_of_squares(a))
        count = int(difference.count_nonzero())
        largest = float(difference.abs().max())
        tally.differing.append(Differing(name, count, a.numel(), largest, squares))


def _rounding(a: Tensor, b: Tensor) -> tuple[str, str] | None:
    """The type that explains all differences of two tensors as rounding, and the side with it.

    Each tensor can hold rounded values, as in a float16 and a bfloat16 copy of the same weights.
    """
    fits, found = a == b, None
    for side, exact, narrow in (("B", a, b), ("A", b, a)):
        for dtype in NARROW:
            if torch.equal(narrow.to(dtype).float(), narrow):
                nearest = exact.to(dtype).float()
                # a value halfway between two of the type may have been rounded from either side
                same = (narrow == nearest) | (exact + exact == narrow + nearest)
                if bool((same & ~fits).any()):
                    found = found or (str(dtype).removeprefix("torch."), side)
                    fits |= same
    return found if bool(fits.all()) else None


def _sum_of_squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _compare_codes(tally: Tally, name: str, a: StoredWeight | None, b: StoredWeight | None) -> None:
    if a is None or b is None:
        if a is not b:
            tally.codes_of_one["B" if a is None else "A"] += 1
        return
    if a.format != b.format:
        tally.other_codes.append(f"{name} is {a.format.upper()} in A, {b.format.upper()} in B")
        return
    assert a.scales is not None and b.scales is not None, "_Side.codes sees to it"
    codes = int((a.codes() != b.codes()).sum())
    scales = int((a.scales != b.scales).sum())
    if not codes and not scales:
        tally.same_codes += 1
        return
    tally.other_codes.append(
        f"{name}: {codes:,} of {a.codes().numel():,} codes and {scales:,} of "
        f"{a.scales.numel():,} scales differ"
    )


def describe_values(tally: Tally) -> str:
    """One or more lines on the values; XinslmError if they differ by more than rounding."""
    total = tally.equal + len(tally.rounded) + len(tally.differing)
    parts = [f"{tally.equal:,} of {total:,} weights equal"]
    parts += [f"{count} rounded to {where}" for where, count in _groups(tally.rounded)]
    shared = f"; {tally.tied} shares the LM head with the embedding" if tally.tied else ""
    first = ", ".join(parts) + shared
    if not tally.differing and not tally.misfits:
        return first
    lines = [f"{first}, {len(tally.differing):,} different"]
    if tally.differing:
        relative = _ratio(
            sum(found.squares[0] for found in tally.differing),
            sum(found.squares[1] for found in tally.differing),
        )
        lines[0] += f" with a relative error of {relative:.2g}: {_meaning(tally, relative)}"
    lines += _first([str(found) for found in tally.differing])
    raise XinslmError("\n".join(lines + tally.misfits[:SHOWN]))


def describe_codes(tally: Tally) -> str | None:
    """One or more lines on codes and scales; None if not both models have them.

    XinslmError if codes differ with their values.
    """
    alone = [f"{count:,} only in {side}" for side, count in sorted(tally.codes_of_one.items())]
    if not tally.same_codes and not tally.other_codes:
        return None
    text = ", ".join([f"codes and scales of {tally.same_codes:,} weights equal", *alone])
    if not tally.other_codes:
        return text
    lines = [f"{text}, of {len(tally.other_codes):,} different"]
    if not tally.differing:
        return f"{lines[0]}, which stand for the same values"
    raise XinslmError("\n".join(lines + _first(tally.other_codes)))


def rounding(tally: Tally) -> str:
    """'61 norms to bfloat16 in B', or '' if nothing is rounded."""
    return ", ".join(f"{count} to {where}" for where, count in _groups(tally.rounded))


def _groups(rounded: list[Rounded]) -> Iterator[tuple[str, str]]:
    """Type and side ('bfloat16 in B'), each with the weights: '1 embedding and 61 norms'."""
    groups: dict[str, Counter[str]] = {}
    for weight in rounded:
        groups.setdefault(f"{weight.dtype} in {weight.side}", Counter())[_part(weight.name)] += 1
    for where, parts in groups.items():
        yield where, " and ".join(_counted(part, count) for part, count in sorted(parts.items()))


def _part(name: str) -> str:
    if "norm" in name:
        return "norm"
    if name.endswith(".bias"):
        return "bias"
    return {HEAD: "LM head", EMBEDDING: "embedding"}.get(name, "other weight")


def _counted(part: str, count: int) -> str:
    if part in ("LM head", "embedding"):
        return f"the {part}"
    plural = "biases" if part == "bias" else f"{part}s"
    return f"{count:,} {part if count == 1 else plural}"


def _meaning(tally: Tally, relative: float) -> str:
    if relative > UNRELATED:
        return "these weights have nothing in common, or their rows are in another order"
    if tally.codes_of_one:
        side, _ = tally.codes_of_one.most_common(1)[0]
        return f"{side} is quantized"
    if tally.other_codes:
        return "quantized in another way, or from other weights"
    return "other weights, such as those after more training"


def _first(sentences: list[str]) -> list[str]:
    left = len(sentences) - SHOWN
    return sentences[:SHOWN] + ([f"and {left:,} more"] if left > 0 else [])


def _ratio(difference: float, size: float) -> float:
    return (difference / size) ** 0.5 if size else float("inf")
