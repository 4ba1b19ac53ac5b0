"""Results of the speed measurement: median and range over the repetitions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

MAX_SPREAD = 0.25
"""Repetitions that differ by more than this share of their median are called noisy."""


@dataclass(frozen=True)
class Figure:
    """One figure over the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Figure | None":
        """Median and range; None unless every repetition has a value."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        return cls(median(known), min(known), max(known))

    @property
    def spread(self) -> float:
        """Range as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class DepthSpeed:
    """Speed with `depth` tokens already in the context, tokens per second."""

    depth: int
    prefill: Figure | None
    """Reading the prompt; None if the engine cannot keep exactly `depth` tokens."""
    decode: Figure | None
    """Generating tokens one by one."""


@dataclass(frozen=True)
class SpeedResult:
    """One model in one engine. If `error` is set, nothing was measured."""

    model: str
    engine: str
    repetitions: int
    error: str | None = None
    """Why there are no figures."""
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    """Types of the weights and of the cached keys and values in memory."""
    version: str | None = None
    """Library that computes, with its version."""
    file_bytes: int | None = None
    """Size of the weight files."""
    prompt_tokens: int | None = None
    """Tokens read for each figure of prefill, and for the time to the first token."""
    decode_tokens: int | None = None
    """Tokens generated for each figure of decoding."""
    speeds: tuple[DepthSpeed, ...] = ()
    first_token_seconds: Figure | None = None
    """From the call of a loaded, warm model to the first token after the prompt."""
    load_seconds: Figure | None = None
    """From the start of the process to a loaded model, imports included. Mapped weights may be read
    from disk later.
    """
    peak_memory_bytes: Figure | None = None
    """Most resident memory of the process; of the host, if the device has memory of its own."""
    base_memory_bytes: Figure | None = None
    """The same before the model was loaded: Python and libraries."""
    energy_joules: Figure | None = None
    """Energy of the processor packages from the loaded model to the end, other processes' work
    included; None if the system does not report it.
    """
    other_load: float | None = None
    """Mean share of the machine's CPU time that other processes used; None if unknown."""
    noisy: bool = False
    """Whether a speed or the time to the first token differs by more than `MAX_SPREAD`."""
    notes: tuple[str, ...] = ()
    """What was left out or shortened, and why."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, with the spread of each figure."""
        content: dict[str, Any] = _with_spreads(self, asdict(self))
        content["speeds"] = [_with_spreads(speed, asdict(speed)) for speed in self.speeds]
        content["notes"] = list(self.notes)
        return content


def combine(model: str, engine: str, samples: Sequence[dict[str, Any]]) -> SpeedResult:
    """Make one result of the reports of all repetitions; see `worker.measure` for their keys."""
    first = samples[0]
    speeds = tuple(
        DepthSpeed(speed["depth"], *(_at(samples, index, key) for key in ("prefill", "decode")))
        for index, speed in enumerate(first["speeds"])
    )
    figures: dict[str, Any] = {
        name: Figure.of([sample[name] for sample in samples])
        for name in (
            "first_token_seconds",
            "load_seconds",
            "peak_memory_bytes",
            "base_memory_bytes",
            "energy_joules",
        )
    }
    timed = [figures["first_token_seconds"]]
    timed += [figure for speed in speeds for figure in (speed.prefill, speed.decode)]
    loads = [load for sample in samples if (load := sample["other_load"]) is not None]
    notes = [note for sample in samples for note in sample["notes"]]
    if len(samples) == 1:
        notes.append("one repetition: how much the figures vary is unknown")
    facts = ("threads", "device", "dtype", "version", "file_bytes")
    return SpeedResult(
        model=model,
        engine=engine,
        repetitions=len(samples),
        speeds=speeds,
        other_load=sum(loads) / len(loads) if loads else None,
        noisy=any(figure is not None and figure.spread > MAX_SPREAD for figure in timed),
        notes=tuple(dict.fromkeys(notes)),
        **{name: first[name] for name in (*facts, "prompt_tokens", "decode_tokens")},
        **figures,
    )


def _at(samples: Sequence[dict[str, Any]], index: int, key: str) -> Figure | None:
    return Figure.of([sample["speeds"][index][key] for sample in samples])


def _with_spreads(value: Any, content: dict[str, Any]) -> dict[str, Any]:
    for name in content:
        figure = getattr(value, name)
        if isinstance(figure, Figure):
            content[name]["spread"] = figure.spread
    return content
