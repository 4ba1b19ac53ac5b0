"""What goes with a GGUF file: a Modelfile for Ollama, a link in LM Studio's folder; a model card if
the export chose the codes.

Whether they can be written is checked before the GGUF is, so that a long export does not end with
an error.
"""

from dataclasses import dataclass
from pathlib import Path

from xinslm.errors import UsageError
from xinslm.export.config import CALIBRATED, GgufConfig
from xinslm.export.lmstudio import destination, place
from xinslm.export.modelfile import MODELFILE, Modelfile, make_modelfile, require_writable
from xinslm.files import write_text
from xinslm.model.source import ModelSource
from xinslm.tokenizer.load import load_tokenizer


@dataclass(frozen=True)
class Companions:
    """What is to be written next to `file`."""

    file: Path
    modelfile: Modelfile | None
    linked: Path | None
    """Where LM Studio finds the file."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the runtimes do otherwise than the model."""
        return self.modelfile.notes if self.modelfile is not None else ()

    def write(self) -> tuple[Path, ...]:
        """Write them; the GGUF file is there by now."""
        written = []
        if self.modelfile is not None:
            written.append(self.file.with_name(MODELFILE))
            write_text(written[-1], self.modelfile.text)
        if self.linked is not None:
            place(self.file, self.linked)
            written.append(self.linked)
        return tuple(written)


def card_path(file: Path) -> Path:
    """Where the model card of a file goes; README.md would be that of the folder."""
    return file.with_name(f"{file.name}.md")


def write_card(file: Path, text: str) -> Path:
    """Write the model card next to a file, and return its path."""
    write_text(card_path(file), text)
    return card_path(file)


def check_places(config: GgufConfig) -> Path | None:
    """Raise UsageError if something is in the way; return where LM Studio's link goes."""
    if config.ollama:
        require_writable(config.output_path.with_name(MODELFILE), config.force)
    card = card_path(config.output_path)
    if config.outtype == CALIBRATED and card.exists() and not config.force:
        raise UsageError(
            f"{card} exists, where the model card goes. Choose another --output-path, or add "
            "--force to replace it"
        )
    if config.lmstudio is None:
        return None
    return destination(config.output_path, config.lmstudio, config.lmstudio_dir)


def plan(
    config: GgufConfig, source: ModelSource, context: int, adds_bos: bool, linked: Path | None
) -> Companions:
    """Compose what a configuration asks for; `context` and `adds_bos` are the GGUF's."""
    modelfile = None
    if config.ollama:
        tokenizer = load_tokenizer(source.path)
        modelfile = make_modelfile(config.output_path, source, tokenizer, context, adds_bos)
    return Companions(config.output_path, modelfile, linked)
