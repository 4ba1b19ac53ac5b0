"""Options of `xinslm quantize`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import SEED, Range, Settings, range_errors

_QUANTIZE = {
    "num_calibration_samples": Range(1),
    "max_seq_length": Range(1),
    "scale_steps": Range(0),
    "seed": SEED,
}
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """Turn a model's weights into 4-bit or 8-bit codes with one fp16 scale per 32 weights."""

    model: Annotated[Path, POSITIONAL]
    """Model to quantize: a model or run folder, a GGUF file, or a Hub name."""
    output_dir: Annotated[Path, Alias("-o")]
    """Folder to write: codes, scales, config and tokenizer."""
    data_path: Path | None = None
    """Dataset folder made with this model's tokenizer; its train split calibrates GPTQ (4 bits)."""
    self_generate: bool = False
    """Calibrate on text that the model writes itself, instead of a dataset: texts or chats drawn
    from its own predictions (LLM-QAT, arXiv:2305.17888). Memory then holds the whole model in
    float32, of small models twice.
    """
    bits: int = 4
    """Bits per weight of the linear layers, 4 or 8; embedding and LM head have 8 bits, unless
    --target-size chooses.
    """
    method: Literal["gptaq", "gptq", "rtn", "absmax", "keep"] | None = None
    """gptaq is the default. gptq feeds rounding errors forward (needs --data-path or
    --self-generate); gptaq also corrects what earlier layers' errors did to a layer's inputs and
    to the residual stream, in twice the time; rtn, and 8 bits, only round; absmax gives the largest
    of 32 weights the code -8, as llama.cpp does, and is the default for a model that was trained
    with --quantization-aware, which it suits; keep takes over the codes of a GGUF of Q4_0 or Q8_0,
    or of a folder of compressed-tensors, GPTQ or MLX with symmetric groups of 32.
    """
    target_size: str | None = None
    """Size of the weights, such as 80MB: the matrices that lose most by 4 bits get 8 instead, as
    many as fit. A GGUF file takes a few MB more, for the tokenizer. Memory then holds the whole
    model in float32.
    """
    scale_steps: int = 0
    """Steps that train the scales against the unquantized model, codes and size unchanged; 0 for
    none. Memory then holds the whole model in float32.
    """
    num_calibration_samples: int = 128
    """Number of packed rows that calibrate, of the train split or of what the model writes."""
    max_seq_length: int | None = None
    """Tokens per calibration row; by default the model's context, at most 512."""
    seed: int = 0
    """Selects the calibration rows, or draws the text that the model writes."""
    run: Path | None = None
    """Run folder whose report lists the result."""
    force: bool = False
    """Replace what is at the output folder, and the finished layers of a stopped run with other
    settings.
    """

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _QUANTIZE)
        if self.bits not in (4, 8):
            wrong.append(f"bits is {self.bits}, but must be 4 or 8")
        if self.bits == 8 and self.method in ("gptaq", "gptq", "absmax"):
            wrong.append(
                f"--method {self.method} is for 4 bits; 8 bits only round: leave out --method"
            )
        if self.target_size is not None and parse_size(self.target_size) is None:
            wrong.append(
                f"target_size is '{self.target_size}', but must be a size such as 80MB or 0.5GB"
            )
        if self.bits == 8 or self.method == "keep":
            wrong += [
                f"{option} needs 4 bits that are chosen here: leave it out, or choose "
                "--bits 4 and --method gptaq"
                for option, value in (
                    ("--target-size", self.target_size),
                    ("--scale-steps", self.scale_steps),
                )
                if value
            ]
        if self.self_generate and self.data_path is not None:
            wrong.append(
                "--data-path and --self-generate both give text to calibrate on: choose one"
            )
        if self.self_generate and not self.calibrates:
            method = "--bits 8" if self.bits == 8 else f"--method {self.method}"
            wrong.append(
                f"--self-generate writes text to calibrate on, which {method} does not use: leave "
                "it out, or choose --bits 4 and --method gptaq"
            )
        if self.calibrates and self.data_path is None and not self.self_generate:
            wrong.append(
                "GPTQ, --target-size and --scale-steps need text to calibrate on: add --data-path "
                "DATASET (a folder that `xinslm prepare` made), let the model write it with "
                "--self-generate, or choose --method rtn alone, which needs none and loses more"
            )
        return wrong

    @property
    def feeds_back_errors(self) -> bool:
        """Whether GPTQ chooses the codes."""
        return self.bits == 4 and self.method in (None, "gptaq", "gptq")

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is used."""
        return self.feeds_back_errors or self.target_size is not None or self.scale_steps > 0


def parse_size(text: str) -> int | None:
    """Bytes of '80MB', '0.5 GiB' or '80000000'; None if it is no such size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in {"", "b", *_UNITS}:
        return None
    return int(float(match[1]) * _UNITS.get(match[2], 1))
