"""Configuration of `doctor` and `doctor compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xinslm.hints import POSITIONAL
from xinslm.ranges import SEED, Device, Dtype, Range, Settings, range_errors

_DOCTOR = {
    "documents": Range(1),
    "positions": Range(8, 100_000),
    "batch_size": Range(4, 1024),
    "seed": SEED,
}


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Check data, cache, teacher, student and this machine's arithmetic before a long run."""

    data_path: Path
    """Dataset folder made by `xinslm prepare`."""
    cache: Path | None = None
    """Cache folder to check."""
    teacher: str | None = None
    """Teacher to ask again about a few documents: any model."""
    adapter: Path | None = None
    """LoRA adapter that the teacher is used with."""
    student: Path | None = None
    """Student to compute with, any model; a small random one if not given."""
    documents: int = 8
    """Documents that the teacher scores again."""
    positions: int = 128
    """Positions on which losses are compared."""
    batch_size: int = 4
    """Packed rows that the student reads."""
    dtype: Dtype = "float32"
    """The teacher's number type."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository brings."""
    seed: int = 0
    """Seed of random choices: documents, directions, a student."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _DOCTOR)
        if self.adapter is not None and self.teacher is None:
            wrong.append("adapter is for a teacher: give --teacher as well")
        return wrong


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Compare two model files of any kind: whether they hold the same model."""

    model: Annotated[Path, POSITIONAL]
    """Model A: a model, run or quantized folder, a folder of another format, a GGUF file, or a Hub
    name.
    """
    other: Annotated[Path, POSITIONAL]
    """Model B, of the same or another kind."""
    predictions: bool = False
    """Load both models, one after the other, and compare their next-token distributions too."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
