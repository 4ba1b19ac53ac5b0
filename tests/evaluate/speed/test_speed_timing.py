"""Token counts and order of the timed calls, on an engine whose times are known."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.speed.timing import EngineTimer, Sizes, fit, time_model
from xinslm.inference.engine import common_prefix

PER_TOKEN, PER_STEP, PER_POSITION = 1 / 1024, 1 / 128, 1 / 65536  # exact in binary


class FakeEngine:
    """Takes a known time for each token that it computes."""

    name = "fake"

    def __init__(self, wait, context_length: int = 4096, reuses: bool = True) -> None:
        self.wait, self.context_length, self.reuses = wait, context_length, reuses
        self.tokenizer = SimpleNamespace(vocab_size=50)
        self.ids: list[int] = []
        self.reused = self.longest = 0

    @property
    def position(self) -> int:
        return len(self.ids)

    def start(self, ids):
        self.reused = min(common_prefix(self.ids, ids), len(ids) - 1) if self.reuses else 0
        self.ids = list(ids)
        self.wait(PER_TOKEN * (len(ids) - self.reused))
        return self._logits()

    def step(self, token):
        self.wait(PER_STEP + PER_POSITION * self.position)
        self.ids.append(token)
        return self._logits()

    def reset(self) -> None:
        self.ids, self.reused = [], 0

    def _logits(self):
        assert len(self.ids) <= self.context_length
        self.longest = max(self.longest, len(self.ids))
        return np.eye(50, dtype=np.float32)[self.ids[-1]]


class Clock:
    now = 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


def timed(sizes: Sizes, **changes):
    clock = Clock()
    engine = FakeEngine(clock.wait, **changes)
    return time_model(EngineTimer(engine, lambda: clock.now), sizes), engine


def test_speeds_are_those_of_the_engine_at_every_depth() -> None:
    timings, _ = timed(Sizes((0, 512, 1536), prompt_tokens=128, decode_tokens=32))
    assert timings.first_token_seconds == 128 * PER_TOKEN
    assert [speed.depth for speed in timings.speeds] == [0, 512, 1536]
    for speed in timings.speeds:
        first = max(speed.depth, 1)  # tokens in the context at the first step
        seconds = sum(PER_STEP + PER_POSITION * (first + i) for i in range(32))
        assert speed.prefill == pytest.approx(1024, rel=1e-9)
        assert speed.decode == pytest.approx(32 / seconds, rel=1e-9)
    assert timings.speeds[0].decode > timings.speeds[1].decode > timings.speeds[2].decode


def test_a_sleeping_engine_is_timed_by_the_real_clock() -> None:
    start = time.perf_counter()
    timings = time_model(EngineTimer(FakeEngine(time.sleep)), Sizes((4,), 96, 12))
    elapsed = time.perf_counter() - start
    speed = timings.speeds[0]
    # sleep never returns early; a busy machine makes it late, by no more than the time that passed
    assert timings.first_token_seconds >= 96 * PER_TOKEN
    assert speed.prefill <= 1024 and speed.decode <= 128
    assert timings.first_token_seconds + 96 / speed.prefill + 12 / speed.decode <= elapsed


def test_the_context_that_is_needed_is_enough_and_no_more_than_one_too_many() -> None:
    for prompt, decode in ((7, 20), (20, 7), (1, 1)):
        sizes = Sizes((0, 30), prompt, decode)
        _, engine = timed(sizes, context_length=sizes.longest)
        assert sizes.longest - 1 == engine.longest


def test_an_engine_that_reads_everything_again_has_no_prefill_at_depth() -> None:
    timings, _ = timed(Sizes((0, 64), 16, 4), reuses=False)
    assert timings.speeds[0].prefill == pytest.approx(1024)
    assert timings.speeds[1].prefill is None and timings.speeds[1].decode > 0


def test_no_depth_leaves_the_time_to_the_first_token() -> None:
    timings, _ = timed(Sizes((), 16, 4))
    assert timings.first_token_seconds == 16 * PER_TOKEN and timings.speeds == ()


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(XinslmError, match="no measurable time"):
        time_model(EngineTimer(FakeEngine(lambda seconds: None), lambda: 0.0), Sizes((0,), 4, 4))


@pytest.mark.parametrize("context", [3, 4, 40, 128, 129, 640, 641, 2000])
def test_what_fits_runs_and_what_is_left_out_does_not(context: int) -> None:
    asked = Sizes((512, 0, 512, 1536), 128, 32)
    sizes, notes = fit(asked, context)
    timings, engine = timed(sizes, context_length=context)
    assert engine.longest < context
    assert [speed.depth for speed in timings.speeds] == [
        depth for depth in (0, 512, 1536) if depth == 0 or depth + 128 < context
    ]
    left_out = 3 - len(sizes.depths)
    assert len([note for note in notes if "is left out" in note]) == left_out
    shortened = (sizes.prompt_tokens, sizes.decode_tokens) != (128, 32)
    assert shortened == (context < 129) and len(notes) == left_out + shortened


def test_the_notes_name_the_numbers() -> None:
    _, notes = fit(Sizes((0, 512), 128, 32), 100)
    assert notes == [
        "the context holds 100 tokens: 99 are read and 32 generated",
        "depth 512 is left out: it takes a context of 612 tokens, the model has 100",
    ]
    with pytest.raises(XinslmError, match="a context of 2 tokens is too short"):
        fit(Sizes((0,), 128, 32), 2)
