"""Configuration of `synthesize`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from xinslm.data.config import DocumentEnd
from xinslm.hints import POSITIONAL, Alias
from xinslm.inference.config import EngineName
from xinslm.ranges import (
    CONTEXT,
    SEED,
    TAIL_SAMPLE_MASS,
    Device,
    Dtype,
    Range,
    Settings,
    range_errors,
)
from xinslm.teachers.endpoint_config import EndpointConfig

_SYNTHESIZE = {
    "samples": Range(1, 10_000),
    "temperature": Range(0),
    "top_p": Range(0, 1, above=True),
    "repetition_penalty": Range(0, above=True),
    "max_new_tokens": Range(1, 1_000_000),
    "batch_size": Range(1, 65_536),
    "validation_fraction": Range(0, 1, below=True),
    "top_k": Range(1, 256),
    "tail_sample_mass": TAIL_SAMPLE_MASS,
    "cache_temperature": Range(0, above=True),
    "max_seq_length": CONTEXT,
    "seed": SEED,
}


@dataclass(frozen=True)
class SynthesizeConfig(Settings):
    """Let a teacher answer prompts; the answers become text, a dataset and a cache to distill
    from.
    """

    teacher: Annotated[str, POSITIONAL]
    """Teacher: any causal model (a model, run or quantized folder, a GGUF file, a Hub name),
    or the URL of an OpenAI-compatible endpoint (vLLM, llama.cpp, hosted models)."""
    prompts: Path
    """File of prompts: .jsonl, .json or .parquet with records as `prepare` reads them, answers
    optional; or .txt, each line the beginning of a text. Of MT-bench's turns only the first is
    used.
    """
    output_dir: Annotated[Path, Alias("-o")]
    """Folder for text.jsonl, data and cache; an interrupted run continues there."""
    samples: int = 1
    """Number of answers to each prompt."""
    temperature: float = 1.0
    """Below 1 sharpens, above 1 flattens the teacher's distribution; 0 always takes the most likely
    token.
    """
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities sum to this; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the prompt or the answer has already become less likely. For a local
    teacher.
    """
    max_new_tokens: int = 256
    """Most tokens of an answer; one that is cut off there, or at the teacher's context, is kept
    without an end token.
    """
    batch_size: int | None = None
    """Answers that a local teacher writes at once; by default up to 128, as many as 2 GiB of keys
    and values allow. A stopped run repeats at most twice as many.
    """
    tokenizer_path: str | None = None
    """Tokenizer of the dataset; by default the teacher's. A nested one can be cached from a teacher
    here.
    """
    teacher_tokenizer_path: str | None = None
    """Tokenizer of an endpoint's model, or one instead of the model's own."""
    document_end: DocumentEnd = "eos"
    """Token that ends a plain text; chats end as their template says."""
    validation_fraction: float = 0.05
    """Share of the prompts held back to measure on, with all their answers."""
    keep_cache: bool = True
    """Keep the teacher's distributions along with the text."""
    top_k: int | None = None
    """Most likely tokens that the cache keeps exactly at each position; by default 4, or 11 without
    tail samples.
    """
    tail_sample_mass: float = 0.02
    """Largest part of the distribution that a tail sample, a token drawn from its rest, stands for
    in the cache; 0: no samples. Endpoints give none."""
    cache_temperature: float = 2.0
    """Temperature whose normaliser the cache stores; endpoints support 1 only."""
    max_seq_length: int = 512
    """Longest context in tokens for the cache; use the student's. At most the teacher's."""
    engine: EngineName = "auto"
    """What writes the answers of a local teacher. native: C++, weights in 4 or 8 bits, activations
    in 8; pytorch: floats. auto takes native where it can run the model. The cache's distributions
    are computed in floats in any case.
    """
    dtype: Dtype = "auto"
    """Data type of the teacher in PyTorch; auto: it writes in bfloat16 where that is faster, and
    scores in float32, products in bfloat16 on CPUs with AMX.
    """
    device: Device = "auto"
    """Where the teacher runs; auto takes cuda, then mps, then cpu."""
    revision: str | None = None
    """Hub revision of the teacher."""
    trust_remote_code: bool = False
    """Run Python code from the teacher's repository."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Settings for a teacher that is a URL."""
    seed: int = 0
    """Seed of the answers and of the held-out prompts."""
    force: bool = False
    """Replace what is in the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _SYNTHESIZE) + self.endpoint.errors()
        if self.temperature == 0 and self.samples > 1:
            wrong.append(
                f"samples is {self.samples}, but at temperature 0 all answers to a "
                "prompt are the same"
            )
        return wrong
