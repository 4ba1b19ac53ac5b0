"""Settings of training: a base for every command that trains, and those of `pretrain`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import Alias
from xinslm.ranges import (
    CONTEXT,
    POSITIVE,
    SEED,
    SHARE,
    ComputeDtype,
    Device,
    Range,
    Settings,
    range_errors,
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "sliding_window",
)
_TRAINING = {
    "max_seq_length": CONTEXT,
    "batch_size": Range(1, 1_000_000),
    "learning_rate": POSITIVE,
    "warmup_ratio": SHARE,
    "decay_ratio": SHARE,
    "weight_decay": Range(0),
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "max_grad_norm": Range(0),
    "max_eval_samples": Range(0),
    "save_steps": Range(1),
    "logging_steps": Range(1),
    "seed": SEED,
}
_PRETRAIN = {
    **dict.fromkeys(_SIZES, Range(1)),
    "num_epochs": POSITIVE,
    "max_steps": Range(1),
    "eval_steps": Range(1),
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Settings that every training run shares."""

    output_dir: Annotated[Path, Alias("-o")]
    """Run folder to write; a run that was interrupted continues there."""
    max_seq_length: int = 512
    """Tokens in a packed row; the model's context."""
    batch_size: int = 8
    """Packed rows in an optimizer step."""
    micro_batch_size: int | None = None
    """Rows in one forward pass; the step accumulates over them. All, if not given."""
    learning_rate: float = 2e-3
    """Peak of the warmup-stable-decay schedule."""
    warmup_ratio: float = 0.05
    """Share of the steps, 0 to 1, in which the rate rises from 0."""
    decay_ratio: float = 0.3
    """Share of the steps, 0 to 1, in which the rate falls linearly to 0."""
    weight_decay: float = 0.1
    """The optimizer's decoupled decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.95
    """AdamW's decay of the second moment."""
    max_grad_norm: float = 1.0
    """Largest L2 norm of the gradient; 0 for no limit."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit keeps its moments in a quarter of the memory; muon takes the hidden matrices, AdamW
    the rest.
    """
    max_eval_samples: int = 64
    """Packed validation rows to use at most; 0 for all."""
    save_steps: int = 200
    """Steps between checkpoints; there is one at the end and on Ctrl-C in any case."""
    logging_steps: int | None = None
    """Steps between lines of metrics.jsonl; a 50th of the run and at most 10, if not given."""
    compute_dtype: ComputeDtype = "auto"
    """Number type of activations and matrix products; the weights and their updates stay in
    param_dtype. auto: bfloat16 where the processor multiplies it faster.
    """
    device: Device = "auto"
    """Where to train; auto takes cuda, then mps, then cpu."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass to save memory."""
    seed: int = 0
    """Seed of the starting weights and of the order of rows."""
    force: bool = False
    """Replace what is in the run folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _TRAINING)
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            wrong.append(f"micro_batch_size ({micro}) must divide batch_size ({self.batch_size})")
        if self.warmup_ratio + self.decay_ratio > 1:
            wrong.append(
                f"warmup_ratio ({self.warmup_ratio}) and decay_ratio "
                f"({self.decay_ratio}) must not add up to more than 1"
            )
        return wrong


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Train a model on text, without a teacher."""

    data_path: Path
    """Dataset folder made by `xinslm prepare`, or raw text, which is then prepared into the run
    folder.
    """
    tokenizer_path: Path | None = None
    """Tokenizer for raw text: its folder, any model, or a Hub name; without one, one is
    trained on it.
    """
    init_from: Path | None = None
    """Model whose weights to start from; its shape is used."""
    preset: Literal["1m", "10m", "135m", "360m", "1b"] = "1m"
    """Shape of the model, by parameters; other options change single sizes of it."""
    vocab_size: int | None = None
    """Vocabulary of a tokenizer trained on the way (8192 if not given)."""
    hidden_size: int | None = None
    """Width of the residual stream; by default the preset's, as are the sizes below."""
    num_layers: int | None = None
    """Decoder blocks."""
    num_heads: int | None = None
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (GQA)."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_heads if one of these is given."""
    intermediate_size: int | None = None
    """Width of the feed-forward."""
    tie_word_embeddings: bool = True
    """Use the embedding as output head."""
    sliding_window: int | None = None
    """Tokens each token sees; all, if not given."""
    num_epochs: float = 1.0
    """Passes over the training split."""
    max_steps: int | None = None
    """Optimizer steps, instead of epochs."""
    eval_steps: int | None = None
    """Steps between validations; a tenth of the run and at most 100, if not given. There is one at
    the end in any case.
    """
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the matrices are stored in; bfloat16 halves their memory, and their updates are rounded
    stochastically.
    """
    quantization_aware: bool = False
    """Compute with the linear layers at 4 bits while the weights learn in full precision: for the
    last steps, from a trained model (--init-from). `quantize` then rounds in the same way.
    """
    optimizer_in_backward: bool = False
    """Step each weight inside the backward pass and free its gradient: no memory for gradients, no
    micro-batches; max_grad_norm then acts on the norm of the step before, or on that of the
    gradients that have come, if it is larger."""
    compile: bool = False
    """Compile the forward pass with torch.compile: needs a C++ compiler, and minutes before the
    first step.
    """

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [*super().errors(), *range_errors(self, _PRETRAIN)]
        if self.optimizer_in_backward and self.micro_batch_size not in (None, self.batch_size):
            wrong.append(
                "optimizer_in_backward frees each gradient at once, so nothing can accumulate over "
                "micro-batches: drop micro_batch_size and take a smaller batch_size, or drop "
                "optimizer_in_backward"
            )
        if self.quantization_aware and self.compile:
            wrong.append("compile does not work with quantization_aware: drop one of them")
        if self.vocab_size is not None and self.tokenizer_path is not None:
            wrong.append(
                "vocab_size is for a tokenizer trained on the way, tokenizer_path gives one: drop "
                "one of them"
            )
        return wrong

    def text_tokenizer(self) -> Path | None:
        """Tokenizer for raw text; None to train one on it."""
        return self.tokenizer_path

    def prepared_only(self) -> str | None:
        """Why `data_path` must be a prepared dataset; None if raw text will do."""
        return None
