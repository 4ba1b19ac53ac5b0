"""Configuration of `cache`."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from xinslm.alignment import Alignment
from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import (
    CONTEXT,
    POSITIVE,
    SEED,
    TAIL_SAMPLE_MASS,
    Device,
    Dtype,
    Range,
    Settings,
    range_errors,
)
from xinslm.teachers.endpoint_config import EndpointConfig

DEPTH = Range(0, 1, above=True)
_CACHE = {
    "top_k": Range(1, 256),
    "tail_sample_mass": TAIL_SAMPLE_MASS,
    "temperature": POSITIVE,
    "max_seq_length": CONTEXT,
    "batch_tokens": Range(1),
    "shard_positions": Range(1),
    "hidden_state_width": Range(1, 4096),
    "seed": SEED,
}


def depth_errors(depths: tuple[float, ...], name: str) -> list[str]:
    """What is wrong with relative depths, which must be in (0, 1] and in rising order."""
    problems = ((depth, DEPTH.problem(depth)) for depth in depths)
    wrong = [f"{name} has {d}, but each must be {problem}" for d, problem in problems if problem]
    if not wrong and any(a >= b for a, b in pairwise(depths)):
        wrong.append(f"{name} must rise from one to the next: {' '.join(map(str, depths))}")
    return wrong


def default_top_k(top_k: int | None, tail_sample_mass: float) -> int:
    """`top_k`, or its default: 4 with tail samples, else 11 (41 bytes).

    A top-k token should have more mass than one tail sample represents.
    """
    if top_k is not None:
        return top_k
    return 4 if tail_sample_mass else 11


@dataclass(frozen=True)
class CacheConfig(Settings):
    """Score a dataset with a teacher, once, into a sparse cache."""

    teacher: Annotated[str, POSITIONAL]
    """Teacher: any causal model (a model, run or quantized folder, a GGUF file, a Hub name),
    or the URL of an OpenAI-compatible endpoint that scores given text (vLLM); an encoder's folder
    with --hidden-state-depths."""
    data_path: Path
    """Dataset folder made by `xinslm prepare`."""
    output_dir: Annotated[Path, Alias("-o")]
    """Cache folder to write; a run that was interrupted continues there."""
    top_k: int | None = None
    """Most likely tokens kept exactly at each position; by default 4, or 11 if there are no
    tail samples; with byte_prefix, buckets of tokens, by default 20."""
    tail_sample_mass: float = 0.02
    """Largest part of the distribution that one token sampled from its rest stands for: .02 gives
    up to 50 samples where the teacher is unsure, and 1 where it is sure; 0: no samples, for a loss
    that cannot use them (see `xinslm distill --help`, loss.tail-weight). Endpoints give none."""
    temperature: float = 2.0
    """Temperature of the stored normaliser, for temperature_mode full; with an endpoint, 1."""
    alignment: Alignment = "auto"
    """How teacher tokens map to student tokens if the tokenizers differ: nested (the student's
    vocabulary is a merge prefix of the teacher's) sums probabilities exactly, byte_prefix keeps the
    mass of tokens that begin with the same bytes; auto takes the first that is possible."""
    hidden_state_depths: tuple[float, ...] = ()
    """Depths whose hidden states to keep, as shares of the teacher's layers: 0.5 1.0."""
    hidden_state_width: int = 64
    """Bytes of a projected hidden state, at each depth; two more are its scale."""
    max_seq_length: int = 512
    """Longest context in tokens the teacher sees; use the student's."""
    batch_tokens: int = 2048
    """Tokens per forward pass of the teacher."""
    shard_positions: int = 1 << 18
    """Approximate number of positions in a shard file."""
    dtype: Dtype = "auto"
    """The teacher's number type; auto: float32, products in bfloat16 on CPUs with AMX."""
    device: Device = "auto"
    """Where the teacher runs; auto takes cuda, then mps, then cpu."""
    adapter: Path | None = None
    """LoRA adapter to score with, made by `xinslm adapt`, or another in peft's layout."""
    revision: str | None = None
    """Hub revision of the teacher."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository brings."""
    teacher_tokenizer_path: str | None = None
    """Tokenizer of an endpoint's model, or one instead of the model's own."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """For a teacher that is a URL."""
    seed: int = 0
    """Seed of the tail samples."""
    repair: bool = False
    """Rebuild only damaged and missing files of a finished cache; pass its other options too."""
    force: bool = False
    """Replace what is in the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        depths = depth_errors(self.hidden_state_depths, "hidden_state_depths")
        return [*range_errors(self, _CACHE), *depths, *self.endpoint.errors()]
