"""Options of `xinslm prune`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import POSITIVE, SEED, ComputeDtype, Device, Range, Settings, range_errors

_RANGES = {
    **dict.fromkeys(
        ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
        Range(1),
    ),
    "num_calibration_samples": Range(1, 1_000_000),
    "num_search_samples": Range(1, 1_000_000),
    "max_eval_samples": Range(1, 1_000_000),
    "max_seq_length": Range(2, 1_000_000),
    "ridge": POSITIVE,
    "seed": SEED,
}


@dataclass(frozen=True, kw_only=True)
class PruneConfig(Settings):
    """Cut a student out of a teacher; sizes that are not given stay the teacher's."""

    teacher: Annotated[str, POSITIONAL]
    """LLaMA, Mistral, Qwen2 or Qwen3: a folder, a GGUF file, or a Hub name."""
    data_path: Path
    """Dataset folder made by `xinslm prepare`, with the teacher's tokenizer or one nested in it;
    the student gets its tokenizer."""
    output_dir: Annotated[Path, Alias("-o")]
    """Model folder to write; `xinslm distill --init-from` takes it."""
    num_layers: int | None = None
    """Decoder blocks to keep; by default the teacher's, as are the sizes below."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_heads: int | None = None
    """Query heads to keep in a layer."""
    num_kv_heads: int | None = None
    """Key and value heads in a layer; merged where their query heads stay."""
    head_dim: int | None = None
    """Width of a head; can only be the teacher's."""
    intermediate_size: int | None = None
    """Neurons of the feed-forward to keep in a layer."""
    tie_word_embeddings: bool | None = None
    """Use the embedding as output head; as in the teacher, if not given."""
    layers: Literal["loss", "influence"] = "loss"
    """How to choose layers: one by one, that whose absence costs the least loss (about half of
    num_layers passes over the search rows for each), or at once, those that turn their input the
    most (one pass)."""
    compensate: bool = True
    """Fit what is left to the teacher's activations by least squares; kept where it lowers the loss
    on search rows.
    """
    ridge: float = 0.1
    """Pull of that fit towards the plainly cut weights, as a share of the inputs' mean square."""
    num_calibration_samples: int = 64
    """Packed rows of the train split that activations are measured on."""
    num_search_samples: int = 16
    """Packed rows of the train split, others than those, that choices are made on."""
    max_eval_samples: int = 32
    """Packed rows of the validation split that the losses are reported on."""
    max_seq_length: int | None = None
    """Tokens in a packed row; the teacher's context, at most 512, where not given."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    compute_dtype: ComputeDtype = "auto"
    """Number type of the products in forward passes; weights and fits stay float32. auto: bfloat16
    where the processor multiplies it faster.
    """
    seed: int = 0
    """Chooses the rows, and draws the random model that the student is compared with."""
    force: bool = False
    """Replace what is at the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        return range_errors(self, _RANGES)
