"""Options of `xinslm export` and `xinslm import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import CONTEXT, Range, Settings, range_errors

NEURAL_ENGINE = "cpu-and-neural-engine"
"""Compute units that a Core ML program is palettized for."""
CALIBRATED = "q4_k"
"""Type of a GGUF file whose codes are chosen by the export."""
_GGUF = {"num_calibration_samples": Range(1)}
_COREML = {"max_seq_length": CONTEXT, "num_calibration_samples": Range(1)}
_GROUP_SIZES = (8, 16, 32)


@dataclass(frozen=True)
class GgufConfig(Settings):
    """Write a model as one GGUF file for llama.cpp, Ollama and LM Studio."""

    model: Annotated[Path, POSITIONAL]
    """Any model: a model, run or quantized folder, a GGUF file, or a Hub name."""
    output_path: Annotated[Path, Alias("-o")]
    """File to write; by convention its name ends in .gguf."""
    outtype: Literal["f32", "f16", "bf16", "q4_k"] | None = None
    """Type of all matrices. By default those with codes on llama.cpp's grids, Q4_0 and Q8_0, keep
    them, whatever format holds them; the others are f16. q4_k chooses codes of llama.cpp's Q4_K
    (4.5 bits) anew, from a model that is not quantized: less loss than Q4_0, but only llama.cpp
    and programs built on it read them fast. Rows that are no multiple of 256 get Q5_0 (5.5 bits).
    """
    embedding_type: Literal["q8_0", "q6_k", "f16", "bf16", "f32"] | None = None
    """Type of the embedding and the LM head, by default as --outtype says, q8_0 for q4_k. q6_k
    takes 6.56 bits a weight instead of q8_0's 8.5, and needs a hidden size that is a multiple of
    256.
    """
    data_path: Path | None = None
    """Dataset folder made with this model's tokenizer: its train split calibrates --outtype q4_k,
    and the file's KL divergence is measured on its validation split. Without it codes are rounded
    to nearest, which loses more.
    """
    num_calibration_samples: int = 128
    """Number of packed rows of at most 512 tokens that calibrate --outtype q4_k."""
    run: Path | None = None
    """Run folder whose report lists the file."""
    force: bool = False
    """Replace the file, and its Modelfile and model card, if they exist."""
    ollama: bool = False
    """Also write a Modelfile next to the file: chat template, stop words, sampling."""
    lmstudio: str | None = None
    """PUBLISHER/NAME under which LM Studio finds the file: links it into LM Studio's folder."""
    lmstudio_dir: Path | None = None
    """LM Studio's folder of models, if it is not that of this user's installation."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _GGUF)
        if self.lmstudio_dir is not None and self.lmstudio is None:
            wrong.append("lmstudio_dir has no effect without --lmstudio PUBLISHER/NAME")
        if self.outtype != CALIBRATED and self.data_path is not None:
            wrong.append(f"data_path has no effect without --outtype {CALIBRATED}")
        if self.data_path is None and self.num_calibration_samples != 128:
            wrong.append("num_calibration_samples has no effect without --data-path")
        return wrong


@dataclass(frozen=True)
class PackedConfig(Settings):
    """Write a file that the native engine maps and uses in place."""

    model: Annotated[Path, POSITIONAL]
    """Any model: a model, run or quantized folder, a GGUF file, or a Hub name."""
    output_path: Annotated[Path, Alias("-o")]
    """File to write."""
    force: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class FolderConfig(Settings):
    """What the folders for other runtimes have in common."""

    model: Annotated[Path, POSITIONAL]
    """Any model; the codes of a quantized folder are kept, others are written unquantized."""
    output_dir: Annotated[Path, Alias("-o")]
    """Folder to write: config.json, model.safetensors, tokenizer and chat template."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the scales and of weights that stay unquantized, which the runtime computes in.
    Codes and scales are exact in each; norms and the embedding only in float32.
    """
    run: Path | None = None
    """Run folder whose report lists the folder."""
    force: bool = False
    """Replace the output folder if it already holds something."""


@dataclass(frozen=True)
class HfConfig(FolderConfig):
    """Write a model for transformers and vLLM; a quantized folder keeps its codes."""

    format: Literal["compressed-tensors", "gptq"] = "compressed-tensors"
    """Of quantized weights. compressed-tensors: read by transformers with that package, exact in
    float32, and by vLLM. gptq: read with gptqmodel, which keeps 4 bits in memory on a processor.
    """


@dataclass(frozen=True)
class MlxConfig(FolderConfig):
    """Write a model for mlx-lm on Apple silicon; a quantized folder keeps its codes."""


@dataclass(frozen=True)
class CoremlConfig(Settings):
    """Write a model as a Core ML program (macOS 15, iOS 18); a quantized folder keeps its codes,
    except for the Neural Engine.
    """

    model: Annotated[Path, POSITIONAL]
    """Any LLaMA, Mistral, Qwen2 or Qwen3; the codes of a quantized folder are kept, others are
    written in float16. For the Neural Engine take the model before it was quantized.
    """
    output_dir: Annotated[Path, Alias("-o")]
    """Folder to write: model.mlpackage, tokenizer and chat template."""
    max_seq_length: int | None = None
    """Tokens that the key-value cache holds, prompt and answer together; by default what the model
    allows, at most 2048. The cache takes its full size in memory.
    """
    compute_units: Literal["cpu-and-gpu", "cpu-only", "all", "cpu-and-neural-engine"] = (
        "cpu-and-gpu"
    )
    """What is to run the model, written into its metadata; the program that loads the model sets
    it. cpu-and-neural-engine makes palettes of the matrices, 4 bits and for the embedding 8, in a
    program of fixed shapes. `all` includes the Neural Engine and is refused for codes.
    """
    group_size: int = 16
    """Rows (output channels) that share a table of a palette: 8, 16 or 32."""
    data_path: Path | None = None
    """Dataset folder made with this model's tokenizer: its train split calibrates the palettes,
    and their KL divergence is measured on its validation split. Without it they are k-means of the
    weights alone, which loses more.
    """
    num_calibration_samples: int = 64
    """Number of packed rows of at most 512 tokens that calibrate palettes."""
    run: Path | None = None
    """Run folder whose report lists the folder."""
    force: bool = False
    """Replace the output folder if it already holds something."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _COREML)
        if self.group_size not in _GROUP_SIZES:
            wrong.append(f"group_size is {self.group_size}, but must be 8, 16 or 32")
        defaults = CoremlConfig(self.model, self.output_dir)
        if self.compute_units != NEURAL_ENGINE:
            wrong += [
                f"{name} has no effect without --compute-units {NEURAL_ENGINE}"
                for name in ("group_size", "data_path", "num_calibration_samples")
                if getattr(self, name) != getattr(defaults, name)
            ]
        return wrong


@dataclass(frozen=True)
class AllConfig(FolderConfig):
    """Write a model as GGUF with a Modelfile, for transformers and vLLM, and for mlx-lm, into one
    folder.
    """


@dataclass(frozen=True)
class ImportConfig(Settings):
    """Write a GGUF file, or any other model, as an ordinary Hugging Face folder."""

    model: Annotated[Path, POSITIONAL]
    """GGUF file, or any other model: a model, run or quantized folder, or a Hub name."""
    output_dir: Annotated[Path, Alias("-o")]
    """Folder to write: config.json, model.safetensors, tokenizer and chat template."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of the stored weights; auto takes the narrowest that holds each of them exactly."""
    tokenizer_path: Path | None = None
    """Tokenizer to use instead of the model's own."""
    force: bool = False
    """Replace the output folder if it already holds something."""


@dataclass(frozen=True)
class PublishConfig(Settings):
    """Upload an exported folder to the Hugging Face Hub."""

    folder: Annotated[Path, POSITIONAL]
    """What `export hf`, `export mlx` or `export all` wrote (of the last one the GGUF's files)."""
    repo: Annotated[str, POSITIONAL]
    """Name on the Hub, USER/NAME; a new repository is private."""
    public: bool = False
    """Make a new repository public."""
    message: str | None = None
    """Message of the commit."""
    dry_run: bool = False
    """Check everything here, show what would be uploaded, and stop."""
    force: bool = False
    """Replace files of the repository that have another content; others stay."""
