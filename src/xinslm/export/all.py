"""`xinslm export all`: GGUF, Hugging Face folder and MLX next to each other in one folder.

Core ML is left out: coremltools takes longer than the others together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.export.config import AllConfig, GgufConfig, HfConfig, MlxConfig
from xinslm.export.gguf import run as run_gguf
from xinslm.export.packed_folder import run_hf, run_mlx
from xinslm.folders import refuse_existing, refuse_inside
from xinslm.progress import Listener, ignore


@dataclass(frozen=True)
class Result:
    """What was written."""

    parts: list[Any]
    """The results of the single exports."""

    def describe(self) -> str:
        """Lines for the terminal, of one export after the other."""
        return "\n\n".join(part.describe() for part in self.parts)


def run(config: AllConfig, on_progress: Listener = ignore) -> Result:
    """Write DIR/model.gguf, DIR/hf and DIR/mlx; what is complete stays if a later one fails."""
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.model,))
    folder: Path = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    model, run_folder, force = config.model, config.run, config.force
    return Result(
        [
            run_gguf(
                GgufConfig(model, folder / "model.gguf", run=run_folder, force=force), on_progress
            ),
            run_hf(HfConfig(model, folder / "hf", config.dtype, run_folder, force), on_progress),
            run_mlx(MlxConfig(model, folder / "mlx", config.dtype, run_folder, force), on_progress),
        ]
    )
