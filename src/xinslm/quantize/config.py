"""Options of `xinslm quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xinslm.ranges import SEED, Range, Settings, range_errors

_QUANTIZE = {"num_calibration_samples": Range(1), "max_seq_length": Range(1), "seed": SEED}


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """Turn a model's weights into 4-bit or 8-bit codes with one fp16 scale per 32 weights."""

    model: Annotated[Path, tyro.conf.Positional]
    """Model to quantize: a model or run folder, a GGUF file, or a Hub name."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write: codes, scales, config and tokenizer."""
    data_path: Path | None = None
    """Dataset folder made with this model's tokenizer; its train split calibrates GPTQ (4 bits)."""
    bits: int = 4
    """Bits per weight of the linear layers, 4 or 8; embedding and LM head always have 8 bits."""
    method: Literal["gptq", "rtn", "keep"] = "gptq"
    """gptq feeds rounding errors forward (needs --data-path); rtn, and 8 bits, only round; keep
    takes over the codes of a GGUF of Q4_0 or Q8_0, or of a folder of compressed-tensors, GPTQ or
    MLX with symmetric groups of 32.
    """
    num_calibration_samples: int = 128
    """Number of packed rows of the train split that calibrate GPTQ."""
    max_seq_length: int | None = None
    """Tokens per calibration row; by default the model's context, at most 512."""
    seed: int = 0
    """Selects the calibration rows."""
    run: Path | None = None
    """Run folder whose report lists the result."""
    force: bool = False
    """Replace what is at the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _QUANTIZE)
        if self.bits not in (4, 8):
            wrong.append(f"bits is {self.bits}, but must be 4 or 8")
        if self.calibrates and self.data_path is None:
            wrong.append(
                "GPTQ at 4 bits needs text to calibrate on: add --data-path DATASET (a folder that "
                "`xinslm prepare` made), or choose --method rtn, which needs none and loses more"
            )
        return wrong

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is used."""
        return self.bits == 4 and self.method == "gptq"
