"""The stage `tokenizer train`: learns a tokenizer from text, or nests one in a teacher's tokenizer.

xinslm tokenizer train --data-path stories.jsonl.gz --vocab-size 4096 --output-dir runs/tokenizer
xinslm tokenizer train --prefix-of TEACHER --vocab-size 2048 --output-dir runs/nested
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xinslm.config import to_dict
from xinslm.data.read import read_documents
from xinslm.files import write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside, refuse_output_in
from xinslm.progress import Listener, Progress, ignore
from xinslm.tokenizer.bpe import DEFAULT_SPECIAL_TOKENS, BPETokenizer
from xinslm.tokenizer.config import TokenizerConfig
from xinslm.tokenizer.load import load_tokenizer

KIND, VERSION = "tokenizer", 1
_SAMPLE_CHARACTERS = 200_000


@dataclass(frozen=True)
class TrainResult:
    """What was written."""

    output_dir: Path
    vocab_size: int
    num_merges: int
    special_tokens: tuple[str, ...]
    bytes_per_token: float | None
    """On the first 200,000 characters of the text; None if no text was given."""
    seconds: float

    def describe(self) -> str:
        """Return sizes, compression and the folder as text."""
        ratio = f"{self.bytes_per_token:.3f}" if self.bytes_per_token else "not measured (no text)"
        return "\n".join(
            (
                f"vocabulary       {self.vocab_size:,} ids",
                f"merges           {self.num_merges:,}",
                f"special tokens   {' '.join(self.special_tokens) or 'none'}",
                f"bytes per token  {ratio}",
                f"seconds          {self.seconds:.1f}",
                f"written to       {self.output_dir}",
            )
        )


def run(config: TokenizerConfig, on_progress: Listener = ignore) -> TrainResult:
    """Learn or nest the tokenizer and write its folder."""
    config.check()
    refuse_output_in(config.output_dir, config.data_path)
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (*config.data_path, config.prefix_of))
    started = time.perf_counter()
    sample: list[str] = []
    texts = _texts(config.data_path, sample) if config.data_path else iter(())
    if config.prefix_of is not None:
        teacher = load_tokenizer(config.prefix_of)
        tokenizer = BPETokenizer.prefix_of(teacher, config.vocab_size, config.special_tokens)
        inputs = {"teacher": teacher.fingerprint()}
        while sum(map(len, sample)) < _SAMPLE_CHARACTERS and next(texts, None) is not None:
            pass
    else:
        special = DEFAULT_SPECIAL_TOKENS if config.special_tokens is None else config.special_tokens
        tokenizer = BPETokenizer(
            config.vocab_size, special, config.min_frequency, config.max_token_length
        )
        tokenizer.train(texts, on_progress)
        inputs = {}
    if tokenizer.vocab_size < config.vocab_size:
        note = (
            f"the vocabulary has {tokenizer.vocab_size:,} ids, not the requested "
            f"{config.vocab_size:,}: the text is too small"
        )
        on_progress(Progress("learn merges", note=note))
    with new_folder(config.output_dir, config.force) as folder:
        tokenizer.save(folder)
        write_manifest(
            folder,
            KIND,
            VERSION,
            to_dict(config),
            inputs,
            vocab_size=tokenizer.vocab_size,
            fingerprint=tokenizer.fingerprint(),
        )
    return TrainResult(
        output_dir=config.output_dir,
        vocab_size=tokenizer.vocab_size,
        num_merges=len(tokenizer.merges),
        special_tokens=tuple(tokenizer.special_tokens),
        bytes_per_token=_bytes_per_token(tokenizer, sample),
        seconds=time.perf_counter() - started,
    )


def _texts(paths: Iterable[str], sample: list[str]) -> Iterator[str]:
    """Read texts as a stream; the first 200,000 characters also go into `sample`."""
    left = _SAMPLE_CHARACTERS
    for document in read_documents(paths):
        if left > 0:
            sample.append(document.plain_text[:left])
            left -= len(sample[-1])
        yield document.plain_text


def _bytes_per_token(tokenizer: BPETokenizer, sample: list[str]) -> float | None:
    ids, _ = tokenizer.encode_batch(sample)
    size = sum(len(text.encode("utf-8", "replace")) for text in sample)
    return size / len(ids) if len(ids) else None
