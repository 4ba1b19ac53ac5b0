"""Drawing a token in the native library; `inference.sampling.Sampler` defines it."""

import ctypes
from collections.abc import Sequence

import numpy as np

from xinslm.native.bindings import (
    SamplingSettings,
    checked,
    floats,
    functions,
    whole_numbers,
)
from xinslm.sampling import Sampling


def draw(
    logits: np.ndarray, settings: Sampling, seen: Sequence[int], uniform: float
) -> tuple[int, float]:
    """Draw a token from float32 logits (vocabulary,) with a number in [0, 1); return it and its
    natural log-probability before any filter. XinslmError if a logit is NaN or
    infinite, -infinity excepted.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    before = np.array(seen if settings.repetition_penalty != 1 else [], np.int32)
    values = SamplingSettings(
        settings.temperature,
        settings.top_p,
        settings.min_p,
        settings.repetition_penalty,
        min(settings.top_k, len(logits)),
    )
    log_probability = ctypes.c_double()
    token = checked(
        functions().xl_sample(
            *(floats(logits), len(logits), values),
            *(whole_numbers(before), len(before), uniform, log_probability),
        )
    )
    return int(token), log_probability.value
