"""`xinslm export all`: GGUF, Hugging Face folder and MLX next to each other in one folder.

Core ML is left out: coremltools takes longer than the others together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.config import to_dict
from xinslm.errors import UsageError
from xinslm.export.card import Export, commands, write_card
from xinslm.export.config import AllConfig, GgufConfig, HfConfig, MlxConfig
from xinslm.export.gguf import Result as GgufResult
from xinslm.export.gguf import run as run_gguf
from xinslm.export.kinds import CARD, EXPORTS
from xinslm.export.packed_folder import run_hf, run_mlx
from xinslm.files import MANIFEST, write_manifest
from xinslm.folders import manifest_kind, refuse_existing, refuse_inside
from xinslm.model.files import open_model
from xinslm.progress import Listener, ignore

VERSION = 1


_OWN = {"model.gguf", "Modelfile", CARD, MANIFEST, "hf", "mlx"}


@dataclass(frozen=True)
class Result:
    """What was written."""

    parts: list[Any]
    """The results of the single exports."""

    def describe(self) -> str:
        """Lines for the terminal, of one export after the other."""
        return "\n\n".join(part.describe() for part in self.parts)


def run(config: AllConfig, on_progress: Listener = ignore) -> Result:
    """Write DIR/model.gguf with its Modelfile and card, DIR/hf and DIR/mlx.

    What is complete stays if a later one fails.
    """
    refuse_existing(config.output_dir, config.force)
    if (config.output_dir / CARD).exists() and manifest_kind(config.output_dir) != EXPORTS:
        raise UsageError(f"{config.output_dir / CARD} is not xinslm's. Choose another --output-dir")
    _refuse_others(config.output_dir)
    if config.force:
        refuse_inside(config.output_dir, (config.model,))
    folder: Path = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    model, run_folder, force = config.model, config.run, config.force
    file = GgufConfig(model, folder / "model.gguf", run=run_folder, force=force, ollama=True)
    result = Result(
        [
            run_gguf(file, on_progress),
            run_hf(HfConfig(model, folder / "hf", config.dtype, run_folder, force), on_progress),
            run_mlx(MlxConfig(model, folder / "mlx", config.dtype, run_folder, force), on_progress),
        ]
    )
    _complete(config, result.parts[0])
    return result


def _refuse_others(folder: Path) -> None:
    """Raise UsageError for what this command did not write: the manifest would list it, and
    `publish` upload it.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in names if name not in _OWN]:
        raise UsageError(
            f"{folder} holds {others[0]}, which is not part of such an export. Choose another "
            "--output-dir"
        )


def _complete(config: AllConfig, gguf: GgufResult) -> None:
    """Write the GGUF's card, and the manifest of the files that lie next to the folders."""
    source, folder = open_model(config.model), config.output_dir
    run_with = commands("gguf", None, True)
    sizes = (gguf.path.name, gguf.file_bytes, gguf.types, gguf.context_length)
    write_card(folder, Export(source, "gguf", *sizes, run_with, config.run))
    inner = tuple(path.name for path in folder.iterdir() if path.is_dir())
    inputs = {"model": source.fingerprint}
    write_manifest(folder, EXPORTS, VERSION, to_dict(config), inputs, skip=inner)
