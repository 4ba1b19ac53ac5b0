"""What a program that loads the package finds in its description."""

import json
from collections.abc import Mapping

from xinslm.export.coreml.neural_engine import HIDDEN, POSITION, TOKENS
from xinslm.export.coreml.package import Package
from xinslm.export.coreml.program import INPUT_IDS, KEYS, MASK, VALUES
from xinslm.model.source import ModelSource

UNITS = {
    "cpu-and-gpu": "cpuAndGPU",
    "cpu-only": "cpuOnly",
    "all": "all",
    "cpu-and-neural-engine": "cpuAndNeuralEngine",
}
"""Cases of Swift's `MLComputeUnits`."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_INPUTS = {
    INPUT_IDS: "Token ids, 1 x T: a prompt, or one token after those in the states.",
    MASK: "Added to the attention scores, 1 x 1 x T x S: 0 where a token sees another, else "
    "-65504. S counts all tokens, those in the states and the T new ones.",
}
_FIXED_INPUTS = {
    INPUT_IDS: f"{TOKENS} token ids: the next ones of the text; fill up behind its end.",
    MASK: "Added to the attention scores, 1 x 1 x T x S: 0 where a token sees a place of the "
    f"states, else {HIDDEN:g}.",
    POSITION: f"Number of tokens in the states, at most S - {TOKENS}: place of the first new one.",
}


def describe(
    package: Package, units: str, source: ModelSource, length: int, types: Mapping[str, int]
) -> None:
    """Write descriptions of inputs and output, and metadata; `units` is a key of `UNITS`."""
    description = package.spec.description
    fixed = any(feature.name == POSITION for feature in description.input)
    for feature in description.input:
        feature.shortDescription = (_FIXED_INPUTS if fixed else _INPUTS)[feature.name]
    description.output[0].shortDescription = "Scores of the next token, 1 x T x vocabulary."
    metadata, settings = description.metadata, source.settings
    metadata.shortDescription = (
        f"{settings.get('model_type')} language model; load it with computeUnits = .{UNITS[units]}"
    )
    facts = {
        "context_length": length,
        "vocab_size": source.config.vocab_size,
        "states": f"{KEYS},{VALUES}",
        "compute_units": UNITS[units],
        "weights": ", ".join(f"{count} {kind}" for kind, count in sorted(types.items())),
        "source": source.fingerprint,
        **({"tokens_per_call": TOKENS} if fixed else {}),
        **{key: settings[key] for key in _TOKENS if settings.get(key) is not None},
    }
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        metadata.userDefined[f"xinslm.{key}"] = text
    package.save_spec()
