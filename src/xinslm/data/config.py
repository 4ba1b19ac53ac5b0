"""Settings of `xinslm prepare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import Alias
from xinslm.ranges import SEED, Range, Settings, range_errors

SplitDocuments = Literal["auto", "file", "blank-line", "line"]
DocumentEnd = Literal["eos", "bos", "none"]

_PREPARE = {
    "validation_fraction": Range(0, 1, below=True),
    "max_tokens": Range(1),
    "show": Range(0),
    "seed": SEED,
}


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """Turn text and chats into a dataset of tokens with a loss mask and a validation split."""

    data_path: tuple[str, ...]
    """Files (.txt .json .jsonl .parquet, also .gz), folders of them, Hugging Face datasets
    (OWNER/NAME).
    """
    tokenizer_path: Path
    """Folder of the tokenizer, any model (also a GGUF file), or a Hub name."""
    output_dir: Annotated[Path, Alias("-o")]
    """Folder to write the dataset to."""
    validation_fraction: float = 0.05
    """Share of the text held back to measure on; a document's own content and the seed decide
    which. Of few or long documents, the ends of some are held back.
    """
    validation_path: tuple[str, ...] = ()
    """Files, folders or datasets to measure on, instead of a share of the data."""
    document_end: DocumentEnd = "eos"
    """Token that closes a plain text (llama2.c: BOS); chats close as their template says."""
    max_tokens: int | None = None
    """Stop when the training split has this many tokens; fewer is an error."""
    keep_duplicates: bool = False
    """Keep documents that are exactly equal to an earlier one."""
    split_documents: SplitDocuments = "auto"
    """What is a document of a .txt file; auto: what <|endoftext|> lines separate, else the file."""
    text_field: str | None = None
    """Key or column that holds the text, where it is not called 'text'."""
    dataset_name: str | None = None
    """Configuration of a Hugging Face dataset that has several ('wikitext-2-raw-v1')."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset to read."""
    train_on_prompts: bool = False
    """Count the prompt's tokens as targets too, not only the answer's."""
    show: int = 0
    """Number of documents to print, token by token, with their mask."""
    seed: int = 0
    """Changes which documents are held back."""
    force: bool = False
    """Replace the output folder if it already holds something."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _PREPARE)
        if not self.data_path:
            wrong.append("data_path is empty; name files, folders or Hugging Face datasets")
        return wrong
