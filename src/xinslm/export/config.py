"""Options of `xinslm export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xinslm.ranges import Settings


@dataclass(frozen=True)
class GgufConfig(Settings):
    """Write a model as one GGUF file for llama.cpp, Ollama and LM Studio."""

    model: Annotated[Path, tyro.conf.Positional]
    """Quantized folder, model folder, run folder (its best checkpoint) or Hub name."""
    output_path: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write; by convention its name ends in .gguf."""
    outtype: Literal["f32", "f16", "bf16"] | None = None
    """Type of the matrices of an unquantized model, by default f16; a quantized one keeps its
    own.
    """
    run: Path | None = None
    """Run folder whose report lists the file."""
    force: bool = False
    """Replace the file if it exists."""
